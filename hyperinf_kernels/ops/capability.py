"""What a machine has, as far as the choice of a backend may depend on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import native
from .gpu import triton_missing


@dataclass(frozen=True)
class Capability:
    """What this machine has, as far as a choice may depend on it.

    Attributes:
        missing: a backend -> the reason it cannot be used at all, and the remedy.
        cuda: compute capability of the weakest visible CUDA device; None where there is none.
        cuda_archs: what the extension's CUDA kernels were built for, as "sm_80" or "compute_90".
        isas: compiled instruction sets that the processor runs, best first.
    """

    missing: Mapping[str, str] = field(default_factory=dict)
    cuda: tuple[int, int] | None = None
    cuda_archs: tuple[str, ...] = ()
    isas: tuple[str, ...] = ()

    def lacks(self, backend: str) -> str | None:
        """The reason why no kernel of `backend` can run on this machine, or None."""
        if backend in self.missing:
            return self.missing[backend]
        if backend == "cuda" and self.cuda and self.cuda_arch() is None:
            device = "sm_{}{}".format(*self.cuda)
            return (
                f"the CUDA kernels were built for {', '.join(self.cuda_archs) or 'no device'}, "
                f"this device is {device} (reinstall with HYPERINF_CUDA_ARCHS={device[3:]})"
            )
        return None

    def cuda_arch(self) -> str | None:
        """The built architecture that serves the device: machine code of its family, or PTX."""
        if self.cuda is None:
            return None
        best: tuple[bool, int, str] | None = None
        for name in self.cuda_archs:
            kind, _, digits = name.partition("_")
            arch = (int(digits[:-1]), int(digits[-1]))
            if arch <= self.cuda and (kind == "compute" or arch[0] == self.cuda[0]):
                best = max(best or (False, 0, ""), (kind == "sm", int(digits), name))
        return best[2] if best else None

    def settings(self, backend: str) -> dict[str, str]:
        """What of the machine a kernel of `backend` runs with, for `Plan.config`."""
        if backend == "cpu" and self.isas:
            return {"isa": self.isas[0]}
        arch = self.cuda_arch() if backend == "cuda" else None
        return {"arch": arch} if arch else {}


@functools.cache
def capability() -> Capability:
    """Probe this machine once; each absent backend keeps its reason and remedy."""
    missing = {}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    cuda = min((torch.cuda.get_device_capability(k) for k in devices), default=None)
    unfit = triton_missing(cuda)
    if unfit:
        missing["triton"] = unfit
    unbuilt = native.missing()
    if unbuilt:
        missing["cpu"] = missing["cuda"] = unbuilt
    elif not native.cuda_archs():
        missing["cuda"] = f"the extension has no CUDA kernels: {native.no_cuda()}"
    elif cuda is None:
        version = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        missing["cuda"] = (
            f"no CUDA device is visible to torch {torch.__version__}, which was built with "
            f"{version} (nvidia-smi and torch.cuda.is_available() tell which of the two it is)"
        )
    return Capability(missing, cuda, native.cuda_archs(), native.isas())

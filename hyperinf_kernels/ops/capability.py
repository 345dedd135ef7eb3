"""What a machine has, as far as the choice of a backend may depend on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from . import native
from .gpu import LEAST_CAPABILITY, triton_missing


@dataclass(frozen=True)
class Capability:
    """What this machine has, as far as a choice may depend on it.

    Attributes:
        missing: a backend -> the reason it cannot be used at all, and the remedy.
        cuda: compute capability of the CUDA device, or of the weakest visible one; None where
            there is none, or where the tensors are elsewhere.
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
def capability(device: torch.device | None = None) -> Capability:
    """Probe this machine once; each absent backend keeps its reason and remedy.

    Args:
        device: where the tensors are. None: the weakest visible GPU. The choice for tensors on a
            CPU does not look at GPUs at all, since that would initialise CUDA in the process.
    """
    missing: dict[str, str] = {}
    unbuilt = native.missing()
    if unbuilt:
        missing["cpu"] = missing["cuda"] = unbuilt
    on_gpu = device is None or device.type == "cuda"
    cuda = _weakest(device) if on_gpu else None
    uninstalled = triton_missing(cuda if on_gpu else LEAST_CAPABILITY)
    if uninstalled:
        missing["triton"] = uninstalled
    if not unbuilt and not native.cuda_archs():
        missing["cuda"] = f"the extension has no CUDA kernels: {native.no_cuda()}"
    elif not unbuilt and on_gpu and cuda is None:
        version = "no CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        missing["cuda"] = (
            f"no CUDA device is visible to torch {torch.__version__}, which was built with "
            f"{version} (nvidia-smi and torch.cuda.is_available() tell which of the two it is)"
        )
    return Capability(missing, cuda, native.cuda_archs(), native.isas())


def _weakest(device: torch.device | None) -> tuple[int, int] | None:
    """Compute capability of the device, or the least of all that are visible."""
    if device is not None:
        return torch.cuda.get_device_capability(device)
    if not torch.cuda.is_available():
        return None
    devices = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_capability(k) for k in devices), default=None)

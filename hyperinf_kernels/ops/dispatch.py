"""Which backend runs an op: a pure choice, recorded, explained, and strict on demand.

Every op has a plain-torch kernel; faster backends register further kernels for the same op and
callers never change. `select` is a pure function of the tensors' metadata, the machine's capability
and the request, so the whole policy is unit-tested without the hardware it describes.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu, native

log = logging.getLogger("hyperinf_kernels")

PREFERENCE = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpu", "torch")}
BACKENDS = ("cuda", "triton", "cpu", "torch")


class BackendError(RuntimeError):
    """A backend was required (by name or by strict mode) and cannot serve the call."""


class Plan(NamedTuple):
    """How one call of an op runs: the backend, its kernel, the kernel's settings, and why."""

    backend: str
    kernel: str
    config: Mapping[str, Any]
    reason: str


class TensorMeta(NamedTuple):
    """All that a choice may look at: never the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    stride: tuple[int, ...]
    requires_grad: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        return cls(
            tuple(tensor.shape),
            tensor.dtype,
            tensor.device.type,
            tuple(tensor.stride()),
            tensor.requires_grad and torch.is_grad_enabled(),
        )


@dataclass(frozen=True)
class Capability:
    """What this machine has.

    `missing` maps a backend to the reason it cannot be used at all; `device` is the compute
    capability of the CUDA device, None without one.
    """

    missing: Mapping[str, str] = field(default_factory=dict)
    device: tuple[int, int] | None = None


def _no_settings(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return {}


class Kernel(NamedTuple):
    """One implementation of an op.

    `refuse` returns the reason it cannot take these tensors, `config` the settings it runs with.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[[tuple[TensorMeta, ...]], str | None]
    config: Callable[[tuple[TensorMeta, ...], Capability], Mapping[str, Any]] = _no_settings


KERNELS: dict[str, dict[str, Kernel]] = {}
# public ops that run on the kernel of another name
SHARED = {"schulz_inverse": "schulz", "schulz_solve": "schulz"}


def implements(
    op: str,
    backend: str = "torch",
    refuse: Callable[[tuple[TensorMeta, ...]], str | None] = lambda metas: None,
    config: Callable[[tuple[TensorMeta, ...], Capability], Mapping[str, Any]] = _no_settings,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `backend`'s kernel for `op`."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        KERNELS.setdefault(op, {})[backend] = Kernel(name, function, refuse, config)
        return function

    return register


@functools.cache
def capability() -> Capability:
    """Probe this machine once; each absent backend keeps its reason and remedy."""
    missing = {}
    unfit = gpu.triton_missing()
    if unfit:
        missing["triton"] = unfit
    unbuilt = native.missing()
    if unbuilt:
        missing["cpu"] = unbuilt
    return Capability(missing, gpu.capability())


def select(
    op: str,
    metas: tuple[TensorMeta, ...],
    machine: Capability,
    requested: str = "auto",
) -> Plan:
    """Choose the kernel for `op` on tensors with these `metas`.

    The first backend in the device's order of preference that is present, has a kernel for the op
    and accepts the tensors wins; every refusal before it is told in `Plan.reason`. A `requested`
    backend is tried first, and plain torch serves when it refuses.

    Raises:
        BackendError: `requested` is not a known backend, or `op` is not a known op.
    """
    if op not in KERNELS:
        raise BackendError(f"unknown op {op!r}; known: {', '.join(sorted(KERNELS))}")
    if requested not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise BackendError(f"HYPERINF_BACKEND={requested!r} is not a backend; known: {known}")
    device = metas[0].device if metas else "cpu"
    order = PREFERENCE.get(device, ("torch",)) if requested == "auto" else (requested, "torch")
    refusals: list[tuple[str, str]] = []
    for backend in order:
        kernel = KERNELS[op].get(backend)
        if kernel is None:
            refusal: str | None = f"no {backend} kernel for {op}"
        elif backend != "torch" and backend in machine.missing:
            refusal = machine.missing[backend]
        elif backend != "torch" and backend not in PREFERENCE.get(device, ()):
            refusal = f"{backend} kernels do not take {device} tensors"
        else:
            refusal = kernel.refuse(metas)
        if refusal is None and kernel is not None:
            reason = "; ".join(f"{b}: {why}" for b, why in refusals) or "first choice"
            return Plan(backend, kernel.name, kernel.config(metas, machine), reason)
        refusals.append((backend, str(refusal)))
    raise BackendError(f"{op}: no backend can run it: {refusals}")


def _plan(op: str, tensors: tuple[Tensor, ...]) -> Plan:
    requested = os.environ.get("HYPERINF_BACKEND", "auto")
    plan = select(op, tuple(map(TensorMeta.of, tensors)), capability(), requested)
    asked_for_other = requested not in ("auto", plan.backend)
    slow_device = plan.backend == "torch" and any(t.is_cuda for t in tensors)
    if os.environ.get("HYPERINF_STRICT", "0") == "1" and (
        asked_for_other or (slow_device and requested == "auto")
    ):
        raise BackendError(f"{op} would fall back to plain torch: {plan.reason}")
    if slow_device and requested == "auto":
        _warn_once(f"{op}: a CUDA tensor runs in plain torch ({plan.reason})")
    return plan


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _log_once(op: str, plan_text: str) -> None:
    log.info("%s runs on %s", op, plan_text)


_traces: list[list[Plan]] = []
_used: dict[str, set[str]] = {}


def call(op: str, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
    """Run `op`: the chosen kernel is called with `*tensors, *args, **kwargs`."""
    plan = _plan(op, tensors)
    for trace in _traces:
        trace.append(plan)
    _used.setdefault(op, set()).add(plan.backend)
    _log_once(op, f"{plan.backend} ({plan.kernel}; {plan.reason})")
    return KERNELS[op][plan.backend].run(*tensors, *args, **kwargs)


def explain(op: str, *tensors: Tensor) -> Plan:
    """The Plan that `op` would run with on these tensors, without running it.

    Raises:
        BackendError: unknown op, unknown `HYPERINF_BACKEND`, or strict mode and a fallback.
    """
    return _plan(SHARED.get(op, op), tensors)


def backends_used() -> dict[str, str]:
    """{op: backends} of every op this process has called so far."""
    return {op: ", ".join(sorted(backends)) for op, backends in sorted(_used.items())}


@contextmanager
def trace_backends() -> Iterator[list[Plan]]:
    """Collect the Plan of every op called inside the block, in call order."""
    trace: list[Plan] = []
    _traces.append(trace)
    try:
        yield trace
    finally:
        # identity, not equality: two nested traces can hold equal lists
        _traces[:] = [t for t in _traces if t is not trace]

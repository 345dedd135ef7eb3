"""Which backend runs an op: a pure choice, recorded, explained, and strict on demand.

Every op has a plain-torch kernel; faster backends register further kernels for the same op and
callers never change. `select` is a pure function of the tensors' metadata, the machine's capability
and the request, so the whole policy is unit-tested without the hardware it describes.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .capability import Capability as Capability
from .capability import capability as capability

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


def unfit(metas: Iterable[TensorMeta], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why a kernel for these dtypes, without a backward, cannot take the tensors; or None."""
    for meta in metas:
        if meta.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            takes = f"{', '.join(others)} and {last}" if others else last
            return f"takes {takes}, not {str(meta.dtype).removeprefix('torch.')}"
        if meta.requires_grad:
            return "has no backward, and an input requires grad"
    return None


def _nothing(_: Any) -> None:
    return None


def _no_settings(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return {}


class Kernel(NamedTuple):
    """One implementation of an op, what it cannot do, and what it runs with; all of it pure.

    `refuse` sees the tensors' metadata, `needs` the machine, and both return a reason or None;
    `config` sees both and returns the kernel's own settings.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[[tuple[TensorMeta, ...]], str | None] = _nothing
    needs: Callable[[Capability], str | None] = _nothing
    config: Callable[[tuple[TensorMeta, ...], Capability], Mapping[str, Any]] = _no_settings


KERNELS: dict[str, dict[str, Kernel]] = {}
# public ops that run on the kernel of another name
SHARED = {"schulz_inverse": "schulz", "schulz_solve": "schulz"}


def implements(
    op: str,
    backend: str = "torch",
    refuse: Callable[[tuple[TensorMeta, ...]], str | None] = _nothing,
    needs: Callable[[Capability], str | None] = _nothing,
    config: Callable[[tuple[TensorMeta, ...], Capability], Mapping[str, Any]] = _no_settings,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as `backend`'s kernel for `op`.

    `refuse(metas)` gives the reason why the kernel cannot take tensors with this metadata, and
    `needs(machine)` the reason why this machine cannot run it; None means that it can.
    `config(metas, machine)` is what `Plan.config` tells beside the machine's settings.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        KERNELS.setdefault(op, {})[backend] = Kernel(name, function, refuse, needs, config)
        return function

    return register


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
        elif (lack := machine.lacks(backend) or kernel.needs(machine)) is not None:
            refusal = lack
        elif backend != "torch" and backend not in PREFERENCE.get(device, ()):
            refusal = f"{backend} kernels do not take {device} tensors"
        else:
            refusal = kernel.refuse(metas)
        if refusal is None and kernel is not None:
            reason = "; ".join(f"{b}: {why}" for b, why in refusals) or "first choice"
            config = {**machine.settings(backend), **kernel.config(metas, machine)}
            return Plan(backend, kernel.name, config, reason)
        refusals.append((backend, str(refusal)))
    raise BackendError(f"{op}: no backend can run it: {refusals}")


def resolve(
    op: str,
    metas: tuple[TensorMeta, ...],
    machine: Capability,
    environment: Mapping[str, str],
) -> tuple[Plan, bool]:
    """`select` with the settings of the environment, and whether the plan is a slow fallback.

    Slow is a CUDA tensor in plain torch that nobody asked for. fp64 is not: torch is what it is
    meant for, and no kernel here takes it on a GPU.

    Raises:
        BackendError: as `select`, or HYPERINF_STRICT=1 and the plan is not what was wanted.
    """
    requested = environment.get("HYPERINF_BACKEND", "auto")
    isa = environment.get("HYPERINF_CPU_ISA")
    if isa:
        machine = replace(machine, isas=(isa,))
    plan = select(op, metas, machine, requested)
    on_cuda = any(meta.device == "cuda" for meta in metas)
    wide = any(meta.dtype == torch.float64 for meta in metas)
    slow = requested == "auto" and plan.backend == "torch" and on_cuda and not wide
    if environment.get("HYPERINF_STRICT", "0") == "1" and (
        slow or requested not in ("auto", plan.backend)
    ):
        raise BackendError(f"{op} would fall back to plain torch: {plan.reason}")
    return plan, slow


def _plan(op: str, tensors: tuple[Tensor, ...]) -> Plan:
    plan, slow = resolve(op, tuple(map(TensorMeta.of, tensors)), capability(), os.environ)
    if slow:
        _warn_once(op, plan.reason)
    return plan


# an op is warned of once, and logged once per backend, whatever the reasons of later calls
_warned: set[str] = set()
_used: dict[str, set[str]] = {}
_traces: list[list[Plan]] = []


def _warn_once(op: str, reason: str) -> None:
    if op in _warned:
        return
    _warned.add(op)
    message = f"{op}: a CUDA tensor runs in plain torch ({reason})"
    warnings.warn(message, RuntimeWarning, stacklevel=5)


def _log_once(op: str, plan: Plan) -> None:
    used = _used.setdefault(op, set())
    if plan.backend not in used:
        used.add(plan.backend)
        log.info("%s runs on %s (%s; %s)", op, plan.backend, plan.kernel, plan.reason)


def call(op: str, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
    """Run `op`, outside autocast: the chosen kernel gets `*tensors, *args, **kwargs`."""
    plan = _plan(op, tensors)
    for trace in _traces:
        trace.append(plan)
    _log_once(op, plan)
    run = KERNELS[op][plan.backend].run
    device = tensors[0].device.type if tensors else "cpu"
    # the inputs' dtypes decide: autocast would round the sums of whatever is written in torch
    if device in PREFERENCE and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return run(*tensors, *args, **kwargs)
    return run(*tensors, *args, **kwargs)


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

"""Which backend runs an op: a pure choice, recorded, explained, and strict on demand.

Every op has a plain-torch kernel; faster backends register further kernels for the same op and
callers never change. `select` is a pure function of the tensors' metadata, the machine's capability
and the request, so the whole policy is unit-tested without the hardware it describes.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ambient import DEVICES, exact, is_exact
from .capability import Capability as Capability
from .capability import capability as capability
from .metadata import TensorMeta as TensorMeta
from .metadata import derivative, key_of
from .metadata import unfit as unfit

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
# public ops that run on the kernel of another name, by where their tensors are
SHARED = {
    op: {"cpu": "schulz_adaptive", "cuda": "schulz"} for op in ("schulz_inverse", "schulz_solve")
}


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
            # what is written in torch is differentiated by torch, and nothing else is
            refusal = kernel.refuse(metas) or (derivative(metas) if backend != "torch" else None)
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
    slow = requested == "auto" and _slow(plan, metas)
    if slow or requested not in ("auto", plan.backend):
        _refuse_if_strict(op, plan, environment)
    return plan, slow


def _slow(plan: Plan, metas: tuple[TensorMeta, ...]) -> bool:
    on_cuda = any(meta.device == "cuda" for meta in metas)
    wide = any(meta.dtype == torch.float64 for meta in metas)
    return plan.backend == "torch" and on_cuda and not wide


def _refuse_if_strict(op: str, plan: Plan, environment: Mapping[str, str]) -> None:
    if environment.get("HYPERINF_STRICT", "0") == "1":
        raise BackendError(f"{op} would fall back to plain torch: {plan.reason}")


class Ready(NamedTuple):
    """A call whose tensors fit together and whose kernel is chosen."""

    op: str
    plan: Plan
    device: str
    options: tuple[Any, ...]  # what else the kernel is told about the tensors
    slow: bool
    fallback: bool  # what strict mode refuses


MOST_KEPT = 4096
_kept: dict[tuple[Hashable, ...], Ready] = {}


def checked(
    op: str, check: Callable[..., tuple[Any, ...]], tensors: tuple[Tensor, ...], *options: Hashable
) -> Ready:
    """The tensors checked and the kernel chosen, once for all tensors of the same metadata.

    Args:
        check: called with `*tensors, *options`; raises for what does not fit, and returns the
            kernel's further arguments that follow from shapes and options. It reads no value.

    Raises:
        BackendError: as `resolve`. Others: whatever `check` raises.
    """
    if torch.compiler.is_compiling():
        return _prepare(op, check, tensors, options)
    key = key_of(tensors, op, check, options, os.environ.get("HYPERINF_BACKEND"))
    ready = None if key is None else _kept.get(key)
    if ready is None:
        ready = _prepare(op, check, tensors, options)
        if key is not None:
            if len(_kept) >= MOST_KEPT:
                _kept.clear()
            _kept[key] = ready
    if ready.fallback:
        _refuse_if_strict(op, ready.plan, os.environ)
    return ready


def _prepare(
    op: str,
    check: Callable[..., tuple[Any, ...]],
    tensors: tuple[Tensor, ...],
    options: tuple[Hashable, ...],
) -> Ready:
    further = check(*tensors, *options)
    device = tensors[0].device if tensors else torch.device("cpu")
    plan, slow, fallback = _chosen(op, tuple(map(TensorMeta.of, tensors)), device)
    return Ready(op, plan, device.type, further, slow, fallback)


def _chosen(
    op: str, metas: tuple[TensorMeta, ...], device: torch.device
) -> tuple[Plan, bool, bool]:
    plan, slow = resolve(op, metas, capability(device), os.environ)
    requested = os.environ.get("HYPERINF_BACKEND", "auto")
    return plan, slow, slow or requested not in ("auto", plan.backend)


# torch.compile asks once, while it traces, as torch.compiler.assume_constant_result would have it;
# that one imports the compiler, which takes longer than everything else here
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(ready: Ready, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
    """Run the chosen kernel on `*tensors, *args, **kwargs`, recorded, whatever surrounds it."""
    op, plan, device, _, slow, _ = ready
    kernel = KERNELS[op][plan.backend].run
    if torch.compiler.is_compiling():
        with torch.autocast(device, enabled=False):
            return kernel(*tensors, *args, **kwargs)
    if _traces or slow or plan.backend not in _used.get(op, ()):
        _record(ready, tensors)
    # the inputs' dtypes decide: autocast, say, would round the sums of whatever is written in torch
    if device not in DEVICES or is_exact(device):
        return kernel(*tensors, *args, **kwargs)
    with exact():
        return kernel(*tensors, *args, **kwargs)


def call(op: str, tensors: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> Any:
    """Run `op` on tensors that are known to fit: the kernel gets `*tensors, *args, **kwargs`."""
    return run(checked(op, _fit, tensors), tensors, *args, **kwargs)


def _fit(*_: Any) -> tuple[()]:
    return ()


# an op is warned of once, and logged once per backend, whatever the reasons of later calls
_warned: set[str] = set()
_used: dict[str, set[str]] = {}
_traces: list[list[Plan]] = []


def _record(ready: Ready, tensors: tuple[Tensor, ...]) -> None:
    op, plan = ready.op, ready.plan
    _log_once(op, plan)
    if ready.slow:
        _warn_once(op, plan.reason)
    if _traces:
        told = _plan(op, tensors)
        for trace in _traces:
            trace.append(told)


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


def _plan(op: str, tensors: tuple[Tensor, ...]) -> Plan:
    # compiled kernels read this variable themselves, so only what is told depends on it
    return checked(op, _fit, tensors, os.environ.get("HYPERINF_CPU_ISA")).plan


def explain(op: str, *tensors: Tensor) -> Plan:
    """The Plan that `op` would run with on these tensors, without running it.

    Raises:
        BackendError: unknown op, unknown `HYPERINF_BACKEND`, or strict mode and a fallback.
    """
    shared = SHARED.get(op, {})
    return _plan(shared.get(tensors[0].device.type, op) if tensors else op, tensors)


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

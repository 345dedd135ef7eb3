"""What surrounds a call and could change its numbers: set aside for as long as the call runs.

Autocast, the precision of fp32 products and the flushing of subnormal numbers would change sums;
grad mode and inference mode would mark what is kept. The default dtype and device are left alone,
since every tensor made here names its own, and so is deterministic mode, which only refuses.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K")

DEVICES = ("cpu", "cuda")
# where torch keeps the arithmetic of fp32 products; "none" is torch's default, which is IEEE's
_PRODUCTS = (("mkldnn", "matmul"), ("cuda", "matmul"))
_FULL = ("none", "ieee")
_precision = torch._C._get_fp32_precision_getter
_set_precision = torch._C._set_fp32_precision_setter


class _Here(threading.local):
    depth = 0  # of `exact` in this thread


_here = _Here()
# a processor that flushes takes this for zero
_SUBNORMAL = sys.float_info.min * sys.float_info.epsilon


def is_exact(device: str = "cpu") -> bool:
    """Whether nothing around the caller changes the numbers of a sum on this device."""
    return not (
        torch.is_autocast_enabled(device)
        or _SUBNORMAL == 0.0
        or (_Products.users and not _here.depth)
        or _precision("mkldnn", "matmul") not in _FULL
        or _precision("cuda", "matmul") not in _FULL
    )


@contextmanager
def exact() -> Iterator[None]:
    """Inside, products and sums are those of the inputs' dtypes, without autocast or flushing."""
    with ExitStack() as stack:
        for device in DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if _SUBNORMAL == 0.0:
            torch.set_flush_denormal(False)
            stack.callback(torch.set_flush_denormal, True)
        stack.enter_context(_Products())
        _here.depth += 1
        try:
            yield
        finally:
            _here.depth -= 1


def exactly(function: Callable[P, R]) -> Callable[P, R]:
    """Run the decorated function with exact sums; it may still be differentiated."""

    @functools.wraps(function)
    def sums(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or (is_exact() and is_exact("cuda")):
            return function(*args, **kwargs)
        with exact():
            return function(*args, **kwargs)

    return sums


def unaffected(function: Callable[P, R]) -> Callable[P, R]:
    """Run the decorated function with exact sums, without a graph and outside inference mode."""
    if inspect.isgeneratorfunction(function):
        return _unaffected_steps(function)

    @functools.wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        with _unaffected():
            return function(*args, **kwargs)

    return door


def _unaffected_steps(function: Callable[P, Any]) -> Callable[P, Any]:
    """The same for a generator, whose caller's surroundings are its own between two steps."""

    @functools.wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> Iterator[Any]:
        steps = function(*args, **kwargs)
        while True:
            with _unaffected():
                try:
                    item = next(steps)
                except StopIteration:
                    return
            yield item

    return door


def shielded(kind: type[K]) -> type[K]:
    """Class decorator: every public method that the class defines is `unaffected`."""
    for name, member in list(vars(kind).items()):
        if isinstance(member, FunctionType) and not name.startswith("_"):
            setattr(kind, name, unaffected(member))
    return kind


class _unaffected:  # noqa: N801, a context manager by the name of what it does
    """Grad mode off, inference mode off, sums exact; entering costs about 1 us if all are so."""

    __slots__ = ("grad", "stack")

    def __enter__(self) -> None:
        self.stack: ExitStack | None = None
        self.grad = torch.is_grad_enabled()
        inference = torch.is_inference_mode_enabled()
        if not (inference or torch.is_autocast_enabled("cuda")) and is_exact():
            torch._C._set_grad_enabled(False)  # what torch.no_grad does, at a third of its cost
            return
        with ExitStack() as stack:
            if inference:
                # what is kept must take part in later calls outside
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(exact())
            self.stack = stack.pop_all()

    def __exit__(self, *error: Any) -> None:
        if self.stack is None:
            torch._C._set_grad_enabled(self.grad)
        else:
            self.stack.__exit__(*error)


class _Products:
    """Full precision of fp32 products in the whole process, from the first user to the last."""

    users: ClassVar[int] = 0
    _before: ClassVar[list[str]] = []
    _lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if _Products.users == 0:
                _Products._before = [_precision(*where) for where in _PRODUCTS]
                for where in _PRODUCTS:
                    if _precision(*where) not in _FULL:
                        _set_precision(*where, "ieee")
            _Products.users += 1

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            _Products.users -= 1
            if _Products.users == 0:
                for where, before in zip(_PRODUCTS, _Products._before, strict=True):
                    _restore(where, before)


def _restore(where: tuple[str, str], before: str) -> None:
    if _precision(*where) == before:
        return
    # inherited from a wider setting, if that gives it again
    _set_precision(*where, "none")
    if _precision(*where) != before:
        _set_precision(*where, before)

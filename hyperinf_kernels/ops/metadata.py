"""What a choice may know of tensors: never their values, so that it can be kept for later calls."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# torch's own answer to "is this inside grad, jvp, vmap, ...", which no public function gives
_transforming = torch._C._are_functorch_transforms_active
_transformed = torch._C._functorch.is_functorch_wrapped_tensor

PLAIN = frozenset({Tensor, torch.nn.Parameter})


class TensorMeta(NamedTuple):
    """All that a choice may look at: never the values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str
    stride: tuple[int, ...]
    requires_grad: bool = False
    transformed: bool = False  # by torch.func, or carrying a forward-mode derivative

    @classmethod
    def of(cls, tensor: Tensor) -> TensorMeta:
        # a choice is for these sizes, so the symbols of a tracer become numbers
        return cls(
            tuple([operator.index(size) for size in tensor.shape]),
            tensor.dtype,
            tensor.device.type,
            tuple([operator.index(step) for step in tensor.stride()]),
            tensor.requires_grad and torch.is_grad_enabled(),
            is_transformed(tensor),
        )


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation sees more in the tensor than values."""
    if _transforming() and _transformed(tensor):
        return True
    dual_level = forward_ad._current_level >= 0
    return dual_level and forward_ad.unpack_dual(tensor).tangent is not None


def key_of(tensors: Iterable[Tensor], *more: Hashable) -> tuple[Hashable, ...] | None:
    """What two calls must share to be checked and served alike.

    None where tensors are more than these facts: symbolic sizes, subclasses, function transforms.
    """
    if _transforming() or forward_ad._current_level >= 0:
        return None
    key: list[Hashable] = [*more, torch.is_grad_enabled()]
    try:
        for t in tensors:
            if type(t) not in PLAIN:
                return None
            key += (t.shape, t.dtype, t.device, t.stride(), t.requires_grad, t.layout,
                    t.is_neg(), t._is_zerotensor())  # fmt: skip
    except RuntimeError:  # a layout without sizes or strides, which the op's check names
        return None
    return tuple(key)


def unfit(metas: Iterable[TensorMeta], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why a kernel for these dtypes cannot take the tensors, or None."""
    for meta in metas:
        if meta.dtype not in dtypes:
            *others, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
            takes = f"{', '.join(others)} and {last}" if others else last
            return f"takes {takes}, not {str(meta.dtype).removeprefix('torch.')}"
    return None


def derivative(metas: Iterable[TensorMeta]) -> str | None:
    """Why only plain torch serves tensors that are differentiated or transformed, or None."""
    for meta in metas:
        if meta.requires_grad:
            return "has no backward, and an input requires grad"
        if meta.transformed:
            return "knows no function transform or forward-mode derivative, and an input has one"
    return None

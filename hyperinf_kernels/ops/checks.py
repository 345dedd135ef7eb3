"""Argument checks shared by the ops: one clear error that names the argument and its shape."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

# tensors of torch's own tracers, which stand for plain ones
TRACED = (FakeTensor, FunctionalTensor)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def show(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def floating(**tensors: Tensor) -> None:
    """Every argument is a floating-point tensor with numbers of its own, all on one device."""
    first = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        plain(name, tensor)
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {show(tensor)}")
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first[0]} is on {first[1].device}; "
                "move them to one device"
            )


def plain(name: str, tensor: Tensor) -> None:
    """The tensor is strided memory with one number per entry, on a device that has it."""
    if (remedy := unusual(tensor)) is not None:
        raise TypeError(f"{name} must be a plain tensor, got {remedy}")


def unusual(tensor: Tensor) -> str | None:
    """What makes a tensor unfit for kernels and the way out of it, or None."""
    kind = type(tensor)
    if tensor.is_nested:
        return "a nested one (pad it, or pass one row at a time)"
    if tensor.layout != torch.strided:
        return f"one of layout {str(tensor.layout).removeprefix('torch.')} (call .to_dense())"
    if tensor.device.type == "meta":
        return f"{show(tensor)}, which holds no numbers (load it first)"
    if not torch.compiler.is_compiling() and tensor._is_zerotensor():
        return "torch's immutable zero (call .clone())"
    if tensor.is_quantized:
        return "a quantised one (call .dequantize())"
    # its numbers are not in its own memory
    own_dispatch = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    if own_dispatch and not issubclass(kind, TRACED):
        return f"a {kind.__name__} (pass the tensor it wraps)"
    return None


def at_least(ndim: int, shape: str, **tensors: Tensor) -> None:
    """Every argument has at least `ndim` dimensions; `shape` is the expected form, in words."""
    for name, tensor in tensors.items():
        if tensor.ndim < ndim:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def agree(condition: bool, message: str, **tensors: Tensor) -> None:
    """Raise ValueError with every argument's shape unless `condition` holds."""
    if not condition:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"{message}; got {shapes}")


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any tensor is fp64, otherwise fp32: the dtype of every op's sums and result."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def accumulator(name: str, tensor: Tensor) -> None:
    """`tensor` can be accumulated into without losing small terms."""
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} accumulates and must be fp32 or fp64, got {show(tensor)}")
    if not torch.compiler.is_compiling() and tensor.is_neg():
        raise TypeError(f"{name} is a view with a pending sign; accumulate into .resolve_neg()")
    axes = zip(tensor.shape, tensor.stride(), strict=True)
    if any(size > 1 and step == 0 for size, step in axes):
        raise ValueError(
            f"{name} {tuple(tensor.shape)} is expanded, so its entries share memory and cannot be "
            "accumulated into; clone it first"
        )


def finite_matrices(name: str, matrices: Tensor) -> None:
    """Every matrix of the batch (..., p, q) is finite; the first that is not is named."""
    bad = ~torch.isfinite(matrices).flatten(-2).all(-1)
    if bool(bad.any()):
        index = tuple(torch.nonzero(bad)[0].tolist())
        where = f"{name}[{', '.join(map(str, index))}]" if index else name
        raise ValueError(f"{where} holds NaN or inf ({int(bad.sum())} of {bad.numel()} matrices)")

"""The compiled CUDA kernels behind the ops: which tensors they take, and how they are called.

Autocast does not change them: the inputs' dtypes decide, and sums are fp32. fp32 inputs are
multiplied in fp32 unless HYPERINF_TF32=1 asks for tensor cores; bf16 and fp16 inputs always use
them, which loses nothing since the products of such numbers are exact in fp32.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from . import reference
from .dispatch import TensorMeta, implements, unfit

FACTORS = (torch.float32, torch.bfloat16, torch.float16)
# Tiles of the kernels (csrc/include/hyperinf): sides of C's tiles in gfim.cuh. A strip of g is
# formed again for each tile it meets: 2 T / side of the work of the product itself.
GFIM_SIDE = 128
# every further matrix is read once per sample, from cache; forming g costs a write and a read
MOST_MATRICES = 8


def prefer_fused_gfim(tokens: int, side: int) -> bool:
    """Whether C (side, side) is summed without writing g: 4 T O I / 128 flop more, no memory.

    A single tile holds C up to 128 on a side, and forms g only once; beyond that each strip of g
    is formed for a row and a column of tiles. Computed, not measured: up to T = 128 the fused
    kernel spends at most twice the product's own flops on it.
    """
    return side <= GFIM_SIDE or tokens <= GFIM_SIDE


def _refuse(metas: tuple[TensorMeta, ...]) -> str | None:
    return unfit(metas, FACTORS)


def _refuse_gfim(metas: tuple[TensorMeta, ...]) -> str | None:
    if len(metas) == 2:
        return "one product of the gradients themselves is the vendor library's"
    if metas and metas[0].dtype != torch.float32:
        return f"sums are float32, not {str(metas[0].dtype)[6:]}"
    return _refuse(metas)


def _joined(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Leading dimensions joined into one, and the widest dtype of the tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]).to(dtype) for t in tensors)


@implements("per_sample_grad", "cuda", _refuse)
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    out = torch.ops.hyperinf.per_sample_grad(*_joined(delta, act))
    return out.reshape(*delta.shape[:-2], *out.shape[1:])


@implements("per_sample_norm_sq", "cuda", _refuse)
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    out = torch.ops.hyperinf.per_sample_norm_sq(*_joined(delta, act), ghost)
    return out.reshape(delta.shape[:-2])


@implements("per_sample_dot", "cuda", _refuse)
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor, ghost: bool) -> Tensor:
    lead = delta.shape[:-2]
    delta, act = _joined(delta, act)
    if len(V) <= MOST_MATRICES:
        out = torch.ops.hyperinf.per_sample_dot(delta, act, V.float().contiguous())
    else:
        rows = V.flatten(1).float().mT
        out = delta.new_empty(len(delta), len(V), dtype=torch.float32)
        for part in reference.slices(len(delta), V.shape[1] * V.shape[2]):
            formed = torch.ops.hyperinf.per_sample_grad(delta[part], act[part])
            torch.mm(formed.flatten(1), rows, out=out[part])
    return out.reshape(*lead, len(V))


@implements("gfim_accumulate_", "cuda", _refuse_gfim)
def gfim_accumulate_(
    C: Tensor, delta: Tensor, act: Tensor, *, side: str, alpha: float, fine: bool = True
) -> Tensor:
    del fine  # sums here are fp32
    lead = C.shape[:-2]
    # g_b g_b^T is the same sum with the factors exchanged
    rows, cols = (delta, act) if side == "cols" else (act, delta)
    rows, cols = (reference.apart(C, reference.samples(t, lead, 2)) for t in (rows, cols))
    if not prefer_fused_gfim(rows.shape[-2], cols.shape[-1]):
        return _accumulate_slices(C, rows, cols, alpha)
    for index in itertools.product(*map(range, lead)):
        torch.ops.hyperinf.gfim_accumulate_(C[index], *_joined(rows[index], cols[index]), alpha)
    return C


def _accumulate_slices(C: Tensor, rows: Tensor, cols: Tensor, alpha: float) -> Tensor:
    """The same with g formed for some samples at a time, and the vendor library's product."""
    numbers = math.prod(C.shape[:-2]) * rows.shape[-1] * cols.shape[-1]
    for part in reference.slices(rows.shape[-3], numbers):
        formed = per_sample_grad(rows[..., part, :, :], cols[..., part, :, :]).flatten(-3, -2)
        C.add_(formed.mT @ formed, alpha=alpha)
    return C

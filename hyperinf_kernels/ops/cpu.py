"""The compiled CPU kernels behind the ops: which tensors they take, and how they are called.

Autocast does not change them: the inputs' dtypes decide, and sums are fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from .dispatch import TensorMeta, implements

ROWS = (torch.float32, torch.bfloat16)
# measured: below these sizes torch's own products are as fast or faster
LEAST_SIDE = 32
LARGEST_SIDE, LARGEST_ALONE = 128, 64
MANY_QUERIES, SHORT_ROWS = 32, 1024


def _unsupported(metas: tuple[TensorMeta, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    for meta in metas:
        if meta.dtype not in dtypes:
            return f"takes {_names(dtypes)}, not {_names((meta.dtype,))}"
        if meta.requires_grad:
            return "has no backward, and an input requires grad"
    return None


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _refuse_sherman_morrison(metas: tuple[TensorMeta, ...]) -> str | None:
    V, G = metas[0], metas[min(1, len(metas) - 1)]
    if len(V.shape) > 1 and V.shape[-2] > MANY_QUERIES and V.shape[-1] < SHORT_ROWS:
        return f"over {MANY_QUERIES} queries on rows below {SHORT_ROWS} are faster in torch"
    if G.shape[-1] > 1 and G.stride[-1] != 1:
        return "rows of G must have unit stride"
    return _unsupported((V, G), ROWS)


@implements("sherman_morrison", "cpu", _refuse_sherman_morrison)
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    batch = math.prod(V.shape[:-2])
    out = torch.ops.hyperinf.sherman_morrison(
        V.reshape(batch, *V.shape[-2:]).float().contiguous(),
        G.reshape(batch, *G.shape[-2:]),
        lam.reshape(batch).contiguous(),
    )
    return out.reshape(V.shape)


def _refuse_sums(metas: tuple[TensorMeta, ...]) -> str | None:
    total, *rows = metas
    if min(total.shape[-2:]) < LEAST_SIDE:
        return f"sums below {LEAST_SIDE} on a side are as fast in torch"
    return _unsupported((total,), (torch.float32,)) or _unsupported(tuple(rows), ROWS)


@implements("gram_accumulate_", "cpu", _refuse_sums)
def gram_accumulate_(K: Tensor, G1: Tensor, G2: Tensor) -> Tensor:
    if G1 is G2:
        return _add_products(K, G1, None, 1.0)
    if G1.dtype != G2.dtype:
        G1, G2 = G1.float(), G2.float()
    return _add_products(K, G1, G2, 1.0)


@implements("gfim_accumulate_", "cpu", _refuse_sums)
def gfim_accumulate_(
    C: Tensor, grads: Tensor, act: Tensor | None = None, *, side: str, alpha: float
) -> Tensor:
    lead = C.shape[:-2]
    if act is None:
        stack = reference.samples(grads if side == "cols" else grads.mT, lead, 1)
        return _add_products(C, stack.mT, None, alpha)
    delta, act = (reference.samples(t, lead, 2) for t in (grads, act))
    for part in reference.slices(delta.shape[-3], delta.shape[-1] * act.shape[-1]):
        formed = reference.per_sample_grad(delta[..., part, :, :], act[..., part, :, :])
        gfim_accumulate_(C, formed, side=side, alpha=alpha)
    return C


def _add_products(C: Tensor, X: Tensor, Y: Tensor | None, alpha: float) -> Tensor:
    """C (..., n1, n2) += alpha X Y^T; without Y, X X^T."""
    batch = math.prod(C.shape[:-2])
    rows = [None if t is None else t.reshape(batch, *t.shape[-2:]) for t in (X, Y)]
    try:
        total = C.view(batch, *C.shape[-2:])
    except RuntimeError:
        # batch dimensions that are no single stride: sum aside, then add
        total = C.new_zeros(batch, *C.shape[-2:])
        torch.ops.hyperinf.gram_accumulate_(total, *rows, alpha)
        return C.add_(total.view(C.shape))
    torch.ops.hyperinf.gram_accumulate_(total, *rows, alpha)
    return C


def _refuse_spd_inverse(metas: tuple[TensorMeta, ...]) -> str | None:
    shape = metas[0].shape
    if shape[-1] > LARGEST_SIDE:
        return f"takes matrices up to {LARGEST_SIDE} on a side"
    if math.prod(shape[:-2]) == 1 and shape[-1] > LARGEST_ALONE:
        return f"one matrix over {LARGEST_ALONE} on a side is faster in torch"
    return _unsupported(metas[:1], (torch.float32,))


@implements("spd_inverse", "cpu", _refuse_spd_inverse)
def spd_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    flat = A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    inverse, info = torch.ops.hyperinf.spd_inverse(flat)
    return inverse.reshape(A.shape), info.reshape(A.shape[:-2])

"""The Triton kernels behind the ops: which tensors they take, and how they are called.

Nothing here imports Triton until a kernel runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..dispatch import Capability, TensorMeta, implements, unfit
from ..schedule import PRODUCTS, Step
from .configs import arch_for, choose, shown
from .factors import ROWS, prepared
from .launch import WORD, arch_of, l2_share, products_of, unit

LARGEST_ONCHIP, LARGEST_IN_REGISTERS = 128, 32
# 32-bit offsets inside one matrix
LARGEST_SIDE = 32768
# columns over rows from which the products of single gradients are small beside these
SHORT = 16
# below this half the tiles save less than mirroring costs
LEAST_SYMMETRIC = 512
LARGEST_K = 512  # entries of a top-k that one program sorts


def _refuse_schulz(metas: tuple[TensorMeta, ...]) -> str | None:
    if metas[0].shape[-1] > LARGEST_SIDE:
        return f"takes matrices up to {LARGEST_SIDE} on a side"
    return unfit(metas[:1], (torch.float32,))


def kernel_of(side: int) -> str:
    """The kernel that serves matrices of this side."""
    if side <= LARGEST_IN_REGISTERS:
        return "registers"
    return "resident" if side <= LARGEST_ONCHIP else "product"


def arithmetic(side: int, precision: str) -> str:
    """What the products run in when `precision` is allowed; tiny matrices gain nothing from it."""
    return "ieee" if kernel_of(side) == "registers" else precision


def _schulz_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    side = metas[0].shape[-1]
    kernel = kernel_of(side)
    return shown(choose(kernel, arch_for(machine.cuda), "ieee", side), variant=kernel)


@implements("schulz", "triton", _refuse_schulz, config=_schulz_config)
def schulz(A: Tensor, start: Tensor, steps: Sequence[Step]) -> tuple[Tensor, int]:
    """The chain of `reference.schulz`, without any host synchronisation."""
    return schulz_rounded(A, start, steps, "ieee")


@implements("schulz_rounded", "triton", _refuse_schulz, config=_schulz_config)
def schulz_rounded(
    A: Tensor, start: Tensor, steps: Sequence[Step], precision: str
) -> tuple[Tensor, int]:
    """The chain with operands rounded to `precision`, for matrices whose condition bears it."""
    from .schulz import packed, schulz_chain, schulz_onchip

    side, batch = A.shape[-1], math.prod(A.shape[:-2])
    flat = A.reshape(batch, side, side)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    coefficients, degrees = packed(steps, batch, A.device)
    scale = start.reshape(batch).contiguous()
    precision = arithmetic(side, precision)
    if side <= LARGEST_ONCHIP:
        X, _, _ = schulz_onchip(flat, scale, coefficients, degrees, 0.0, precision)
    else:
        # mirrored products lose the square of the condition number, which one pass keeps small
        symmetric = precision in ("tf32", "bf16") and side >= LEAST_SYMMETRIC
        mirrored = len(steps) - 1 if symmetric else 0
        chain = [step.degree for step in steps]
        X, _, _ = schulz_chain(flat, scale, coefficients, chain, 0.0, 0, precision, mirrored)
    # neither A X0 nor X0 Z is a product; on chip each step ends with the residual, the last one too
    free = 1 if side <= LARGEST_ONCHIP else 2
    products = sum(PRODUCTS[s.degree] for s in steps) - free * bool(steps)
    return X.reshape(A.shape), products


def _refuse_sherman_morrison(metas: tuple[TensorMeta, ...]) -> str | None:
    V, G = metas[0], metas[min(1, len(metas) - 1)]
    if G.shape[-1] > 1 and G.stride[-1] != 1:
        return "rows of G must have unit stride"
    return unfit((V, G), ROWS)


def _rows_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    queries = metas[0].shape[-2] if len(metas[0].shape) > 1 else 1
    precision = "ieee" if queries == 1 else "tf32x3"
    return shown(
        choose("rows_dots", arch_for(machine.cuda), precision, 1 if queries == 1 else 16),
        precision=precision,
    )


@implements("sherman_morrison", "triton", _refuse_sherman_morrison, config=_rows_config)
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    from .sherman_morrison import sherman_morrison as run

    batch = math.prod(V.shape[:-2])
    flat_V, flat_G = (t.reshape(batch, *t.shape[-2:]) for t in (V, G))
    flat_V = flat_V.float().contiguous()
    return run(flat_V, flat_G, lam.float().reshape(batch).contiguous()).reshape(V.shape)


def _refuse_sums(metas: tuple[TensorMeta, ...]) -> str | None:
    total, *rows = metas
    if max(total.shape[-2:], default=0) > LARGEST_SIDE:
        return f"takes sums up to {LARGEST_SIDE} on a side"
    return unfit((total,), (torch.float32,)) or unfit(rows, ROWS)


def _sums_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return _sums_as(products_of([meta.dtype for meta in metas[1:]]), metas, machine)


def _gfim_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    if len(metas) < 3:
        return _sums_config(metas, machine)
    # gradients are formed in fp32 whatever their factors are
    return _sums_as("tf32x3", metas, machine, variant="gradients in slices")


def _sums_as(
    precision: str, metas: tuple[TensorMeta, ...], machine: Capability, **more: Any
) -> Mapping[str, Any]:
    side = max(metas[0].shape[-2:], default=0)
    config = choose("accumulate", arch_for(machine.cuda), precision, side)
    return shown(config, precision=precision, **more)


@implements("gram_accumulate_", "triton", _refuse_sums, config=_sums_config)
def gram_accumulate_(K: Tensor, G1: Tensor, G2: Tensor, *, fine: bool = True) -> Tensor:
    del fine  # sums here are fp32
    return _add_products(K, G1.mT, G2.mT, 1.0, symmetric=G1 is G2)


def _refuse_rows(metas: tuple[TensorMeta, ...]) -> str | None:
    if max(max(meta.shape) for meta in metas) > LARGEST_SIDE:
        return f"takes up to {LARGEST_SIDE} rows and columns"
    return unfit(metas, ROWS)


@implements("row_dots", "triton", _refuse_rows)
def row_dots(V: Tensor, *_: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dots = V.new_zeros(sum(map(len, rows)), len(V), dtype=torch.float32)
    for part, place in zip(rows, dots.split([len(part) for part in rows]), strict=True):
        if place.numel():
            gram_accumulate_(place, part, V)
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=torch.float32) for part in rows]
    return dots.double(), torch.cat(norms).double().square()


@implements("span", "triton", _refuse_rows)
def span(
    V: Tensor, *_: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    W = a * V.float()
    for part, weights in zip(rows, B.float().split([len(part) for part in rows]), strict=True):
        if W.numel() and len(part):
            gram_accumulate_(W, weights.mT, part.mT)
    return W, torch.linalg.vector_norm(W, dim=1).double().square()


@implements("span_dots", "triton", _refuse_rows)
def span_dots(
    V: Tensor, *_: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    W, norms = span(V, rows=rows, B=B, a=a)
    return row_dots(W, rows=rows)[0], norms


@implements("gfim_accumulate_", "triton", _refuse_sums, config=_gfim_config)
def gfim_accumulate_(
    C: Tensor,
    grads: Tensor,
    act: Tensor | None = None,
    *,
    side: str,
    alpha: float,
    fine: bool = True,
) -> Tensor:
    del fine  # sums here are fp32
    lead = C.shape[:-2]
    if act is None and side == "rows" and SHORT * grads.shape[-2] <= grads.shape[-1]:
        # one product per sample: stacking the transposed gradients would copy all of them
        turned = reference.apart(C, reference.samples(grads, lead, 2)).mT
        each = C.new_zeros(*turned.shape[:-2], *C.shape[-2:])
        _add_products(each, turned, turned, 1.0, symmetric=True)
        return C.add_(each.sum(-3), alpha=alpha)
    if act is None:
        stack = reference.samples(grads if side == "cols" else grads.mT, lead, 1)
        return _add_products(C, stack, stack, alpha, symmetric=True)
    # g_b g_b^T is the same sum with the factors exchanged
    factors = (grads, act) if side == "cols" else (act, grads)
    rows, cols = (reference.samples(t, lead, 2) for t in factors)
    for index in itertools.product(*map(range, lead)):
        _add_formed(C[index], rows[index], cols[index], alpha)
    return C


def _add_formed(C: Tensor, rows: Tensor, cols: Tensor, alpha: float) -> None:
    """C (d, d) += alpha sum_b g_b^T g_b for g_b = rows_b^T cols_b, formed in slices."""
    from .grad import formed

    # where C alone leaves L2, fewer and larger slices read it less often
    in_l2 = C.numel() * WORD <= l2_share(arch_of(C))
    most = None if in_l2 else reference.SLICE_NUMBERS // max(1, rows.shape[-1] * cols.shape[-1])
    rows, cols = prepared(rows, cols)
    for _, grads in formed(rows, cols, most):
        stack = grads.flatten(0, 1)
        _add_products(C, stack, stack, alpha, symmetric=True)


def _add_products(C: Tensor, L: Tensor, R: Tensor, alpha: float, symmetric: bool) -> Tensor:
    """C (..., rows, cols) += alpha L^T R for L (..., depth, rows), R (..., depth, cols)."""
    from .accumulate import accumulate_

    batch = math.prod(C.shape[:-2])
    left, right = (reference.apart(C, t).reshape(batch, *t.shape[-2:]) for t in (L, R))
    precision = products_of([L.dtype, R.dtype])
    try:
        total = C.view(batch, *C.shape[-2:])
    except RuntimeError:
        # batch dimensions that are no single stride: sum aside, then add
        total = C.new_zeros(batch, *C.shape[-2:])
        accumulate_(total, left, right, alpha, precision, symmetric)
        return C.add_(total.view(C.shape))
    accumulate_(total, left, right, alpha, precision, symmetric)
    return C


def _refuse_topk(metas: tuple[TensorMeta, ...]) -> str | None:
    if metas[0].shape[-1] > LARGEST_K:
        return f"keeps up to {LARGEST_K} entries"
    # positions are int64 by the face's check
    return unfit((metas[0], *metas[2:]), (torch.float32,))


def _topk_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return shown(choose("topk", arch_for(machine.cuda), "ieee", metas[0].shape[-1]))


@implements("topk_merge_", "triton", _refuse_topk, config=_topk_config)
def topk_merge_(
    values: Tensor, positions: Tensor, scores: Tensor, first: int, largest: bool
) -> None:
    from .topk import topk_merge_ as run

    run(values, positions, unit(scores), first, largest)

"""The compiled CPU kernels behind the ops: which tensors they take, and how they are called.

Autocast does not change them: the inputs' dtypes decide, and sums are fp32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .adaptive import Facts
from .dispatch import TensorMeta, implements, unfit
from .schedule import FREE_FIRST_STEP, PRODUCTS, Step, packed_menu

ROWS = (torch.float32, torch.bfloat16)
SUMS = (torch.float32, torch.float64)
# measured: below these sizes torch's own products are as fast or faster
LEAST_SIDE = 32
LARGEST_SIDE, LARGEST_ALONE = 128, 64
MANY_QUERIES, SHORT_ROWS = 32, 1024
# measured: a slice of gradients that the next kernel still finds in cache
CACHED_NUMBERS = 1 << 20
# measured: that many matrices meet a tile of g in cache sooner than g as rows of a product
FEW_MATRICES = 16
COEFFICIENTS = 8
SKETCHED = 4  # probes of a compiled sketch


def _refuse_sherman_morrison(metas: tuple[TensorMeta, ...]) -> str | None:
    V, G = metas[0], metas[min(1, len(metas) - 1)]
    if len(V.shape) > 1 and V.shape[-2] > MANY_QUERIES and V.shape[-1] < SHORT_ROWS:
        return f"over {MANY_QUERIES} queries on rows below {SHORT_ROWS} are faster in torch"
    if G.shape[-1] > 1 and G.stride[-1] != 1:
        return "rows of G must have unit stride"
    return unfit((V, G), ROWS)


@implements("sherman_morrison", "cpu", _refuse_sherman_morrison)
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    flat = lam[None] if lam.ndim == 0 else lam.reshape(-1).contiguous()
    out = torch.ops.hyperinf.sherman_morrison(stacked(V).float().contiguous(), stacked(G), flat)
    return out if V.ndim == 3 else out.view_as(V)


def _refuse_rows(metas: tuple[TensorMeta, ...]) -> str | None:
    if any(meta.shape[-1] > 1 and meta.stride[-1] != 1 for meta in metas[1:]):
        return "rows must have unit stride"
    return unfit(metas, ROWS)


@implements("row_dots", "cpu", _refuse_rows)
def row_dots(V: Tensor, *_: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dots, norms = torch.ops.hyperinf.row_dots(list(rows), V.float().contiguous())
    return dots, norms


@implements("span", "cpu", _refuse_rows)
def span(
    V: Tensor, *_: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    W, norms = torch.ops.hyperinf.span(
        V.float().contiguous(), list(rows), B.float().contiguous(), float(a)
    )
    return W, norms


@implements("span_dots", "cpu", _refuse_rows)
def span_dots(
    V: Tensor, *_: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    dots, norms = torch.ops.hyperinf.span_dots(
        V.float().contiguous(), list(rows), B.float().contiguous(), float(a)
    )
    return dots, norms


def _refuse_factored(metas: tuple[TensorMeta, ...]) -> str | None:
    return unfit(metas[:3], ROWS)


@implements("sherman_morrison_factored", "cpu", _refuse_factored)
def sherman_morrison_factored(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    """The mean over slices of gradients, each formed and read again while it is in cache."""
    count, out = delta.shape[-3], torch.zeros(V.shape, dtype=torch.float32, device=V.device)
    flat, each = V.flatten(-2), math.prod(V.shape[:-3]) * V.shape[-2] * V.shape[-1]
    for part in reference.slices(count, each, CACHED_NUMBERS):
        rows = per_sample_grad(delta[..., part, :, :], act[..., part, :, :]).flatten(-2)
        share = rows.shape[-2] / count
        out += sherman_morrison(flat, rows, lam).view(V.shape).mul_(share)
    return out


def _refuse_sums(metas: tuple[TensorMeta, ...]) -> str | None:
    total, *rows = metas
    if min(total.shape[-2:]) < LEAST_SIDE:
        return f"sums below {LEAST_SIDE} on a side are as fast in torch"
    # fp64 sums take fp64 rows too, and lose nothing of fp32 ones
    wide = total.dtype == torch.float64
    return unfit((total,), SUMS) or unfit(tuple(rows), (*ROWS, torch.float64) if wide else ROWS)


@implements("gram_accumulate_", "cpu", _refuse_sums)
def gram_accumulate_(K: Tensor, G1: Tensor, G2: Tensor, *, fine: bool = True) -> Tensor:
    if G1 is G2:
        return _add_products(K, G1, None, 1.0, fine)
    G1, G2 = _alike(G1, G2)
    return _add_products(K, G1, G2, 1.0, fine)


@implements("gfim_accumulate_", "cpu", _refuse_sums)
def gfim_accumulate_(
    C: Tensor,
    grads: Tensor,
    act: Tensor | None = None,
    *,
    side: str,
    alpha: float,
    fine: bool = True,
) -> Tensor:
    lead = C.shape[:-2]
    if act is None:
        stack = reference.samples(grads if side == "cols" else grads.mT, lead, 1)
        return _add_products(C, stack.mT, None, alpha, fine)
    delta, act = (reference.samples(t, lead, 2) for t in (grads, act))
    form = (
        reference.per_sample_grad if torch.float64 in (delta.dtype, act.dtype) else per_sample_grad
    )
    for part in reference.slices(delta.shape[-3], delta.shape[-1] * act.shape[-1]):
        formed = form(delta[..., part, :, :], act[..., part, :, :])
        gfim_accumulate_(C, formed, side=side, alpha=alpha, fine=fine)
    return C


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the narrowest dtype that holds all of them."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def _add_products(
    C: Tensor, X: Tensor, Y: Tensor | None, alpha: float, fine: bool = True
) -> Tensor:
    """C (..., n1, n2) += alpha X Y^T; without Y, X X^T."""
    runs = not fine and C.dtype == torch.float64 and X.dtype != torch.float64
    rows = [None if t is None else stacked(reference.apart(C, t)) for t in (X, Y)]
    if C.ndim <= 3:
        torch.ops.hyperinf.gram_accumulate_(stacked(C), *rows, alpha, runs)
        return C
    batch = math.prod(C.shape[:-2])
    try:
        total = C.view(batch, *C.shape[-2:])
    except RuntimeError:
        # batch dimensions that are no single stride: sum aside, then add
        total = C.new_zeros(batch, *C.shape[-2:])
        torch.ops.hyperinf.gram_accumulate_(total, *rows, alpha, runs)
        return C.add_(total.view(C.shape))
    torch.ops.hyperinf.gram_accumulate_(total, *rows, alpha, runs)
    return C


def stacked(tensor: Tensor) -> Tensor:
    """(..., n, D) as (b, n, D), the tensor itself where it is that already."""
    if tensor.ndim == 3:
        return tensor
    return tensor[None] if tensor.ndim == 2 else tensor.flatten(0, -3)


def _refuse_sketch(metas: tuple[TensorMeta, ...]) -> str | None:
    probes, P = metas[0], metas[-1]
    if probes.shape[0 if probes.shape[-1] == P.shape[-1] else -1] != SKETCHED:
        return f"takes {SKETCHED} probes"
    if P.shape[-1] > 1 and P.stride[-1] != 1:
        return "rows must have unit stride"
    return unfit((probes,), (torch.float64,)) or unfit((P,), ROWS)


@implements("combine_rows", "cpu", _refuse_sketch)
def combine_rows(X: Tensor, P: Tensor) -> Tensor:
    return torch.ops.hyperinf.combine_rows(X.contiguous(), P)


@implements("image_rows", "cpu", _refuse_sketch)
def image_rows(Z: Tensor, P: Tensor) -> Tensor:
    return torch.ops.hyperinf.image_rows(Z.contiguous(), P)


def _refuse_row_sketch(metas: tuple[TensorMeta, ...]) -> str | None:
    X, *rows = metas
    if any(r.shape[-1] > 1 and r.stride[-1] != 1 for r in rows):
        return "rows must have unit stride"
    if len({r.dtype for r in rows}) > 1:
        return "rows must have one dtype"
    return unfit((X,), (torch.float64,)) or unfit(tuple(rows), ROWS)


@implements("row_sketch", "cpu", _refuse_row_sketch)
def row_sketch(X: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
    total, image = torch.ops.hyperinf.row_sketch(X.contiguous(), list(rows))
    return total, image


def _refuse_factors(metas: tuple[TensorMeta, ...]) -> str | None:
    return unfit(metas, ROWS)


def _factors(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(..., T, features) as (b, T, features) of one dtype, with unit column stride."""
    dtype = tensors[0].dtype
    for t in tensors:
        if t.ndim != 3 or t.dtype != dtype or t.stride()[2] != 1:
            break
    else:
        return tensors
    flat = map(stacked, _alike(*tensors))
    return tuple(t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous() for t in flat)


@implements("per_sample_grad", "cpu", _refuse_factors)
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    grads = torch.ops.hyperinf.per_sample_grad(*_factors(delta, act))
    return grads if delta.ndim == 3 else grads.view(*delta.shape[:-2], *grads.shape[-2:])


@implements("per_sample_norm_sq", "cpu", _refuse_factors)
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    norms = torch.ops.hyperinf.per_sample_norm_sq(*_factors(delta, act), ghost)
    return norms if delta.ndim == 3 else norms.view(delta.shape[:-2])


@implements("per_sample_dot", "cpu", _refuse_factors)
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor, ghost: bool) -> Tensor:
    # a tile of g costs as much as its ghost and stays in cache, so both methods run one kernel
    del ghost
    lead, count = delta.shape[:-2], V.shape[0]
    delta, act = _factors(delta, act)
    V = V.float().contiguous()
    if count <= FEW_MATRICES:
        out = torch.ops.hyperinf.per_sample_dot(delta, act, V)
        return out if len(lead) == 1 else out.view(*lead, count)
    out = torch.zeros(len(delta), len(V), dtype=torch.float32, device=V.device)
    for part in reference.slices(len(delta), V.shape[1] * V.shape[2]):
        rows = torch.ops.hyperinf.per_sample_grad(delta[part], act[part]).flatten(1)
        _add_products(out[part], rows, V.flatten(1), 1.0)
    return out.reshape(*lead, len(V))


@implements("pairwise_dot", "cpu", _refuse_factors)
def pairwise_dot(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor, ghost: bool) -> Tensor:
    factors = _factors(delta1, act1, delta2, act2)
    if delta1.ndim == 3:
        return torch.ops.hyperinf.pairwise_dot(*factors, ghost)
    lead, n1, n2 = delta1.shape[:-3], delta1.shape[-3], delta2.shape[-3]
    if math.prod(lead) == 1:
        return torch.ops.hyperinf.pairwise_dot(*factors, ghost).reshape(*lead, n1, n2)
    d1, a1, d2, a2 = (
        t.reshape(math.prod(lead), n, *t.shape[-2:])
        for t, n in zip(factors, (n1, n1, n2, n2), strict=True)
    )
    out = delta1.new_empty(len(d1), n1, n2, dtype=torch.float32)
    for i in range(len(d1)):
        out[i] = torch.ops.hyperinf.pairwise_dot(d1[i], a1[i], d2[i], a2[i], ghost)
    return out.reshape(*lead, n1, n2)


def _refuse_schulz(metas: tuple[TensorMeta, ...]) -> str | None:
    if metas[0].shape[-1] > LARGEST_SIDE:
        return f"takes matrices up to {LARGEST_SIDE} on a side"
    return unfit(metas[:1], (torch.float32,))


@implements("schulz", "cpu", _refuse_schulz)
def schulz(A: Tensor, start: Tensor, steps: Sequence[Step]) -> tuple[Tensor, int]:
    batch = math.prod(A.shape[:-2])
    X = torch.ops.hyperinf.schulz(
        A.reshape(batch, *A.shape[-2:]),
        start.reshape(batch).float().contiguous(),
        _coefficients(batch, steps),
        [step.degree for step in steps],
    )
    products = sum(PRODUCTS[step.degree] for step in steps) - (FREE_FIRST_STEP if steps else 0)
    return X.reshape(A.shape), products


def _coefficients(batch: int, steps: Sequence[Step]) -> Tensor:
    """Every step's coefficients, in the order in which the schedule names them."""
    table = torch.zeros(batch, len(steps), COEFFICIENTS, dtype=torch.float32, device="cpu")
    for k, step in enumerate(steps):
        for i, value in enumerate(step.coefficients.values()):
            table[:, k, i] = value.reshape(batch)
    return table


@implements("schulz_adaptive", "cpu", _refuse_schulz)
def schulz_adaptive(
    A: Tensor, V: Tensor | None, start: Tensor | None, steps: Sequence[Step], goal: float,
    budget: int, certify: bool,
) -> tuple[Tensor, Facts]:  # fmt: skip
    """A^-1 or V A^-1 of (B, d, d) and what is known of it, all of one matrix in cache."""
    scheduled = start is not None
    result, facts = torch.ops.hyperinf.schulz_adaptive(
        A,
        None if V is None else V.contiguous(),
        start.float().contiguous() if start is not None else None,
        _coefficients(len(A), steps) if scheduled else None,
        [step.degree for step in steps],
        packed_menu(),
        goal,
        budget,
        certify,
    )
    return result, Facts.of(facts)


def _refuse_spd_inverse(metas: tuple[TensorMeta, ...]) -> str | None:
    shape = metas[0].shape
    if shape[-1] > LARGEST_SIDE:
        return f"takes matrices up to {LARGEST_SIDE} on a side"
    if math.prod(shape[:-2]) == 1 and shape[-1] > LARGEST_ALONE:
        return f"one matrix over {LARGEST_ALONE} on a side is faster in torch"
    return unfit(metas[:1], (torch.float32,))


@implements("spd_inverse", "cpu", _refuse_spd_inverse)
def spd_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses, and LAPACK's info: -1 for what the face refuses, tested while A is in cache."""
    flat = A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:])
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    inverse, info = torch.ops.hyperinf.spd_inverse(flat, True)
    return inverse.reshape(A.shape), info.reshape(A.shape[:-2])

"""Every op in plain torch: the backend that always works, and the page to read first.

Shapes and dtypes are already checked by the op's face in this folder; `...` stands for any leading
batch dimensions. Half-precision inputs are widened before anything is summed. The formulas are
those of the op's docstring, written as one contraction each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .checks import TRACED, accumulation_dtype
from .dispatch import implements
from .schedule import Step

Product = Callable[[Tensor, Tensor], Tensor]

# per-sample gradients that are only reduced are formed in slices of at most this many numbers
SLICE_NUMBERS = 1 << 24
# products that are summed in fp32 before a fp64 sum takes over, where that is asked for
RUN = 768
WIDENED = 32  # rows taken to a wider dtype at a time: fresh memory costs more than the products


def slices(count: int, numbers_each: int, most: int | None = None) -> Iterator[slice]:
    """Slices of `count` samples that hold at most `most` (SLICE_NUMBERS) numbers, or one sample."""
    step = max(1, (SLICE_NUMBERS if most is None else most) // max(1, numbers_each))
    return (slice(start, start + step) for start in range(0, count, step))


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(*tensors)
    return tuple(t.to(dtype) for t in tensors)


@implements("per_sample_grad")
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    delta, act = _widen(delta, act)
    return delta.mT @ act


@implements("per_sample_norm_sq")
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    lead, (tokens, rows), cols = delta.shape[:-2], delta.shape[-2:], act.shape[-1]
    delta, act = samples(delta, torch.Size(), 2), samples(act, torch.Size(), 2)
    out = [delta.new_empty(0, dtype=accumulation_dtype(delta, act))]
    for part in slices(len(delta), tokens * tokens if ghost else rows * cols):
        d, a = _widen(delta[part], act[part])
        if ghost:
            # cancellation can leave a sum of squares slightly below zero
            out.append(((d @ d.mT) * (a @ a.mT)).sum((-2, -1)).clamp_min(0))
        else:
            out.append((d.mT @ a).square().sum((-2, -1)))
    return torch.cat(out).reshape(lead)


@implements("per_sample_dot")
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor, ghost: bool) -> Tensor:
    lead, (tokens, rows), cols = delta.shape[:-2], delta.shape[-2:], act.shape[-1]
    delta, act = samples(delta, torch.Size(), 2), samples(act, torch.Size(), 2)
    dtype = accumulation_dtype(delta, act, V)
    V = V.to(dtype)
    out = [V.new_empty(0, len(V))]
    for part in slices(len(delta), tokens * len(V) * rows if ghost else rows * cols):
        d, a = delta[part].to(dtype), act[part].to(dtype)
        if ghost:
            out.append(torch.einsum("btmo,bto->bm", torch.einsum("bti,moi->btmo", a, V), d))
        else:
            out.append((d.mT @ a).flatten(1) @ V.flatten(1).mT)
    return torch.cat(out).reshape(*lead, len(V))


@implements("pairwise_dot")
def pairwise_dot(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor, ghost: bool) -> Tensor:
    dtype = accumulation_dtype(delta1, act1, delta2, act2)
    lead, (samples, tokens, rows) = delta1.shape[:-3], delta1.shape[-3:]
    cols = act1.shape[-1]
    out = [delta1.new_empty(*lead, 0, delta2.shape[-3], dtype=dtype)]
    d2, a2 = delta2.to(dtype), act2.to(dtype)
    if ghost:
        d2, a2 = d2.unsqueeze(-4), a2.unsqueeze(-4)
    else:
        g2 = (d2.mT @ a2).flatten(-2)
    for part in slices(samples, tokens * act2.shape[-3] * act2.shape[-2] if ghost else rows * cols):
        d1, a1 = delta1[..., part, :, :].to(dtype), act1[..., part, :, :].to(dtype)
        if ghost:
            pairs = (d1.unsqueeze(-3) @ d2.mT) * (a1.unsqueeze(-3) @ a2.mT)
            out.append(pairs.sum((-2, -1)))
        else:
            out.append((d1.mT @ a1).flatten(-2) @ g2.mT)
    return torch.cat(out, -2)


@implements("gfim_accumulate_")
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
    if act is not None:
        dtype = accumulation_dtype(C, grads, act) if fine else accumulation_dtype(grads, act)
        delta, act = (samples(t, lead, 2).to(dtype) for t in (grads, act))
        for part in slices(delta.shape[-3], delta.shape[-1] * act.shape[-1]):
            formed = per_sample_grad(delta[..., part, :, :], act[..., part, :, :])
            gfim_accumulate_(C, formed, side=side, alpha=alpha, fine=fine)
        return C
    stack = samples(grads if side == "cols" else grads.mT, lead, 1)
    runs = _in_runs(C, stack, fine)
    for part in (
        slices(stack.shape[-2], 1, RUN) if runs else slices(stack.shape[-2], stack.shape[-1])
    ):
        rows = stack[..., part, :].to(
            accumulation_dtype(stack) if runs else accumulation_dtype(C, stack)
        )
        # alpha may leave fp32's range when squared gradients are tiny, so it multiplies the product
        C.add_(rows.mT @ rows, alpha=alpha)
    return C


def _in_runs(total: Tensor, rows: Tensor, fine: bool) -> bool:
    return not fine and total.dtype == torch.float64 and rows.dtype != torch.float64


def samples(tensor: Tensor, lead: torch.Size, keep: int) -> Tensor:
    """Join all dimensions between the batch's and the last `keep` ones."""
    if tensor.ndim == len(lead) + keep:
        return tensor.unsqueeze(len(lead))
    return tensor.flatten(len(lead), -1 - keep)


def apart(out: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, copied if it shares storage with `out`: kernels write one while they read both."""
    # traced tensors have no memory; the compiled op refuses what overlaps when it runs
    if torch.compiler.is_compiling() or isinstance(out, TRACED):
        return tensor
    tensor = tensor.resolve_neg()  # torch cannot do it for an op with an argument left out
    shared = out.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return tensor.clone() if shared else tensor


@implements("gram_accumulate_")
def gram_accumulate_(K: Tensor, G1: Tensor, G2: Tensor, *, fine: bool = True) -> Tensor:
    if _in_runs(K, G1, fine) and _in_runs(K, G2, fine):
        for part in slices(G1.shape[-1], 1, RUN):
            K.add_(G1[..., part].float() @ G2[..., part].float().mT)
        return K
    dtype = accumulation_dtype(K, G1, G2)
    return K.add_(G1.to(dtype) @ G2.to(dtype).mT)


@implements("combine_rows")
def combine_rows(X: Tensor, P: Tensor) -> Tensor:
    out = X.new_zeros(X.shape[1], P.shape[1])
    for part in slices(len(P), P.shape[1], 1 << 18):
        out.addmm_(X[part].mT, P[part].double())
    return out


@implements("image_rows")
def image_rows(Z: Tensor, P: Tensor) -> Tensor:
    out = torch.zeros_like(Z)
    for part in slices(len(P), P.shape[1], 1 << 18):
        rows = P[part].double()
        out.addmm_(Z @ rows.mT, rows)
    return out


SKETCHED = 256  # columns of rows in fp64 at a time, so that they stay in cache


@implements("row_sketch")
def row_sketch(X: Tensor, *rows: Tensor) -> tuple[Tensor, Tensor]:
    width, Xt = rows[0].shape[1], X.mT.contiguous()
    total, image = X.new_empty(len(Xt), width), torch.zeros_like(Xt)
    # fresh memory for every slice would cost more than the products
    held = X.new_empty(len(X), min(width, SKETCHED))
    for part in (slice(i, min(i + SKETCHED, width)) for i in range(0, width, SKETCHED)):
        P = held[:, : part.stop - part.start]
        for own, r in zip(P.split([len(r) for r in rows]), rows, strict=True):
            own.copy_(r[:, part])
        total[:, part] = Xt @ P
        image.addmm_(total[:, part], P.mT)
    return total, image.mT


@implements("sherman_morrison")
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    V, G, lam = _widen(V, G, lam)
    lam = lam[..., None, None]
    norm_sq = G.square().sum(-1)[..., None, :]
    weights = (V @ G.mT) / (lam + norm_sq)
    return (V - (weights @ G) / G.shape[-2]) / lam


@implements("sherman_morrison_factored")
def sherman_morrison_factored(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    V, delta, act, lam = _widen(V, delta, act, lam)
    lam, flat = lam[..., None, None], V.flatten(-2)
    total, count = torch.zeros_like(flat), delta.shape[-3]
    for part in slices(count, math.prod(V.shape[:-3]) * V.shape[-2] * V.shape[-1]):
        rows = (delta[..., part, :, :].mT @ act[..., part, :, :]).flatten(-2)
        weights = (flat @ rows.mT) / (lam + rows.square().sum(-1)[..., None, :])
        total += weights @ rows
    return ((flat - total / count) / lam).view(V.shape)


def _parts(rows: Sequence[Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A few rows at a time, widened where they must be, with their places among all rows."""
    start = 0
    for tensor in rows:
        same = tensor.dtype == dtype
        for part in tensor.split(max(1, len(tensor)) if same else WIDENED):
            yield slice(start, start + len(part)), part.to(dtype)
            start += len(part)


@implements("row_dots")
def row_dots(V: Tensor, *kinds: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(V, *kinds)
    dots, norms = [], []
    for _, part in _parts(rows, dtype):
        dots.append((part @ V.to(dtype).mT).double())
        norms.append(torch.linalg.vector_norm(part, dim=1).double().square())
    return torch.cat(dots), torch.cat(norms)


@implements("span")
def span(
    V: Tensor, *kinds: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(V, *kinds)
    total = torch.zeros_like(V, dtype=dtype)
    for place, part in _parts(rows, dtype):
        total.addmm_(B[place].to(dtype).mT, part)
    W = total.add_(V.to(dtype), alpha=a)
    return W, torch.linalg.vector_norm(W, dim=1, dtype=torch.float64).square()


@implements("span_dots")
def span_dots(
    V: Tensor, *kinds: Tensor, rows: Sequence[Tensor], B: Tensor, a: float
) -> tuple[Tensor, Tensor]:
    W, norms = span(V, *kinds, rows=rows, B=B, a=a)
    return row_dots(W, *kinds, rows=rows)[0], norms


@implements("spd_inverse")
def spd_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky inverse and, per matrix, LAPACK's info (0 when positive definite)."""
    factor, info = torch.linalg.cholesky_ex(A)
    if not bool((info > 0).any()):
        return torch.cholesky_inverse(factor), info
    # a failed factor may hold a zero pivot, on which the inverse raises for the whole batch
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    factor = torch.where((info > 0)[..., None, None], eye, factor)
    inverse = torch.cholesky_inverse(factor)
    return inverse.masked_fill((info > 0)[..., None, None], float("nan")), info


@implements("schulz")
def schulz(
    A: Tensor, start: Tensor, steps: Sequence[Step], product: Product = torch.matmul
) -> tuple[Tensor, int]:
    """Run the steps from X = start * I; returns X and the number of d x d products."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    scale = start[..., None, None]
    X, products = scale * eye, 0
    for k, step in enumerate(steps):
        R = eye - scale * A if k == 0 else eye - product(A, X)
        factor, spent = _chebyshev_factor(R, eye, step, product)
        X = scale * factor if k == 0 else product(X, factor)
        products += spent if k == 0 else spent + 2
    return X, products


def _chebyshev_factor(R: Tensor, eye: Tensor, step: Step, product: Product) -> tuple[Tensor, int]:
    """The factor Z with X' = X Z of one step of degree 2, 3, 5 or 9, and its products."""
    c = {name: value[..., None, None] for name, value in step.coefficients.items()}
    if step.degree == 2:
        return c["b0"] * eye + c["b1"] * R, 0
    R2 = product(R, R)
    if step.degree == 3:
        return eye + c["b1"] * (R + R2), 1
    if step.degree == 5:
        return eye + product(c["b1"] * eye + c["b3"] * R2, R + R2), 2
    Y = product(R2, c["c1"] * R2 + c["c2"] * R)
    Z = product(Y + c["d2"] * R2 + c["d1"] * R, Y + c["e2"] * R2)
    return Z + c["e0"] * Y + c["b2"] * R2 + c["b1"] * R + eye, 3


@implements("topk_merge_")
def topk_merge_(
    values: Tensor, positions: Tensor, scores: Tensor, first: int, largest: bool
) -> None:
    k = values.shape[1]
    new = torch.arange(first, first + scores.shape[1], dtype=torch.int64, device=scores.device)
    pool = torch.cat([values, scores], dim=1)
    where = torch.cat([positions, new.expand(len(scores), -1)], dim=1)
    # NaN sorts last; kept entries come first and the sort is stable, so earlier columns win ties
    order = torch.sort(-pool if largest else pool, dim=1, stable=True).indices[:, :k]
    values.copy_(pool.gather(1, order))
    positions.copy_(where.gather(1, order).masked_fill_(values.isnan(), -1))

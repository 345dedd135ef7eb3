"""Inverse and solve by Chebyshev-scaled Schulz iteration, with a measured fp64 residual."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks
from .ambient import exactly
from .bounds import lanczos, lower_estimate, upper_bound
from .iteration import Iterate, chain, finish
from .solve import (
    COARSE,
    SolveInfo,
    checked_matrices,
    cholesky_inverse64,
    frobenius,
    inverse_floor,
    inverse_residual,
    refuse_overflow,
    solve_info,
    zeros,
)

Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Bounds = tuple[float | Tensor, float | Tensor]

MAX_REFINEMENTS = 40
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@overload
def schulz_inverse(
    A: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ..., max_products: int = ...,
    precision: Precision = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def schulz_inverse(
    A: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ..., max_products: int = ...,
    precision: Precision = ..., return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...  # fmt: skip
@exactly
def schulz_inverse(
    A: Tensor,
    *,
    bounds: Bounds | None = None,
    tol: float | None = None,
    max_products: int = 64,
    precision: Precision = "ieee",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Inverse of symmetric positive definite matrices, `torch.linalg.inv(A)`, from products only.

    Chebyshev-scaled Schulz steps (see `schedule`), then coupled steps on the residual measured in
    fp64 while that misses what is asked. A matrix that cannot get there is inverted directly in
    fp64, and the info says which.

    Args:
        A: (..., d, d), fp16, bf16, fp32 or fp64.
        bounds: (lower, upper) of the spectrum, numbers or tensors of the batch's shape. With
            damping lam: lower = lam, upper = trace. None: from Lanczos steps, see `bounds`.
        tol: residual ||I - A X||_F / sqrt(d) to reach. None: as exact as the dtype allows, about
            unit roundoff times the condition number.
        max_products: dense products that any one matrix may cost before the direct solve.
        precision: the lowest arithmetic the chain may use. A matrix whose condition times the unit
            roundoff of that arithmetic is not below 1 (tf32: 2,048, bf16: 256) runs in its own
            dtype, as every matrix does from then on. Without such hardware it is emulated: slower.
        return_info: also return a `SolveInfo`.

    Returns:
        X (..., d, d) in fp32, or fp64 for fp64 input; with `return_info`, (X, info).

    Raises:
        ValueError: A is not square, symmetric, finite or positive definite; bad bounds or tol.
        TypeError: A is not a floating-point tensor.
    """
    A = checked_matrices(A, tol, precision, max_products)
    if A.numel() == 0:
        info = solve_info(A, "schulz", 0, 0, zeros(A), tol, zeros(A))
        return (A.clone(), info) if return_info else A.clone()
    lead, d = A.shape[:-2], A.shape[-1]
    scaled, scale, lower, upper = _scaled(A, bounds)
    eps = torch.finfo(A.dtype).eps
    goal = tol if tol is not None else eps
    # two products are kept back for the residual, before and after a fallback
    state = chain(scaled, lower, upper, max(goal, 1e-8), max_products - 2, precision)
    residual = finish(scaled, state, goal, max_products).reshape(lead)
    X = (state.X / scale[:, None, None].to(A.dtype)).reshape(*lead, d, d)
    reached = residual <= (tol if tol is not None else inverse_floor(A, X))
    fallback = None
    if not bool(reached.all()):
        direct = cholesky_inverse64(A, ~reached).to(A.dtype)
        X = X.masked_scatter((~reached)[..., None, None].expand_as(X), direct)
        fallback = (
            f"{int((~reached).sum())} of {reached.numel()} matrices missed "
            f"{_asked(tol)} after {int(state.products.max())} products (residual "
            f"{float(residual[~reached].max()):.2e}); inverted by Cholesky in fp64"
        )
        # in the scaled system, whose norms cannot leave the range of fp64
        _, measured = inverse_residual(scaled, X.reshape(-1, d, d).double() * scale[:, None, None])
        residual = measured.reshape(lead)
        state.products += (~reached).reshape(-1).long()
    refuse_overflow(X)
    if not return_info:
        return X
    limit = inverse_floor(A, X)
    info = _info(A, state, precision, residual, tol, limit, fallback, ~reached)
    return X, info


@overload
def schulz_solve(
    A: Tensor, V: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ...,
    max_products: int = ..., precision: Precision = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def schulz_solve(
    A: Tensor, V: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ...,
    max_products: int = ..., precision: Precision = ..., return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...  # fmt: skip
@exactly
def schulz_solve(
    A: Tensor,
    V: Tensor,
    *,
    bounds: Bounds | None = None,
    tol: float | None = None,
    max_products: int = 64,
    precision: Precision = "ieee",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """V A^-1 for symmetric positive definite A, `torch.linalg.solve(A, V, left=False)`.

    Dense Schulz products only until the residual of the inverse is 0.1, in fp32 where that can hold
    it; from there thin steps W <- W + (V - W A) X with fp64 residuals, which reach fp32 accuracy
    even at condition 1e6, and fp64 accuracy for fp64 input.

    Args:
        A: (..., d, d). V: (..., m, d), the same batch dimensions.
        bounds, max_products, precision, return_info: as in `schulz_inverse`.
        tol: residual ||V - W A||_F / ||V||_F to reach; None: as exact as the dtype allows.

    Returns:
        W (..., m, d) in fp32, or fp64 if any input is fp64; with `return_info`, (W, info).

    Raises:
        ValueError, TypeError: as in `schulz_inverse`; also when V does not fit A or is not finite,
            or W leaves the range of its dtype.
    """
    A = checked_matrices(A, tol, precision, max_products)
    checks.floating(A=A, V=V)
    checks.at_least(2, "(..., m, d)", V=V)
    checks.agree(
        V.shape[:-2] == A.shape[:-2] and V.shape[-1] == A.shape[-1],
        "V (..., m, d) must fit A (..., d, d)", V=V, A=A,
    )  # fmt: skip
    checks.finite_matrices("V", V)
    dtype = checks.accumulation_dtype(A, V)
    A, V = A.to(dtype), V.to(dtype)
    if A.numel() == 0 or V.numel() == 0:
        info = solve_info(A, "schulz", 0, 0, zeros(A), tol, zeros(A))
        return (V.clone(), info) if return_info else V.clone()
    lead = A.shape[:-2]
    scaled, scale, lower, upper = _scaled(A, bounds)
    # the fp64 residuals of the thin steps take away whatever fp32 leaves, if it contracts at all
    narrow = float((upper / lower).max()) * EPS32 < COARSE
    start = scaled.float() if narrow else scaled
    state = chain(start, lower, upper, COARSE, max_products, precision)
    A64, V64 = scaled.double(), V.reshape(-1, *V.shape[-2:]).double()
    # V / s too, lest the squares in its norm leave the range of fp64
    size = _power_of_two(torch.where(V64.any((-2, -1)), V64.abs().amax((-2, -1)), 1.0))
    V64 = V64 / size[:, None, None]
    W = _refine(A64, V64, state, tol or torch.finfo(dtype).eps, max_products)

    unit = (size / scale)[:, None, None]
    out = (W * unit).to(dtype)
    residual, floor = _judged(A64, V64, out.double() / unit, torch.finfo(dtype).eps)
    reached = residual <= (tol if tol is not None else floor)
    fallback = None
    if not bool(reached.all()):
        missed = ~reached
        inverse = cholesky_inverse64(A, missed.reshape(lead)) * scale[missed, None, None]
        direct = V64[missed] @ inverse
        direct = direct + (V64[missed] - direct @ A64[missed]) @ inverse
        out[missed] = (direct * unit[missed]).to(dtype)
        fallback = (
            f"{int(missed.sum())} of {reached.numel()} systems missed {_asked(tol)} "
            f"(residual {float(residual[missed].max()):.2e}); solved by Cholesky in fp64"
        )
        residual, floor = _judged(A64, V64, out.double() / unit, torch.finfo(dtype).eps)
    out = out.reshape(V.shape)
    refuse_overflow(out, "the solution of", "rescale A or V")
    if not return_info:
        return out
    info = _info(
        A, state, precision, residual.reshape(lead), tol, floor.reshape(lead), fallback,
        ~reached.reshape(lead),
    )  # fmt: skip
    return out, info


def _judged(A: Tensor, V: Tensor, W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """||V - W A||_F / ||V||_F per system, infinite where NaN, and what rounding W leaves of it."""
    norm = frobenius(V).clamp_min(torch.finfo(torch.float64).tiny)
    gain = A.abs().sum(-1).amax(-1) * frobenius(W) / norm
    residual = (frobenius(V - W @ A) / norm).nan_to_num(torch.inf)
    return residual, (8 * eps * (1 + gain)).nan_to_num(0.0).clamp_max(COARSE)


def _refine(A: Tensor, V: Tensor, state: Iterate, goal: float, budget: int) -> Tensor:
    """W with W A = V in fp64 (B, m, d), by thin steps and, where those stall, one more dense one.

    Updates `state`: its X, and the products and steps of each matrix.
    """
    # a thin step multiplies residuals by I - X A, which rounding can leave condition times farther
    # from 0 than the chain's I - A X; with X^T it is the transpose of that one
    X = state.X.double().mT.contiguous()
    norm = frobenius(V).clamp_min(torch.finfo(torch.float64).tiny)
    top = A.abs().sum(-1).amax(-1)
    W, best = V @ X, torch.full_like(norm, float("inf"))
    active = torch.ones_like(norm, dtype=torch.bool)
    for _ in range(MAX_REFINEMENTS):
        E = V - W @ A
        residual = frobenius(E) / norm
        stalled = residual > best / 2
        best = torch.minimum(best, residual)
        # above their floor thin steps stall only because X is too coarse
        floor = 2 * EPS64 * (1 + top * frobenius(W) / norm)
        coarse = stalled & (residual > floor) & (state.products + 2 <= budget)
        active &= (residual > goal / 4) & (~stalled | coarse)
        if not bool(active.any()):
            break
        coarse &= active
        if bool(coarse.any()):
            X[coarse] = 2 * X[coarse] - X[coarse] @ (A[coarse] @ X[coarse])
            state.products[coarse] += 2
            best[coarse] = float("inf")
        # each goes on until it is at rest itself, whatever the rest of the batch does
        W = torch.where(active[:, None, None], W + E @ X, W)
        state.steps += active.long()
    return W


def _scaled(A: Tensor, bounds: Bounds | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A / s as (B, d, d), s a power of two per matrix near its top, and the bounds of A / s.

    Exact, and no intermediate can then leave the range of fp32.
    """
    A64 = A.reshape(-1, *A.shape[-2:]).double()
    first = torch.ones(len(A64), dtype=torch.float64, device=A.device)
    if bounds is None:
        # squares of A's own entries could leave the range of fp64
        first = _power_of_two(A64.abs().amax((-2, -1)))
        A64 = A64 / first[:, None, None]
        ritz = lanczos(A64)
        lower, upper = lower_estimate(A64, ritz), upper_bound(A64, ritz=ritz)
    else:
        lower, upper = (b.reshape(-1) for b in _given(A, bounds))
    scale = _power_of_two(upper)
    scaled = (A64 / scale[:, None, None]).to(A.dtype)
    return scaled, first * scale, lower / scale, upper / scale


def _power_of_two(x: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(x)))


def _given(A: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    try:
        lower, upper = (
            torch.as_tensor(b, dtype=torch.float64, device=A.device).expand(A.shape[:-2])
            for b in bounds
        )
    except RuntimeError:
        raise ValueError(
            f"bounds must be numbers or tensors of the batch shape {tuple(A.shape[:-2])}, got "
            f"{[tuple(torch.as_tensor(b).shape) for b in bounds]}"
        ) from None
    if not bool(((lower > 0) & (lower <= upper) & torch.isfinite(upper)).all()):
        raise ValueError(f"bounds must satisfy 0 < lower <= upper < inf, got {bounds}")
    return lower, upper


def _info(
    A: Tensor, state: Iterate, precision: str, residual: Tensor, tol: float | None,
    floor: Tensor, fallback: str | None, replaced: Tensor,
) -> SolveInfo:  # fmt: skip
    lowered = state.lowered.reshape(A.shape[:-2])
    return solve_info(
        A, "schulz", int(state.products.max()), int(state.steps.max()), residual, tol, floor,
        fallback, precision=precision if bool(lowered.any()) else "ieee", lowered=lowered,
        replaced=replaced,
    )  # fmt: skip


def _asked(tol: float | None) -> str:
    return f"tol {tol:.1e}" if tol is not None else "the dtype's floor"

"""Inverse and solve by Chebyshev-scaled Schulz iteration, with a measured fp64 residual."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks
from .bounds import lower_estimate, upper_bound
from .dispatch import call, explain
from .schedule import FREE_FIRST_STEP, PRODUCTS, Step, plan_steps
from .solve import (
    COARSE,
    SolveInfo,
    checked_matrices,
    frobenius,
    inverse_floor,
    inverse_residual,
    refuse_indefinite,
    refuse_overflow,
    solve_info,
    zeros,
)
from .triton.entry import arithmetic

Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Bounds = tuple[float | Tensor, float | Tensor]

MAX_REFINEMENTS = 40
# unit roundoff of the operands times the condition number stays below 1
LARGEST_CONDITION = {"bf16": 256.0, "tf32": 2048.0}
# mirrored products lose the square of the condition number
LARGEST_MIRRORED = 1e3
EPS64 = torch.finfo(torch.float64).eps


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

    Chebyshev-scaled Schulz steps (see `schedule`), then plain steps while the residual, measured in
    fp64, still misses what is asked. A matrix that cannot get there is inverted directly in fp64,
    and the info says so.

    Args:
        A: (..., d, d), fp16, bf16, fp32 or fp64.
        bounds: (lower, upper) of the spectrum, numbers or tensors of the batch's shape. With
            damping lam: lower = lam, upper = trace. None: estimated.
        tol: residual ||I - A X||_F / sqrt(d) to reach. None: as exact as the dtype allows, about
            unit roundoff times the condition number.
        max_products: dense products to spend at most before the direct solve.
        precision: the lowest arithmetic the products may use, raised where the condition number
            does not bear it; plain torch always runs "ieee".
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
    lower, upper = _bounds(A, bounds)
    eps = torch.finfo(A.dtype).eps
    start, steps = plan_steps(lower, upper, tol if tol is not None else max(eps, 1e-8))
    # two products are kept back for the residual, before and after a fallback
    steps = _within(steps, max_products - 2)
    permitted = _permitted(lower, upper, precision)
    X, products = call("schulz", (A,), start.to(A.dtype), _in_dtype(steps, A.dtype), **permitted)
    R, residual = inverse_residual(A, X)
    products += 1
    iterations = len(steps)
    goal = tol if tol is not None else eps
    active = (residual > goal) & (residual < 1)
    while bool(active.any()) and products + 2 < max_products:
        X_next = torch.where(active[..., None, None], X + X @ R.to(X.dtype), X)
        R_next, residual_next = inverse_residual(A, X_next)
        products, iterations = products + 2, iterations + 1
        better = residual_next < residual
        X = torch.where(better[..., None, None], X_next, X)
        R = torch.where(better[..., None, None], R_next, R)
        # far from the solution residuals shrink slowly; near it, anything short of halving is noise
        improving = residual_next < torch.where(residual > COARSE, residual, residual / 2)
        residual = torch.where(better, residual_next, residual)
        active &= improving & (residual > goal)
    reached = residual <= (tol if tol is not None else inverse_floor(A, X))
    fallback = None
    if not bool(reached.all()):
        direct = _cholesky_inverse64(A, ~reached).to(A.dtype)
        X = X.masked_scatter((~reached)[..., None, None].expand_as(X), direct)
        fallback = (
            f"{int((~reached).sum())} of {reached.numel()} matrices missed "
            f"{_asked(tol)} after {products} products (residual "
            f"{float(residual[~reached].max()):.2e}); inverted by Cholesky in fp64"
        )
        _, residual = inverse_residual(A, X)
        products += 1
    refuse_overflow(X)
    if not return_info:
        return X
    limit = inverse_floor(A, X)
    info = solve_info(A, "schulz", products, iterations, residual, tol, limit, fallback)
    return X, replace(info, precision=_precision_run(A, permitted))


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

    Dense Schulz products only until the residual of the inverse is 0.1; from there thin steps
    W <- W + (V - W A) X with fp64 residuals, which reach fp32 accuracy even at condition 1e6.

    Args:
        A: (..., d, d). V: (..., m, d), the same batch dimensions.
        bounds, max_products, precision, return_info: as in `schulz_inverse`.
        tol: residual ||V - W A||_F / ||V||_F to reach; None: as exact as the dtype allows.

    Returns:
        W (..., m, d) in fp32, or fp64 if any input is fp64; with `return_info`, (W, info).

    Raises:
        ValueError, TypeError: as in `schulz_inverse`; also when V does not fit A or is not finite.
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
    lower, upper = _bounds(A, bounds)
    start, steps = plan_steps(lower, upper, COARSE)
    steps = _within(steps, max_products)
    permitted = _permitted(lower, upper, precision)
    X, products = call("schulz", (A,), start.to(dtype), _in_dtype(steps, dtype), **permitted)

    eps = torch.finfo(dtype).eps
    A64, V64, X64 = A.double(), V.double(), X.double()
    norm = frobenius(V64).clamp_min(torch.finfo(torch.float64).tiny)
    W, best = V64 @ X64, torch.full_like(norm, float("inf"))
    refinements = 0
    for _ in range(MAX_REFINEMENTS):
        E = V64 - W @ A64
        residual = frobenius(E) / norm
        slow = residual > best / 2
        best = torch.minimum(best, residual)
        floor64 = 2 * EPS64 * (1 + upper * frobenius(W) / norm)
        unfinished = residual > (tol or eps) / 4
        if not bool(unfinished.any()):
            break
        if bool((slow & unfinished).any()):
            # above their floor thin steps stall only because X is too coarse
            at_floor = bool((residual <= floor64)[slow & unfinished].all())
            if at_floor or products + 2 > max_products:
                break
            X64 = 2 * X64 - X64 @ (A64 @ X64)
            products, best = products + 2, torch.full_like(best, float("inf"))
        W, refinements = W + E @ X64, refinements + 1
    out = W.to(dtype)
    residual = frobenius(V64 - out.double() @ A64) / norm
    top = A64.abs().sum(-1).amax(-1)
    floor = (8 * eps * (1 + top * frobenius(W) / norm)).clamp_max(COARSE)
    reached = residual <= (tol if tol is not None else floor)
    fallback = None
    if not bool(reached.all()):
        inverse = _cholesky_inverse64(A, ~reached)
        direct = V64[~reached] @ inverse
        direct = direct + (V64[~reached] - direct @ A64[~reached]) @ inverse
        out = out.masked_scatter((~reached)[..., None, None].expand_as(out), direct.to(dtype))
        fallback = (
            f"{int((~reached).sum())} of {reached.numel()} systems missed {_asked(tol)} "
            f"(residual {float(residual[~reached].nan_to_num(torch.inf).max()):.2e}); "
            "solved by Cholesky in fp64"
        )
        residual = frobenius(V64 - out.double() @ A64) / norm
    if not return_info:
        return out
    iterations = len(steps) + refinements
    info = solve_info(A, "schulz", products, iterations, residual, tol, floor, fallback)
    return out, replace(info, precision=_precision_run(A, permitted))


def _bounds(A: Tensor, bounds: Bounds | None) -> tuple[Tensor, Tensor]:
    A64 = A.double()
    if bounds is None:
        return lower_estimate(A64), upper_bound(A64)
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


def _permitted(lower: Tensor, upper: Tensor, precision: str) -> dict[str, Any]:
    """The cheapest products, up to what the caller allows, that these bounds bear."""
    condition = float((upper / lower).max())
    if condition > LARGEST_CONDITION.get(precision, math.inf):
        bears_tf32 = precision == "bf16" and condition <= LARGEST_CONDITION["tf32"]
        precision = "tf32" if bears_tf32 else "tf32x3"
    return {"precision": precision, "symmetric": condition <= LARGEST_MIRRORED}


def _precision_run(A: Tensor, permitted: dict[str, Any]) -> str:
    if explain("schulz", A).backend != "triton":
        return "ieee"
    return arithmetic(A.shape[-1], permitted["precision"])


def _within(steps: list[Step], max_products: int) -> list[Step]:
    spent, kept = -FREE_FIRST_STEP, []
    for step in steps:
        spent += PRODUCTS[step.degree]
        if spent > max_products:
            break
        kept.append(step)
    return kept


def _in_dtype(steps: list[Step], dtype: torch.dtype) -> list[Step]:
    return [Step(s.degree, {k: c.to(dtype) for k, c in s.coefficients.items()}) for s in steps]


def _cholesky_inverse64(A: Tensor, chosen: Tensor) -> Tensor:
    """fp64 inverses of the chosen matrices of the batch."""
    factor, info = torch.linalg.cholesky_ex(A[chosen].double())
    failed = torch.zeros_like(chosen)
    failed[chosen] = info > 0
    refuse_indefinite(failed, "Cholesky fails in fp64")
    return torch.cholesky_inverse(factor)


def _asked(tol: float | None) -> str:
    return f"tol {tol:.1e}" if tol is not None else "the dtype's floor"

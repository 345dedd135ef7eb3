"""Inverse and solve by Chebyshev-scaled Schulz iteration, each matrix with its certificate."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks
from .ambient import exactly
from .inverses import direct_where, first_inverse, measured
from .solve import (
    Check,
    SolveInfo,
    checked_shape,
    no_info,
    refuse_overflow,
    refuse_unfit,
)
from .thin import solved

Precision = Literal["ieee", "tf32x3", "tf32", "bf16"]
Bounds = tuple[float | Tensor, float | Tensor]


@overload
def schulz_inverse(
    A: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ..., max_products: int = ...,
    precision: Precision = ..., check: Check = ..., return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def schulz_inverse(
    A: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ..., max_products: int = ...,
    precision: Precision = ..., check: Check = ..., return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...  # fmt: skip
@exactly
def schulz_inverse(
    A: Tensor,
    *,
    bounds: Bounds | None = None,
    tol: float | None = None,
    max_products: int = 64,
    precision: Precision = "ieee",
    check: Check = "bound",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Inverse of symmetric positive definite matrices, `torch.linalg.inv(A)`, from products only.

    Chebyshev-scaled Schulz steps (see `schedule`), chosen from the bounds or, without any, step by
    step (see `adaptive`). A matrix whose certificate misses what is asked goes on with coupled
    steps on residuals measured in fp64; one that cannot get there is inverted directly in fp64, and
    the info says which.

    Args:
        A: (..., d, d), fp16, bf16, fp32 or fp64.
        bounds: (lower, upper) of the spectrum, numbers or tensors of the batch's shape. With
            damping lam: lower = lam, upper = trace. None: none are needed, save that a lower
            `precision` takes them from Lanczos steps, see `bounds`.
        tol: residual ||I - A X||_F / sqrt(d) to reach. None: as exact as the dtype allows, about
            unit roundoff times the condition number.
        max_products: dense products that any one matrix may cost before the direct solve.
        precision: the lowest arithmetic the chain may use. A matrix whose condition times the unit
            roundoff of that arithmetic is not below 1 (tf32: 2,048, bf16: 256) runs in its own
            dtype, as every matrix does from then on. Without such hardware it is emulated: slower.
        check: how the residual is known. "bound": what the last step's I - A X and three norms say
            of the result, and four fp64 probes where that misses what was asked; "full": measured
            in fp64, a product more; "off": nothing is claimed.
        return_info: also return a `SolveInfo`.

    Returns:
        X (..., d, d) in fp32, or fp64 for fp64 input; with `return_info`, (X, info).

    Raises:
        ValueError: A is not square, symmetric, finite or positive definite; bad options.
        TypeError: A is not a floating-point tensor.
    """
    A = checked_shape(A, tol, precision, max_products, check)
    if A.numel() == 0:
        return (A.clone(), no_info(A, "schulz", check)) if return_info else A.clone()
    lead, d = A.shape[:-2], A.shape[-1]
    flat = A.reshape(-1, d, d)
    run = first_inverse(flat, given(A, bounds), tol, max_products, precision, check)
    if not bool(run.facts.fit.all()):
        refuse_unfit(A)
    fallback = None
    if check == "full":
        measured(flat, run)
    reached = run.reached(tol, check)
    if not bool(reached.all()):
        reached = run.finished(flat, ~reached, tol, max_products)
        fallback = direct_where(flat, run, ~reached, tol, lead)
        refuse_overflow(run.X.reshape(A.shape))
    X = run.X.reshape(A.shape)
    if not return_info:
        return X
    return X, run.info(A, tol, precision, check, fallback, ~reached)


@overload
def schulz_solve(
    A: Tensor, V: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ...,
    max_products: int = ..., precision: Precision = ..., check: Check = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def schulz_solve(
    A: Tensor, V: Tensor, *, bounds: Bounds | None = ..., tol: float | None = ...,
    max_products: int = ..., precision: Precision = ..., check: Check = ...,
    return_info: Literal[True],
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
    check: Check = "bound",
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
        check: "off" claims nothing. A thin residual in fp64 costs next to nothing, so both "bound"
            and "full" measure that of what is delivered.

    Returns:
        W (..., m, d) in fp32, or fp64 if any input is fp64; with `return_info`, (W, info).

    Raises:
        ValueError, TypeError: as in `schulz_inverse`; also when V does not fit A or is not finite,
            or W leaves the range of its dtype.
    """
    A = checked_shape(A, tol, precision, max_products, check)
    checks.floating(A=A, V=V)
    checks.at_least(2, "(..., m, d)", V=V)
    checks.agree(
        V.shape[:-2] == A.shape[:-2] and V.shape[-1] == A.shape[-1],
        "V (..., m, d) must fit A (..., d, d)", V=V, A=A,
    )  # fmt: skip
    dtype = checks.accumulation_dtype(A, V)
    A, V = A.to(dtype), V.to(dtype)
    if A.numel() == 0 or V.numel() == 0:
        if A.numel():
            refuse_unfit(A)
        return (V.clone(), no_info(A, "schulz", check)) if return_info else V.clone()
    run, fallback, replaced = solved(A, V, given(A, bounds), tol, max_products, precision, check)
    W = run.X.reshape(V.shape)
    return (W, run.info(A, tol, precision, check, fallback, replaced)) if return_info else W


def given(A: Tensor, bounds: Bounds | None) -> tuple[Tensor, Tensor] | None:
    """The bounds (B,) in fp64 of every matrix of the batch."""
    if bounds is None:
        return None
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
    return lower.reshape(-1), upper.reshape(-1)

"""The ways to W = V A^-1 for a GFIM plus damping: each returns W in fp64 and how it went.

V is (q, d) in fp64, A (d, d) in fp64 and symmetric positive definite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import gram_accumulate_, schulz_solve
from ..ops.bounds import lanczos, lower_estimate, upper_bound
from .report import precision_of

EPS64 = torch.finfo(torch.float64).eps
REFINEMENTS = 3
ROUNDING = 8 * EPS64  # of fp64 sums and factors, generously
CG_STEPS = 2000


@dataclass(frozen=True)
class Solved:
    """W (q, d) with what it cost: dense products or factorisations, steps, a fallback's reason."""

    W: Tensor
    products: int = 1
    iterations: int = 0
    precision: str = "fp64"
    backend: str = "torch"
    fallback: str | None = None


def factor(name: str, A: Tensor, n: int, lam: float) -> Tensor:
    """Lower Cholesky factor of A.

    Raises:
        InputError: A is singular, by the block's name.
    """
    lower, info = torch.linalg.cholesky_ex(A)
    pivots = lower.diagonal().square()
    # without damping a singular matrix can pass by rounding luck, so its pivots are judged
    lucky = float(pivots.min()) <= 64 * len(A) * EPS64 * float(pivots.max())
    if int(info) > 0 or (lam <= 0 and lucky):
        raise InputError(
            f"block {name}: the GFIM of {n} samples plus damping {lam:g} is singular; add damping"
        )
    return lower


def direct(lower: Tensor, V: Tensor) -> Solved:
    """By a Cholesky factor."""
    return Solved(torch.cholesky_solve(V.mT, lower).mT)


def schulz(
    A: Sequence[Tensor], V: Sequence[Tensor], lams: Sequence[float], tol: float | None
) -> list[Solved]:
    """By Chebyshev-scaled Schulz steps, in one batched call for blocks of equal size.

    The damping bounds each spectrum below, unless Lanczos steps see that it begins higher; trace,
    norms and Lanczos steps bound it above.
    """
    stack, damping = (
        torch.stack(list(A)),
        torch.tensor(lams, dtype=torch.float64, device=A[0].device),
    )
    ritz = lanczos(stack)
    upper = upper_bound(stack, damping, ritz)
    lower = torch.minimum(torch.maximum(damping, lower_estimate(stack, ritz)), upper)
    if tol is None:
        # what fp64 residuals can hold at this condition, and no tighter than W's rounding needs
        worst = float((upper / damping).max())
        tol = min(1e-3, max(1e-8, 64 * EPS64 * worst))
    W, info = schulz_solve(
        stack, torch.stack(list(V)), bounds=(lower, upper), tol=tol, return_info=True
    )
    return [
        Solved(
            W[i], info.products, info.iterations, "fp32 and fp64", info.backend,
            info.fallback if bool(info.replaced[i]) else None,
        )
        for i in range(len(A))
    ]  # fmt: skip


def dual(rows: Tensor, n: int, lam: float, V: Tensor) -> Solved:
    """By the Gram matrix of the rows Y (n r, d) behind C = Y^T Y / n, where n r < d.

    (Y^T Y / n + lam I)^-1 = (1 / lam) [I - Y^T (n lam I + Y Y^T)^-1 Y]. The difference cancels
    where lam is small, so W is refined against residuals of A itself until they are at rest.
    """
    lower, Y = dual_factor(rows, n, lam), rows.double()

    def solve(E: Tensor) -> Tensor:
        return (E - torch.cholesky_solve((E @ Y.mT).mT, lower).mT @ Y) / lam

    W, steps = solve(V), 0
    norm, last = V.norm(), float("inf")
    for _ in range(REFINEMENTS):
        E = V - dual_product(Y, n, lam, W)
        size = float(E.norm() / norm) if norm else 0.0
        if not size < last / 2 or size < EPS64:
            break
        W, last, steps = W + solve(E), size, steps + 1
    return Solved(W, iterations=steps)


def dual_factor(rows: Tensor, n: int, lam: float) -> Tensor:
    """Lower Cholesky factor F of n lam I + Y Y^T, in fp64, for `dual_half`.

    Raises:
        InputError: it is not positive definite.
    """
    Y = rows.double()
    K = Y @ Y.mT
    K.diagonal().add_(n * lam)
    lower, info = torch.linalg.cholesky_ex(K)
    if lam <= 0 or int(info) > 0:
        raise InputError(f"the dual needs a positive damping, got {lam:g}")
    return lower


def row_space_scores(rows: Tensor, n: int, lam: float, V: Tensor) -> tuple[Tensor, float]:
    """-<V A^-1, g_k> (m, n) for the samples behind rows Y (n r, d), where n r < d, without W.

    V A^-1 Y^T = n V Y^T (Y Y^T + n lam I)^-1, in which nothing cancels however small lam is; scores
    are its traces over pairs of samples. With it a bound of the worst query's relative error: what
    fp64 rounding in Y Y^T and V Y^T can do.
    """
    (m, r, _), (count, _) = V.shape, rows.shape
    K = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    gram_accumulate_(K, rows)
    size, trace = float(K.norm()), float(K.diagonal().sum())
    K.diagonal().add_(n * lam)
    L = torch.zeros(m * r, count, dtype=torch.float64, device=rows.device)
    gram_accumulate_(L, V.flatten(0, 1), rows)
    cross = n * direct(torch.linalg.cholesky(K), L).W
    S = -cross.view(m, r, count // r, r).diagonal(dim1=1, dim2=3).sum(-1)
    lengths = [torch.linalg.vector_norm(t.reshape(m, -1), dim=1) for t in (cross, V.double(), S)]
    gain = (size + n * lam) / (n * lam)
    errors = ROUNDING * (gain * lengths[0] + lengths[1] * math.sqrt(trace) / lam)
    ratios = torch.where(lengths[2] > 0, errors * math.sqrt(r) / lengths[2], 0.0)
    return S, float(ratios.max())


def dual_half(rows: Tensor, n: int, lam: float, lower: Tensor, V: Tensor) -> Tensor:
    """V B (q, d) with B B^T = A^-1, without a d x d matrix.

    B = (I - Y^T F^-T (F + sqrt(n lam) I)^-1 Y) / sqrt(lam), Andrews' square root of 1968 (AIAA J.
    6:1165). It loses the square root of A's condition, not the condition, to cancellation.
    """
    Y = rows.double()
    shifted = lower.clone()
    shifted.diagonal().add_(math.sqrt(n * lam))
    T = torch.linalg.solve_triangular(lower.mT, V @ Y.mT, upper=True, left=False)
    T = torch.linalg.solve_triangular(shifted, T, upper=False, left=False)
    return (V - T @ Y) / math.sqrt(lam)


def dual_product(rows: Tensor, n: int, lam: float, W: Tensor) -> Tensor:
    """W (Y^T Y / n + lam I) without forming the d x d matrix."""
    Y = rows.double()
    return lam * W + (W @ Y.mT) @ Y / n


def cg(product: Callable[[Tensor], Tensor], V: Tensor, tol: float) -> Solved:
    """By conjugate gradients, each row of V stopped at a residual of `tol`."""
    W, R = torch.zeros_like(V), V
    P = R
    rho = R.square().sum(1, keepdim=True)
    goal, steps = rho * tol**2, 0
    while steps < CG_STEPS and bool((rho > goal).any()):
        active = rho > goal
        image = product(P)
        alpha = torch.where(active, rho / (P * image).sum(1, keepdim=True), 0)
        W, R = W + alpha * P, R - alpha * image
        fresh = R.square().sum(1, keepdim=True)
        P = torch.where(active, R + fresh / rho * P, P)
        rho = torch.where(active, fresh, rho)
        steps += 1
    missed = int((rho > goal).sum())
    note = f"{missed} rows are not at {tol:.0e} after {steps} steps" if missed else None
    return Solved(W, products=0, iterations=steps, fallback=note)


def both(V: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """A_r^-1 V A_c^-1 for V (m, r, d) from the lower Cholesky factors of both sides."""
    left = torch.cholesky_solve(V, rows.expand(len(V), *rows.shape))
    return torch.cholesky_solve(left.mT, cols.expand(len(V), *cols.shape)).mT


def half(x: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
    """F_r^-1 x F_c^-T for x (B, r, d) and the Cholesky factors of the sides that are given."""
    if cols is not None:
        x = torch.linalg.solve_triangular(cols, x.mT, upper=False).mT
    return x if rows is None else torch.linalg.solve_triangular(rows, x, upper=False)


def released(A: Tensor, V: Tensor, lam: float, start: float, iterations: int) -> Solved:
    """V X_k by the published loop: X = start I, k times X <- X (2 I - A X), in A's dtype."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    X = start * eye
    for _ in range(iterations):
        X = X @ (2 * eye - A @ X)
    note = None
    # diagonal entries lie between the extreme eigenvalues, and the trace bounds the largest
    reach = start * lam * 2.0**iterations
    if not bool(torch.isfinite(X).all()):
        high = start * float(A.diagonal().sum())
        note = f"start * mu reaches at most {high:.1e}; the iteration diverges above 2"
    elif reach < 1:
        note = (
            f"not converged: start * 2^{iterations} * lambda = {reach:.1e}, "
            "directions below 1 are scaled, not inverted"
        )
    W = V.to(A.dtype) @ X
    return Solved(W, 2 * iterations, iterations, precision_of(A.dtype), fallback=note)

"""The dense part of a Schulz inverse: the scheduled chain, in the arithmetic that is safe, and the
coupled steps that finish it, each matrix of the batch with its own fate.

All matrices here are (B, d, d) and scaled to a top eigenvalue near 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import call
from .rounding import ROUNDOFF
from .schedule import FREE_FIRST_STEP, PRODUCTS, Step, plan_steps
from .solve import COARSE, frobenius, inverse_residual

RESTART = 4  # coupled steps drift; after so many R = I - A X is formed anew
GROWN = 0.7  # spectral residual of a lowered start above which it has failed
POWER_STEPS = 8
HELD = 16  # roundoffs of the top below which a chain in this arithmetic aims at no eigenvalue


@dataclass
class Iterate:
    """Inverses under way, with what each matrix has cost so far.

    Attributes:
        X: (B, d, d). products, steps: (B,) dense products and Schulz steps spent.
        lowered: (B,) True where the chain ran in the low precision that was asked for.
    """

    X: Tensor
    products: Tensor
    steps: Tensor
    lowered: Tensor


def safe(condition: Tensor, precision: str) -> Tensor:
    """Where a start in `precision` leaves a residual below 1: condition x unit roundoff < 1."""
    if precision == "ieee":
        return torch.zeros_like(condition, dtype=torch.bool)
    return condition * ROUNDOFF[precision] < 1


def chain(
    A: Tensor, lower: Tensor, upper: Tensor, target: float, budget: int, precision: str
) -> Iterate:
    """The cheapest Chebyshev chain that brings every residual to `target` in exact arithmetic.

    A matrix whose condition allows it starts in `precision`, down to the residual that this
    precision can hold; where its residual has grown all the same, and everywhere else, the chain
    runs in A's own dtype. There a `lower` under 16 eps `upper` is raised to that: rounding moves
    the eigenvalues of I - A X by about eps times the condition aimed at, and past 1 Chebyshev
    polynomials grow. What lies below ends with a residual under 1, for later steps.
    """
    state = Iterate(
        X=torch.zeros_like(A),
        products=torch.zeros(len(A), dtype=torch.long, device=A.device),
        steps=torch.zeros(len(A), dtype=torch.long, device=A.device),
        lowered=torch.zeros(len(A), dtype=torch.bool, device=A.device),
    )
    low = safe(upper / lower, precision)
    if bool(low.any()):
        floor = float((upper / lower)[low].max()) * ROUNDOFF[precision]
        # rounding moves eigenvalues past the bound, where Chebyshev polynomials grow fastest
        wide = upper[low] * (1 + 64 * ROUNDOFF[precision])
        start, steps = plan_steps(lower[low], wide, min(0.3, max(target, floor)))
        steps = within_budget(steps, budget - 1)
        X, spent = call("schulz_rounded", (A[low].float(),), *as_dtype(start, steps, torch.float32),
                        precision)  # fmt: skip
        R, _ = inverse_residual(A[low], X)
        state.X[low] = X.to(A.dtype)
        state.products[low] += spent + 1
        state.steps[low] += len(steps)
        state.lowered[low] = _spectral(R) < GROWN
    high = ~state.lowered
    if bool(high.any()):
        least = HELD * torch.finfo(A.dtype).eps * upper
        start, steps = plan_steps(torch.maximum(lower, least)[high], upper[high], target)
        steps = within_budget(steps, budget - int(state.products[high].max()))
        state.X[high], spent = call("schulz", (A[high],), *as_dtype(start, steps, A.dtype))
        state.products[high] += spent
        state.steps[high] += len(steps)
    return state


def finish(A: Tensor, state: Iterate, goal: float, budget: int) -> Tensor:
    """Coupled steps X <- X (I + R), R <- R^2 until the measured residual is at `goal` or at rest.

    Every round starts from R = I - A X in fp64, so that a round in fp32 or after a low precision
    refines what the chain has left, and takes at most `RESTART` steps. Updates `state`; returns
    the residuals ||I - A X||_F / sqrt(d), infinite where NaN.
    """
    R, residual = inverse_residual(A, state.X)
    state.products += 1
    active = (residual > goal) & (residual < 1)
    while True:
        # one product of a round is its certificate, one is kept back for a direct solve's
        active &= state.products + 3 <= budget
        if not bool(active.any()):
            return residual
        left = budget - 2 - int(state.products[active].max())
        X, spent, steps = _coupled(state.X[active], R[active], goal, left)
        R_next, residual_next = inverse_residual(A[active], X)
        before = residual[active]
        better = residual_next < before
        # far from the solution residuals shrink slowly; near it, short of halving is noise
        improving = residual_next < torch.where(before > COARSE, before, before / 2)
        state.products[active] += spent + 1
        state.steps[active] += steps
        state.X[active] = torch.where(better[:, None, None], X, state.X[active])
        R[active] = torch.where(better[:, None, None], R_next, R[active])
        residual[active] = torch.where(better, residual_next, before)
        active[active.clone()] = improving & (residual_next > goal)


def _coupled(X: Tensor, R: Tensor, goal: float, left: int) -> tuple[Tensor, int, int]:
    """One round; R holds I - A X of the given X. Returns X, products and steps.

    X R and R^2 share their right factor and are one product of twice the rows; R^2 gives the next
    residual for nothing, and is not formed where its norm is known to be small enough.
    """
    size, spent = math.sqrt(R.shape[-1]), 0
    norm = float(frobenius(R).max())
    R = R.to(X.dtype)
    for step in range(1, RESTART + 1):
        if step == RESTART or norm**2 <= goal * size or spent + 3 > left:
            return X + X @ R, spent + 1, step
        both = torch.cat([X, R], -2) @ R
        X, R = X + both[..., : X.shape[-2], :], both[..., X.shape[-2] :, :]
        spent += 2
        norm = float(frobenius(R.double()).max())
        if norm <= goal * size or not math.isfinite(norm):
            break
    return X, spent, step


def _spectral(R: Tensor) -> Tensor:
    """||R||_2 per matrix by power steps, from below and close enough to see growth."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    v = torch.randn(R.shape[-1], 1, generator=generator, dtype=R.dtype, device="cpu").to(R.device)
    v = v.expand(*R.shape[:-1], 1)
    norm = torch.zeros(R.shape[:-2], dtype=R.dtype, device=R.device)
    for _ in range(POWER_STEPS):
        v = v / v.norm(dim=-2, keepdim=True)
        v = R @ v
        norm = v.norm(dim=-2).squeeze(-1)
    return norm.nan_to_num(torch.inf)


def within_budget(steps: list[Step], budget: int) -> list[Step]:
    """The first steps that cost at most so many products."""
    spent, kept = -FREE_FIRST_STEP, []
    for step in steps:
        spent += PRODUCTS[step.degree]
        if spent > budget:
            break
        kept.append(step)
    return kept


def as_dtype(start: Tensor, steps: list[Step], dtype: torch.dtype) -> tuple[Tensor, list[Step]]:
    """Scalars in the dtype of the products."""
    cast = [Step(s.degree, {k: c.to(dtype) for k, c in s.coefficients.items()}) for s in steps]
    return start.to(dtype), cast

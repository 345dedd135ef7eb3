"""Solves V A^-1: a Schulz inverse that is coarse, and thin steps on residuals in fp64."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .adaptive import Facts, coarse
from .dispatch import call, explain
from .inverses import Run, asked, power_of_two, scaled_to
from .iteration import HELD, Iterate, as_dtype, chain, within_budget
from .norms import norms_of
from .schedule import Step, plan_steps
from .solve import (
    COARSE,
    MEASURED,
    cholesky_inverse64,
    frobenius,
    refuse_overflow,
    refuse_unfit,
)

MAX_REFINEMENTS = 40
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
Bounds = tuple[Tensor, Tensor]


def solved(
    A: Tensor, V: Tensor, bounds: Bounds | None, tol: float | None, budget: int, precision: str,
    check: str,
) -> tuple[Run, str | None, Tensor]:  # fmt: skip
    """W with W A = V (..., m, d), a fallback's reason, and where it replaced the result (B,)."""
    lead, d = A.shape[:-2], A.shape[-1]
    flat, rows = A.reshape(-1, d, d), V.reshape(-1, V.shape[-2], d)
    if precision == "ieee" and explain("schulz", A).backend == "cpu":
        run = _fused(flat, rows, bounds, tol, budget, check != "off")
        # one reading says whether all is well; what is not is named by the slower tests
        if not bool((run.facts.fit & torch.isfinite(run.facts.residual)).all()):
            refuse_unfit(A)
            checks.finite_matrices("V", V)
    else:
        refuse_unfit(A)
        checks.finite_matrices("V", V)
        if precision == "ieee" and bounds is None and A.device.type == "cpu":
            W, facts = call("schulz_adaptive", (flat, rows), None, [], tol or 0.0, budget, False)
            run = Run(W, facts, torch.zeros(len(flat), dtype=torch.bool, device=A.device))
        else:
            run = composed(flat, rows, bounds, tol, budget, precision)
    missed = ~(run.facts.residual <= (tol if tol is not None else run.facts.floor))
    fallback = None
    if bool(missed.any()):
        fallback = _direct(flat, rows, run, missed, tol, lead)
    if fallback or run.X.dtype == torch.float64:
        refuse_overflow(run.X.reshape(V.shape), "the solution of", "rescale A or V")
    return run, fallback, missed


def _fused(
    A: Tensor, V: Tensor, bounds: Bounds | None, tol: float | None, budget: int, certify: bool
) -> Run:
    """All of one system in cache."""
    lowered = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    start, scale = None, None
    steps: list[Step] = []
    if bounds is not None:
        A, scale, lower, upper = scaled_to(A, bounds)
        least = HELD * EPS32 * upper
        start, steps = plan_steps(torch.maximum(lower, least), upper, COARSE)
        start, steps = as_dtype(start, within_budget(steps, budget - 2), A.dtype)
    W, facts = call("schulz_adaptive", (A, V), start, steps, tol or 0.0, budget, certify)
    if scale is not None:
        W = (W / scale[:, None, None]).to(W.dtype)
        whole = torch.isfinite(W).flatten(1).all(1)
        facts = facts._replace(residual=torch.where(whole, facts.residual, torch.inf))
    return Run(W, facts, lowered)


def composed(
    A: Tensor, V: Tensor, bounds: Bounds | None, tol: float | None, budget: int, precision: str
) -> Run:
    """A coarse X by dense products, then `_refine`."""
    if bounds is None and precision == "ieee" and A.device.type == "cpu":
        scaled, scale, state = _coarse(A, V.shape[-2], budget)
    else:
        state = None
    if state is None:
        scaled, scale, lower, upper = scaled_to(A, bounds)
        # fp64 residuals of thin steps take away whatever fp32 leaves, if it contracts at all
        narrow = float((upper / lower).max()) * EPS32 < COARSE
        begin = scaled.float() if narrow else scaled
        state = chain(begin, lower, upper, COARSE, budget, precision)
    A64, V64 = scaled.double(), V.double()
    # V / s too, lest the squares in its norm leave the range of fp64
    size = power_of_two(torch.where(V64.any((-2, -1)), V64.abs().amax((-2, -1)), 1.0))
    V64 = V64 / size[:, None, None]
    eps = torch.finfo(A.dtype).eps
    top = norms_of(scaled).rows
    W = _refine(A64, V64, top, state, tol or eps, budget)
    unit = (size / scale)[:, None, None]
    out = (W * unit).to(A.dtype)
    residual, floor = _judged(A64, V64, out.double() / unit, top, eps)
    known = torch.full_like(state.products, MEASURED, dtype=torch.int8)
    fit = torch.ones_like(state.lowered)
    return Run(out, Facts(fit, residual, known, floor, state.products, state.steps), state.lowered)


def _coarse(A: Tensor, m: int, budget: int) -> tuple[Tensor, Tensor, Iterate | None]:
    """An X without bounds, in fp32; none where that cannot hold it."""
    scale = power_of_two(norms_of(A).largest)
    scaled = (A / scale[:, None, None]).to(A.dtype)
    # measured: a thin step reads A and X, as long as 128 rows of a product take
    thin = max(3 * m, 128) / A.shape[-1]
    X, near, products, steps = coarse(scaled.float(), thin, budget)
    if not bool(near.all()):
        return scaled, scale, None
    count = torch.full((len(A),), products, dtype=torch.long, device=A.device)
    lowered = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    return scaled, scale, Iterate(X, count, torch.full_like(count, steps), lowered)


def _judged(A: Tensor, V: Tensor, W: Tensor, top: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """||V - W A||_F / ||V||_F per system, infinite where NaN, and what rounding W leaves of it."""
    norm = frobenius(V).clamp_min(torch.finfo(torch.float64).tiny)
    gain = top * frobenius(W) / norm
    residual = (frobenius(V - W @ A) / norm).nan_to_num(torch.inf)
    return residual, (8 * eps * (1 + gain)).nan_to_num(0.0).clamp_max(COARSE)


def _refine(A: Tensor, V: Tensor, top: Tensor, state: Iterate, goal: float, budget: int) -> Tensor:
    """W with W A = V in fp64 (B, m, d), by thin steps and, where those stall, one more dense one.

    Updates `state`: its X, and the products and steps of each matrix.
    """
    # a thin step multiplies residuals by I - X A, which rounding can leave condition times farther
    # from 0 than the chain's I - A X; with X^T it is the transpose of that one
    X = state.X
    norm = frobenius(V).clamp_min(torch.finfo(torch.float64).tiny)
    W, best = (V.to(X.dtype) @ X.mT).double(), torch.full_like(norm, float("inf"))
    active = torch.ones_like(norm, dtype=torch.bool)
    for _ in range(MAX_REFINEMENTS):
        E = V - W @ A
        residual = frobenius(E) / norm
        stalled = residual > best / 2
        best = torch.minimum(best, residual)
        # above their floor thin steps stall only because X is too coarse
        floor = 2 * EPS64 * (1 + top * frobenius(W) / norm)
        again = stalled & (residual > floor) & (state.products + 2 <= budget)
        active &= (residual > goal / 4) & (~stalled | again)
        again &= active
        going, dense = torch.stack([active.any(), again.any()]).tolist()
        if not going:
            break
        if dense:
            X = X.double().clone() if X.dtype != torch.float64 else X
            X[again] = 2 * X[again] - X[again] @ (A[again] @ X[again])
            state.products[again] += 2
            best[again] = float("inf")
        # each goes on until it is at rest itself, whatever the rest of the batch does
        W = torch.where(active[:, None, None], W + (E.to(X.dtype) @ X.mT).double(), W)
        state.steps += active.long()
    return W


def _direct(
    A: Tensor, V: Tensor, run: Run, missed: Tensor, tol: float | None, lead: torch.Size
) -> str:
    """Solutions by Cholesky in fp64 where the steps missed, and why."""
    chosen = missed.nonzero()[:, 0]
    worst = float(run.facts.residual[chosen].max())
    scale = power_of_two(norms_of(A[chosen]).largest)[:, None, None]
    A64, V64 = A[chosen].double() / scale, V[chosen].double()
    size = power_of_two(torch.where(V64.any((-2, -1)), V64.abs().amax((-2, -1)), 1.0))
    V64 = V64 / size[:, None, None]
    inverse = cholesky_inverse64(A.reshape(*lead, *A.shape[1:]), missed.reshape(lead)) * scale
    W = V64 @ inverse
    W = W + (V64 - W @ A64) @ inverse
    unit = size[:, None, None] / scale
    out = (W * unit).to(A.dtype)
    run.X = run.X.index_copy(0, chosen, out)
    eps = torch.finfo(A.dtype).eps
    residual, floor = _judged(A64, V64, out.double() / unit, norms_of(A64).rows, eps)
    facts = run.facts
    run.note(chosen, residual, floor, facts.products[chosen], facts.steps[chosen])
    return (
        f"{len(chosen)} of {len(A)} systems missed {asked(tol)} (residual {worst:.2e}); solved by "
        "Cholesky in fp64"
    )

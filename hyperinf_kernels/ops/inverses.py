"""The first result of a Schulz inverse, and what becomes of matrices whose certificate misses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adaptive import Facts, complete
from .bounds import lanczos, lower_estimate, upper_bound
from .dispatch import call, explain
from .iteration import HELD, Iterate, as_dtype, chain, finish, within_budget
from .norms import norms_of
from .schedule import plan_steps
from .solve import (
    MEASURED,
    SolveInfo,
    cholesky_inverse64,
    inverse_floor,
    inverse_residual,
    solve_info,
    within,
)

CHEAPEST_CHAIN = 10  # products below which a second chain is not begun


@dataclass
class Run:
    """Results (B, ...) of a batch with what is known of them; `lowered` as in `SolveInfo`."""

    X: Tensor
    facts: Facts
    lowered: Tensor

    def reached(self, tol: float | None, check: str) -> Tensor:
        """Where the result may be delivered as it is."""
        facts = self.facts
        if check == "off" and tol is None:
            return facts.fit & torch.isfinite(facts.residual)
        limit = tol if tol is not None else facts.floor
        return facts.fit & within(facts.residual, facts.known, limit)

    def finished(self, A: Tensor, missed: Tensor, tol: float | None, budget: int) -> Tensor:
        """Coupled steps on fp64 residuals where the certificate missed; then where it is met."""
        facts, done = self.facts, ~missed
        # one product measures, one is kept back for a direct result
        chosen = (missed & (facts.products + 2 <= budget)).nonzero()[:, 0]
        sub = A[chosen]
        state = Iterate(
            self.X[chosen], facts.products[chosen], facts.steps[chosen], self.lowered[chosen]
        )
        eps = torch.finfo(A.dtype).eps
        residual = finish(sub, state, tol if tol is not None else eps, budget)
        self.X = self.X.index_copy(0, chosen, state.X)
        floor = inverse_floor(sub, state.X)
        self.note(chosen, residual, floor, state.products, state.steps)
        done[chosen] = residual <= (tol if tol is not None else floor)
        return done

    def note(
        self, chosen: Tensor, residual: Tensor, floor: Tensor, products: Tensor, steps: Tensor
    ) -> None:
        """Take in what was measured of the chosen matrices."""
        facts = self.facts
        known = torch.full_like(chosen, MEASURED, dtype=facts.known.dtype)
        self.facts = facts._replace(
            residual=facts.residual.index_copy(0, chosen, residual),
            known=facts.known.index_copy(0, chosen, known),
            floor=facts.floor.index_copy(0, chosen, floor),
            products=facts.products.index_copy(0, chosen, products),
            steps=facts.steps.index_copy(0, chosen, steps),
        )

    def info(
        self, A: Tensor, tol: float | None, precision: str, check: str, fallback: str | None,
        replaced: Tensor,
    ) -> SolveInfo:  # fmt: skip
        facts = self.facts
        products, steps = torch.stack([facts.products, facts.steps]).amax(1).tolist()
        return solve_info(
            A, "schulz", products, steps, facts.residual, facts.known, tol, facts.floor, check,
            fallback, precision=precision if bool(self.lowered.any()) else "ieee",
            lowered=self.lowered, replaced=replaced,
        )  # fmt: skip


def first_inverse(
    A: Tensor, bounds: tuple[Tensor, Tensor] | None, tol: float | None, budget: int,
    precision: str, check: str,
) -> Run:  # fmt: skip
    """Inverses of A (B, d, d) by one chain, and what that chain knows of them.

    A product of the budget is kept back for a direct result.
    """
    if precision != "ieee":
        return _lowered(A, bounds, tol, budget, precision)
    certify = check == "bound"
    goal, budget = tol or 0.0, budget - 1
    plain = torch.zeros(len(A), dtype=torch.bool, device=A.device)
    fused = explain("schulz", A).backend == "cpu"
    if bounds is None and (fused or A.device.type == "cpu"):
        X, facts = call("schulz_adaptive", (A,), None, None, [], goal, budget, certify)
        run = Run(X, facts, plain)
        lost = facts.fit & ~torch.isfinite(facts.residual)
        if bool(lost.any()):
            _planned(A, run, lost.nonzero()[:, 0], tol, budget)
        return run
    eps = torch.finfo(A.dtype).eps
    if bounds is None:
        # one launch for all that fp32 can hold, whatever the condition
        norms = norms_of(A)
        upper = torch.where(norms.fit(), norms.top() * (1 + 64 * eps), 1.0)
        bounds = HELD * eps * upper, upper
    scaled, scale, lower, upper = scaled_to(A, bounds)
    target = max(tol if tol is not None else eps, 1e-8)
    start, steps = plan_steps(torch.maximum(lower, HELD * eps * upper), upper, target)
    start, steps = as_dtype(start, within_budget(steps, budget - 1), A.dtype)
    if fused:
        X, facts = call("schulz_adaptive", (scaled,), None, start, steps, goal, budget, certify)
    else:
        X, spent = call("schulz", (scaled,), start, steps)
        X, facts = complete(scaled, X, spent, len(steps), goal, budget, certify)
    return Run((X / scale[:, None, None]).to(A.dtype), facts, plain)


def _planned(A: Tensor, run: Run, chosen: Tensor, tol: float | None, budget: int) -> None:
    """Where steps chosen one by one did not get there: a chain for bounds from Lanczos steps."""
    left = budget - int(run.facts.products[chosen].max())
    if left < CHEAPEST_CHAIN:
        return
    again = _lowered(A[chosen], None, tol, left, "ieee")
    run.X = run.X.index_copy(0, chosen, again.X)
    facts = again.facts
    run.note(
        chosen, facts.residual, facts.floor, run.facts.products[chosen] + facts.products,
        facts.steps,
    )  # fmt: skip


def _lowered(
    A: Tensor, bounds: tuple[Tensor, Tensor] | None, tol: float | None, budget: int, precision: str
) -> Run:
    """By a chain that starts in a low precision where it may, finished on fp64 residuals."""
    norms = norms_of(A)
    if not bool(norms.fit().all()):
        nothing = torch.zeros(len(A), dtype=torch.float64, device=A.device)
        count = nothing.long()
        facts = Facts(norms.fit(), nothing, count.to(torch.int8), nothing, count, count)
        return Run(A, facts, norms.fit())
    scaled, scale, lower, upper = scaled_to(A, bounds)
    goal = tol if tol is not None else torch.finfo(A.dtype).eps
    # two products are kept back for the residual, before and after a fallback
    state = chain(scaled, lower, upper, max(goal, 1e-8), budget - 2, precision)
    residual = finish(scaled, state, goal, budget)
    X = (state.X / scale[:, None, None]).to(A.dtype)
    known = torch.full_like(state.products, MEASURED, dtype=torch.int8)
    facts = Facts(norms.fit(), residual, known, inverse_floor(A, X), state.products, state.steps)
    return Run(X, facts, state.lowered)


def measured(A: Tensor, run: Run) -> None:
    """Every residual in fp64."""
    everything = torch.arange(len(A), device=A.device)
    _, residual = inverse_residual(A, run.X)
    facts = run.facts
    run.note(everything, residual, inverse_floor(A, run.X), facts.products + 1, facts.steps)


def direct_where(
    A: Tensor, run: Run, missed: Tensor, tol: float | None, lead: torch.Size
) -> str | None:
    """Cholesky inverses in fp64 where a chain missed, and why; None where none did."""
    if not bool(missed.any()):
        return None
    chosen, facts = missed.nonzero()[:, 0], run.facts
    worst = float(facts.residual[chosen].max())
    direct = cholesky_inverse64(A.reshape(*lead, *A.shape[1:]), missed.reshape(lead)).to(A.dtype)
    run.X = run.X.index_copy(0, chosen, direct)
    spent = int(facts.products.max())
    _, residual = inverse_residual(A[chosen], direct)
    run.note(
        chosen, residual, inverse_floor(A[chosen], direct), facts.products[chosen] + 1,
        facts.steps[chosen],
    )  # fmt: skip
    return (
        f"{len(chosen)} of {len(A)} matrices missed {asked(tol)} after {spent} products (residual "
        f"{worst:.2e}); inverted by Cholesky in fp64"
    )


def scaled_to(
    A: Tensor, bounds: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A / s for A (B, d, d), s a power of two per matrix near its top, and the bounds of A / s.

    Exact, and no intermediate can then leave the range of fp32.
    """
    A64 = A.double()
    first = torch.ones(len(A64), dtype=torch.float64, device=A.device)
    if bounds is None:
        # squares of A's own entries could leave the range of fp64
        first = power_of_two(A64.abs().amax((-2, -1)))
        A64 = A64 / first[:, None, None]
        ritz = lanczos(A64)
        lower, upper = lower_estimate(A64, ritz), upper_bound(A64, ritz=ritz)
    else:
        lower, upper = bounds
    scale = power_of_two(upper)
    scaled = (A64 / scale[:, None, None]).to(A.dtype)
    return scaled, first * scale, lower / scale, upper / scale


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below each number."""
    return torch.exp2(torch.floor(torch.log2(x)))


def asked(tol: float | None) -> str:
    """What was asked, in words."""
    return f"tol {tol:.1e}" if tol is not None else "the dtype's floor"

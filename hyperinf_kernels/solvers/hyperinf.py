"""HyperINF: the generalized Fisher (GFIM) of each block, inverted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.costs import rates_of
from . import routes
from .base import BlockState, Solver
from .damping import DEFAULT_DAMPING, Damping
from .directions import Direction, Sight, norms, rounded, spread
from .gfim import Gfim, Side
from .inputs import Gradients
from .options import at_least_one, not_negative, positive, positive_or_none
from .planning import (
    ROUTES,
    SolvePlan,
    Work,
    both_work,
    chosen,
    condition_bound,
    plan,
    route_work,
    scored,
)
from .report import RESIDUAL_LIMIT, Check, Outcome, with_rounding
from .rows import squares
from .scaling import Scaled

Mode = Literal["converged", "paper"]
Inverse = Literal["auto", "direct", "schulz", "dual", "cg"]

PAPER_LIMIT = 1e-2
RUNS_FROM = 256  # sides of C from which fp32 runs pay
RUNS_DAMPING = 1e-2  # times the mean square; below, what runs lose in C is too much beside lambda
ESTIMATED = 3.0  # a residual of several rows shows less than a third of itself to 4 probes: rare
ROUNDING = 8 * torch.finfo(torch.float64).eps  # of fp64 sums and factors, relative to the trace
CG_TOL = {torch.float32: 1e-7, torch.float64: 1e-14}  # by what W is rounded to
BATCH_NUMBERS = 1 << 23  # of all matrices of one batched Schulz call
FACTOR_NUMBERS = 1 << 27  # of all Cholesky factors kept between calls


class HyperINF(Solver):
    """W = V (C + lambda I)^-1 with C = mean_i g_i^T g_i (arXiv 2410.05090).

    `mode="converged"` solves to the accuracy of the dtype and certifies it. `mode="paper"` runs the
    released code's arithmetic step for step: fp32, X = start * I, `iterations` times
    X <- X (2 I - A X) without a stop test, with 0.001 added to the damping. Its k steps are the
    filter (1 - (1 - start mu)^(2^k)) / mu on the eigenvalues mu of A, so directions with
    start 2^k mu below 1 are scaled, not inverted, and mu over 2 / start diverges; the report
    carries both ends.

    Args:
        damping: as for every solver.
        side: "cols" is the d x d matrix that the released code uses for LoRA A and B alike;
            "rows" the r x r matrix R = mean_i g_i g_i^T, a different approximation; "both" the
            Kronecker product of the two, R (x) C / t with t = mean ||g||^2 = tr R = tr C, as
            W = (R / sqrt t + sqrt(lambda d / r) I)^-1 V (C / sqrt t + sqrt(lambda r / d) I)^-1.
            That split of lambda is Martens and Grosse's (arXiv 1503.05671, section 6.3): the two
            terms are in the ratio of the factors' mean eigenvalues and multiply to lambda.
        mode: "converged" or "paper".
        inverse: converged mode only. "direct" is one fp64 Cholesky, "schulz" Chebyshev-scaled
            Schulz steps with thin refinement, equal blocks in one batch, "dual" a Cholesky of the
            n r x n r Gram matrix of the gradients' rows, "cg" conjugate gradients; "auto" takes
            the cheapest by the cost model (`plan`), where the dual needs n r < d. Side "both" is
            always direct.
        tol: converged mode only; residual to reach, None: as exact as fp32 allows.
        iterations, start, extra_damping: paper mode only.
        check: as for every solver.
    """

    method = "hyperinf"
    option_names = ("side", "mode", "inverse", "tol", "iterations", "start", "extra_damping")

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        side: Side = "cols",
        mode: Mode = "converged",
        inverse: Inverse = "auto",
        tol: float | None = None,
        iterations: int = 30,
        start: float = 5e-5,
        extra_damping: float = 1e-3,
        check: Check = "bound",
    ) -> None:
        for name, value, known in (
            ("side", side, ("cols", "rows", "both")),
            ("mode", mode, ("converged", "paper")),
            ("inverse", inverse, ("auto", *ROUTES)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        at_least_one(iterations=iterations)
        positive(start=start)
        positive_or_none(tol=tol)
        not_negative(extra_damping=extra_damping)
        if (side == "rows" and inverse == "dual") or (
            side == "both" and (mode == "paper" or inverse not in ("auto", "direct"))
        ):
            raise ValueError(f"side={side!r} has no mode={mode!r} with inverse={inverse!r}")
        self.side, self.mode, self.inverse, self.tol = side, mode, inverse, tol
        self.iterations, self.start, self.extra_damping = iterations, start, extra_damping
        super().__init__(damping, check=check)

    def reset(self) -> None:
        super().reset()
        self.gfims: dict[str, Gfim] = {}
        self._factors: dict[tuple[str, str], Tensor] = {}
        self._queries: Gradients = {}
        self._batched: dict[str, routes.Solved] = {}

    def plan(
        self, shapes: Mapping[str, tuple[int, int]], n: int, queries: int, device: str = "cpu"
    ) -> SolvePlan:
        """As `Solver.plan`; a relative damping makes it an upper bound of what will run.

        Such a rule bounds each condition before the gradients are seen, so that a route chosen once
        they are known can only be a cheaper one. For an absolute damping a condition of 1e4 is
        assumed, and what runs can differ either way.
        """
        if self.mode == "paper":
            raise InputError("mode='paper' has no cost model, so no plan")
        damped = self.damping != Damping()
        if not damped:
            self._refuse_undamped("inverse")

        def works(r: int, d: int) -> dict[str, Work]:
            size = r if self.side == "rows" else d
            condition = condition_bound(self.damping, r, d, size) if damped else None
            held = Gfim(r, d, self.side, self._kept_rows()).would_hold(n)
            return scored(self._works((r, d), n, queries, condition, held), n, r, d, queries)

        return plan(shapes, n, queries, rates_of(device), works, self.inverse)

    def _works(
        self, shape: tuple[int, int], n: int, queries: int, condition: float | None, held_rows: bool
    ) -> dict[str, Work]:
        """The routes of one block, for the plan and for the choice when it is solved."""
        if self.side == "both":
            return both_work(n, *shape, queries)
        thin, size = shape[::-1] if self.side == "rows" else shape
        runs = self._runs_by_rule(*shape) and not held_rows
        return route_work(n, thin, size, queries, condition, held_rows=held_rows, runs=runs)

    @property
    def scale_free(self) -> bool:  # type: ignore[override]
        # the released arithmetic has a step and a damping of its own
        return self.mode != "paper"

    def _applied(self, queries: Mapping[str, Scaled]) -> Iterator[tuple[str, Scaled, Direction]]:
        # blocks that are solved in one batch need each other's queries
        self._queries = {name: V.values for name, V in queries.items()}
        try:
            yield from super()._applied(queries)
        finally:
            self._queries, self._batched = {}, {}

    def self_influence(self, grads: Gradients) -> Tensor:
        """-<g A^-1, g> summed over blocks, (B,): one `half` per gradient, no way back."""
        if self.mode == "paper":
            return super().self_influence(grads)
        return self._squared_half(grads)

    def _half(self, name: str, V: Tensor) -> Tensor:
        # from A = F F^T: V F^-T, on either side or on both; by the dual while the rows are few
        if self.mode == "paper":
            raise InputError("half() needs mode='converged': paper mode does not invert")
        gfim, lam = self._gfim(name), self.lambdas[name]
        # whatever the number of gradients: all embeddings must be of one root
        if gfim.holds_rows and len(gfim.rows()) < gfim.d and lam > 0:
            factor, thin = self._factor(name, "dual"), V.double().flatten(0, 1)
            root = routes.dual_half(gfim.rows(), self.n, lam, factor, thin)
            return root.view_as(V).to(V.dtype).flatten(1)
        factors = {side: self._factor(name, side) for side in self._sides()}
        return routes.half(V.double(), **factors).to(V.dtype).flatten(1)

    def _rescale(self, name: str, shift: int) -> None:
        self.gfims[name] = self.gfims[name].rescaled(shift)

    def _merge(self, other: Self) -> None:
        for name, theirs in other.gfims.items():
            self._gfim(name, other.blocks[name].shape).merge(theirs)

    def curvature(self, name: str, side: str | None = None) -> Tensor:
        """A of a fitted block in fp64; of `side="both"` the factor of the given side.

        In the units of the block, as `lambdas`: divide by `blocks[name].unit`.
        """
        state, lam = self.blocks[name], self.lambdas[name]
        side = side or ("cols" if self.side == "both" else self.side)
        A = self._gfim(name).total(side) / state.n
        if self.side == "both":
            r, d = state.shape
            A /= math.sqrt(state.sum_square / state.n) or 1.0
            lam = math.sqrt(lam * (d / r if side == "rows" else r / d))
        A.diagonal().add_(lam)
        return A

    def _sides(self) -> tuple[str, ...]:
        return ("rows", "cols") if self.side == "both" else (self.side,)

    def _gfim(self, name: str, shape: tuple[int, int] | None = None, fine: bool = True) -> Gfim:
        if name not in self.gfims:
            r, d = shape or self.blocks[name].shape
            self.gfims[name] = Gfim(r, d, self.side, self._kept_rows(), fine)
        return self.gfims[name]

    def _kept_rows(self) -> Literal["few", "all", "none"]:
        if self.mode == "paper" or self.inverse not in ("auto", "dual"):
            return "none"
        return "few" if self.inverse == "auto" else "all"

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        self._gfim(name, fine=self._needs_fine_sums(name, batch)).add(batch, copy)

    def _needs_fine_sums(self, name: str, batch: Tensor) -> bool:
        """Whether C is summed in fp64 throughout, decided by the first batch of a block."""
        if name in self.gfims:
            return True
        r, d = self.blocks[name].shape
        if not self._runs_allowed(d) or batch.dtype == torch.float64:
            return True
        if self._runs_by_rule(r, d):
            return False
        mean_square = float(squares(batch.flatten(1)).mean()) / (r * d)
        absolute = self.damping.absolute * self.blocks[name].unit
        return absolute < RUNS_DAMPING * mean_square

    def _runs_allowed(self, d: int) -> bool:
        asked = self.check == "full" or self.mode == "paper" or self.tol is not None
        return self.side == "cols" and d >= RUNS_FROM and not asked

    def _runs_by_rule(self, r: int, d: int) -> bool:
        """Whether fp32 runs do whatever the gradients are."""
        relative = self.damping.data_inf + r * self.damping.trace
        return self._runs_allowed(d) and relative >= RUNS_DAMPING

    def _mean_eigenvalue(self, state: BlockState) -> float:
        if self.side == "both":
            return state.mean_square
        return state.sum_square / state.n / state.shape[0 if self.side == "rows" else 1]

    def _fit_block(self, name: str, lam: float) -> None:
        self._factors.clear()
        if self.mode == "paper":
            self.lambdas[name] = lam + self.extra_damping

    def _factor(self, name: str, side: str, A: Tensor | None = None) -> Tensor:
        """The Cholesky factor of A or of its "dual", kept for later batches of queries."""
        if (name, side) not in self._factors:
            n, lam = self.n, self.lambdas[name]
            if side == "dual":
                lower = routes.dual_factor(self._gfim(name).rows(), n, lam)
            else:
                lower = routes.factor(name, self.curvature(name, side) if A is None else A, n, lam)
            if sum(map(Tensor.numel, self._factors.values())) + lower.numel() > FACTOR_NUMBERS:
                self._factors.clear()
            self._factors[name, side] = lower
        return self._factors[name, side]

    def _route(self, name: str, queries: int) -> str:
        gfim, state, bound = self._gfim(name), self.blocks[name], self._condition_bound(name)
        works = self._works(state.shape, state.n, queries, bound, gfim.holds_rows)
        return chosen(works, rates_of(gfim.device), self.inverse)

    def _refuse_undamped(self, where: str) -> None:
        """Raise InputError if the route asked for needs a damping, which is zero."""
        if self.inverse not in ("auto", "direct"):
            raise InputError(f"{where}: {self.inverse} needs a positive damping, got 0")

    def _direction(self, name: str, V: Tensor) -> Direction:
        wide, solved = self._solved(name, V)
        W, lost = rounded(wide, V.dtype)
        if self.check == "off":
            return Direction(W, self._outcome(name, solved, None), lost)
        sizes = norms(V)
        E = self._residuals(name, V, W)
        outcome = self._outcome(name, solved, worst(norms(E), sizes))
        if not outcome.converged and outcome.fallback is None and self.mode != "paper":
            before = worst(norms(self._residuals(name, V, wide)), sizes)
            outcome = with_rounding(outcome, before, outcome.tolerance, W.dtype)

        def doubt(sight: Sight) -> Tensor:
            whole = W.double() if lost is None else W.double() + lost
            return self._doubt(name, V, whole, sight)

        return Direction(W, outcome, lost, doubt)

    def _solved(self, name: str, V: Tensor) -> tuple[Tensor, routes.Solved]:
        """W (m, r, d) in fp64 for V (m, r, d), and how it was solved."""
        V64, lam = V.double(), self.lambdas[name]
        if self.side == "both":
            factors = {side: self._factor(name, side) for side in self._sides()}
            W = routes.both(V64, **factors)
            return W, routes.Solved(W, products=2)
        # the row side acts from the left: (A^-1 g)^T = g^T A^-1
        turned = V64.mT if self.side == "rows" else V64
        thin = turned.reshape(-1, turned.shape[-1])
        route = "paper" if self.mode == "paper" else self._route(name, len(V))
        if lam <= 0 and route != "paper":
            self._refuse_undamped(f"block {name}")
        if route == "dual":
            solved = routes.dual(self._gfim(name).rows(), self.n, lam, thin)
        else:
            solved = self._dense(name, route, thin, V.dtype)
        W = solved.W.double().view(turned.shape)
        return (W.mT if self.side == "rows" else W), solved

    def _residuals(self, name: str, V: Tensor, W: Tensor) -> Tensor:
        """V - W A (m, r, d) in fp64; where A is only nearly known, something of its norms (m,)."""
        gfim, lam, W = self._gfim(name), self.lambdas[name], W.double()
        V = V.double()
        if self.side == "both":
            return V - self.curvature(name, "rows") @ W @ self.curvature(name, "cols")
        if gfim.image is not None:
            Z = gfim.probes()
            seen = V @ Z.mT - W @ (gfim.image / self.n + lam * Z).mT
            return seen / len(Z) ** 0.5
        if gfim.holds_rows and len(gfim.rows()) < gfim.d:
            flat = W.flatten(0, 1)
            return V - routes.dual_product(gfim.rows(), self.n, lam, flat).view_as(V)
        A = self.curvature(name)
        return V - (A @ W if self.side == "rows" else W @ A)

    def _doubt(self, name: str, V: Tensor, W: Tensor, sight: Sight) -> Tensor:
        """How far scores of W in fp64 are off because W is not V A^-1, (m,), about."""
        E, gfim = self._residuals(name, V, W), self._gfim(name)
        solved = self._inverted(name, sight.image)
        ends = solved.mT if self.side == "rows" else solved
        if gfim.image is not None:
            return spread(norms(E), ends)
        # E A^-1 X^T P itself, and what rounding hides of it
        seen = E.flatten(1) @ solved.flatten(1).mT
        state = self.blocks[name]
        top = state.sum_square / state.n + self.lambdas[name]
        hidden = spread(ROUNDING * top * norms(W), ends)
        return torch.hypot(norms(seen) / len(solved) ** 0.5, hidden)

    def _inverted(self, name: str, X: Tensor) -> Tensor:
        """X A^-1 (s, r, d), for certificates."""
        if self.side == "both":
            return routes.both(X, **{side: self._factor(name, side) for side in self._sides()})
        gfim, lam = self._gfim(name), self.lambdas[name]
        if gfim.holds_rows and len(gfim.rows()) < gfim.d and lam > 0:
            return routes.dual(gfim.rows(), self.n, lam, X.flatten(0, 1)).W.view_as(X)
        factor = self._factor(name, self.side)
        if self.side == "rows":
            return torch.cholesky_solve(X, factor.expand(len(X), *factor.shape))
        return torch.cholesky_solve(X.flatten(0, 1).mT, factor).mT.view_as(X)

    def scores_by_rows(
        self, name: str, V: Tensor, batches: Sequence[Tensor]
    ) -> tuple[Tensor, float] | None:
        (r, d), n, lam = self.blocks[name].shape, self.n, self.lambdas[name]
        if self.mode == "paper" or self.side != "cols" or n * r >= d or lam <= 0:
            return None
        rows = torch.cat([batch.reshape(-1, d) for batch in batches])
        return routes.row_space_scores(rows, n, lam, V)

    def finer(self, name: str, V: Tensor, batches: Sequence[Tensor]) -> Direction | None:
        gfim = self._gfim(name)
        if gfim.image is None:
            return None
        gfim.sum_again(batches)
        self._factors.clear()
        return self._direction(name, V)

    def _dense(self, name: str, route: str, V: Tensor, dtype: torch.dtype) -> routes.Solved:
        if route == "schulz":
            if name not in self._batched:
                self._solve_alike(name)
            return self._batched.pop(name)
        if route == "direct":
            return routes.direct(self._factor(name, self.side), V)
        A = self.curvature(name)
        if route == "cg":
            tol = min(CG_TOL[dtype], (self.tol or 1e-3) / 4)
            return routes.cg(lambda W: W @ A, V, tol)
        return routes.released(
            A.to(dtype), V.to(dtype), self.lambdas[name], self.start, self.iterations
        )

    def _solve_alike(self, first: str) -> None:
        """Solve `first` and the blocks of equal size behind it in one batched call."""
        shape = self.blocks[first].shape
        most = max(1, BATCH_NUMBERS // shape[0 if self.side == "rows" else 1] ** 2)
        names = [
            name for name in self._queries
            if self.blocks[name].shape == shape
            and name not in self._batched
            and self.lambdas[name] > 0
            and self._route(name, len(self._queries[name])) == "schulz"
        ]  # fmt: skip
        names = names[names.index(first) :][:most]
        A = [self.curvature(name) for name in names]
        queries = [self._queries[name] for name in names]
        turned = [V.mT if self.side == "rows" else V for V in queries]
        V = [t.double().reshape(-1, t.shape[-1]) for t in turned]
        solved = routes.schulz(A, V, [self.lambdas[name] for name in names], self.tol)
        self._batched |= dict(zip(names, solved, strict=True))

    def _condition_bound(self, name: str) -> float | None:
        bound = super()._condition_bound(name)
        if self.side != "both" or bound is None:
            return bound
        # each factor has trace sqrt t and the damping of its own side
        r, d = self.blocks[name].shape
        root = math.sqrt(bound - 1)
        return (1 + root * math.sqrt(r / d)) * (1 + root * math.sqrt(d / r))

    def _outcome(self, name: str, solved: routes.Solved, residual: float | None) -> Outcome:
        limit, fallback = self.tol if self.tol is not None else RESIDUAL_LIMIT, solved.fallback
        estimated = self._gfim(name).image is not None
        if self.mode == "paper":
            limit = PAPER_LIMIT
            if fallback is None and residual is not None and not residual <= limit:
                fallback = f"residual {residual:.1e}"
        converged = None
        if residual is not None:
            good = (ESTIMATED if estimated else 1.0) * residual <= limit
            converged = good and (self.mode != "paper" or fallback is None)
        return Outcome(
            backend=solved.backend,
            precision=solved.precision,
            condition_bound=self._condition_bound(name),
            products=solved.products,
            iterations=solved.iterations,
            residual=residual,
            residual_by=None if residual is None else "estimate" if estimated else "measured",
            converged=converged,
            fallback=fallback,
            tolerance=limit,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {
            _key(self.side, word, name): tensor
            for name, gfim in self.gfims.items()
            for word, tensor in gfim.tensors().items()
        }

    def _take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, state in self.blocks.items():
            keys = {word: _key(self.side, word, name) for word in WORDS}
            found = {word: tensors[key] for word, key in keys.items() if key in tensors}
            sizes = {"rows": state.shape[0], "cols": state.shape[1]}
            fits = "samples" in found or all(
                side in found and found[side].shape == (sizes[side], sizes[side])
                for side in self._sides()
            )
            if state.n and (not fits or ("samples" in found and self.side != "cols")):
                raise InputError(
                    f"block {name}: the saved state is not of side={self.side!r}; "
                    "restore it with the side that it was fitted with"
                )
            self._gfim(name).take(found)


WORDS = ("cols", "rows", "samples", "image")


def _key(side: str, word: str, name: str) -> str:
    return name if word == side else f"{word}:{name}"


def worst(errors: Tensor, sizes: Tensor) -> float:
    """The largest of errors / sizes (m,); an error itself where a size is zero."""
    return float((errors / torch.where(sizes > 0, sizes, 1.0)).max())

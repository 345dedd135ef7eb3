"""Scores -<W_q, g_k> of any training rows, and their certificate, which is about these numbers.

A score is off by the rounding of W and of its dot product, and by what W itself is off. The first
shows in S X + W Z with Z = P^T X in fp64, for a few normal X (n, s) and W before it was rounded;
the second a method tells by its `Direction.doubt`. Both are sums over rows, so rows can come in any
batches and need not be kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..ops import row_dots
from ..ops.checks import accumulation_dtype
from ..ops.sketch import combine_rows
from .base import Solver
from .directions import PROBES, Direction, Sight, norms
from .gram import MARGIN
from .inputs import Gradients
from .report import RESIDUAL_LIMIT, Outcome, angle
from .scaling import Scaled

FEW_NUMBERS = 1 << 17  # of rows whose fp64 copies stay in cache


class BlockTally:
    """What the certificate of one block's scores needs, added up over batches of rows."""

    def __init__(self, direction: Direction) -> None:
        W = direction.W
        self.direction = direction
        self._draw = torch.Generator(device="cpu").manual_seed(1)
        self._image = torch.zeros(PROBES, W[0].numel(), dtype=torch.float64, device=W.device)
        self._seen = torch.zeros(len(W), PROBES, dtype=torch.float64, device=W.device)
        self._squares = torch.zeros(len(W), dtype=torch.float64, device=W.device)

    def probes(self, count: int) -> Tensor:
        """X (count, s) for the next rows."""
        X = torch.randn(count, PROBES, generator=self._draw, dtype=torch.float64, device="cpu")
        return X.to(self._image.device)

    def add(self, S: Tensor, X: Tensor, image: Tensor) -> None:
        """Take in scores S (m, B) of rows P (B, D), the `probes` of these and X^T P (s, D)."""
        S64 = S.double()
        self._seen += S64 @ X
        self._squares += S64.square().sum(1)
        self._image += image

    def judged(self) -> Outcome:
        """The direction's outcome with the relative error of the worst query's scores."""
        outcome, doubt = self.direction.outcome, self.direction.doubt
        if doubt is None or not len(self._squares):
            return outcome
        shape = self.direction.W.shape[1:]
        sight = Sight(self._image.view(PROBES, *shape))
        gap = self._seen + self.direction.wide.flatten(1) @ self._image.mT
        errors = torch.hypot(norms(gap) / PROBES**0.5, doubt(sight))
        sizes = self._squares.sqrt()
        ratios = torch.where(sizes > 0, errors / sizes, torch.where(errors > 0, torch.inf, 0.0))
        return by_scores(outcome, float(ratios.max()))


def by_scores(outcome: Outcome, error: float) -> Outcome:
    """An outcome judged by an estimate of the worst query's relative error of scores."""
    limit, usual = max(outcome.tolerance, RESIDUAL_LIMIT), outcome.tolerance == RESIDUAL_LIMIT
    # a residual that was asked for must be there too
    good = MARGIN * error <= limit and (usual or bool(outcome.converged))
    note = outcome.fallback
    if not good and note is None:
        note = f"scores are {error:.1e} off by estimate, and that may be {MARGIN} times too low"
    return replace(
        outcome, score_error=error, score_error_by="estimate", tolerance=limit, converged=good,
        fallback=note,
    )  # fmt: skip


class Scorer:
    """Scores of a stream of rows by the W of all blocks, certified at its end.

    Args:
        queries: {block: (m, r, d)}, the fitted blocks.
    """

    def __init__(self, solver: Solver, queries: Gradients) -> None:
        self.solver = solver
        self._directions = dict(solver.directions(queries))
        self._tallies = {
            name: BlockTally(direction)
            for name, direction in self._directions.items()
            if solver.check != "off" and direction.doubt is not None
        }

    @property
    def applied(self) -> dict[str, Tensor]:
        """{block: W (m, r, d)}."""
        return {name: direction.W for name, direction in self._directions.items()}

    def scores(self, grads: Gradients) -> dict[str, Tensor]:
        """{block: (m, B)} of gradients {block: (B, r, d)}."""
        return {
            name: _scores(direction.W, grads[name], self._tallies.get(name))
            for name, direction in self._directions.items()
        }

    def probes(self, name: str, count: int) -> Tensor | None:
        """X (count, s) for the next rows of a block that is scored elsewhere; None: no need."""
        return self._tallies[name].probes(count) if name in self._tallies else None

    def add(self, name: str, S: Tensor, X: Tensor, image: Tensor) -> None:
        """Take in scores (m, B) made elsewhere, the `probes` of their rows, and X^T P (s, r, d)."""
        self._tallies[name].add(S, X, image.flatten(1))

    def certify(self) -> None:
        """Judge everything scored so far and put it into the solver's report."""
        for name, direction in self._directions.items():
            tally = self._tallies.get(name)
            outcome = direction.outcome if tally is None else tally.judged()
            self.solver.record(name, outcome, direction.turn)


def row_scores(
    solver: Solver, queries: Gradients, rows: Mapping[str, Sequence[Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """(block, scores (m, n)) of the fitted rows, given as batches (B, r, d) of each block.

    A block whose scores cannot be certified is scored again: in the space of its rows where those
    are few, else in fp64 throughout. Only then the certificate says no.
    """
    for name, V, direction in solver.solved(queries):
        batches = [solver.scaled(name, batch) for batch in rows[name]]
        checked = solver.check != "off" and direction.doubt is not None and len(V.values) > 0
        tally = BlockTally(direction) if checked else None
        S = solver.foreseen_scores(name, V) if tally is None else None
        if S is None:
            S = torch.cat([_scores(direction.W, batch, tally) for batch in batches], dim=1)
        outcome = direction.outcome
        if tally is not None:
            outcome = tally.judged()
            if not outcome.converged:
                S, outcome = _again(solver, name, V, direction, batches, S, outcome)
        S, outcome = solver.deliver_scores(name, S, V, outcome)
        solver.record(name, outcome, angle(V.values, direction.W))
        yield name, S


def _again(
    solver: Solver, name: str, V: Scaled, direction: Direction, batches: Sequence[Tensor],
    S: Tensor, outcome: Outcome,
) -> tuple[Tensor, Outcome]:  # fmt: skip
    by_rows = solver.scores_by_rows(name, V.values, batches)
    if by_rows is not None:
        good = by_rows[1] <= outcome.tolerance
        found = by_rows[0], replace(
            direction.outcome, precision="fp64", score_error=by_rows[1], score_error_by="bound",
            tolerance=outcome.tolerance, converged=good,
        )  # fmt: skip
    else:
        found = fine_scores(solver.finer(name, V.values, batches) or direction, batches)
    better = (found[1].score_error or 0.0) <= (outcome.score_error or 0.0)
    return (found[0].to(S.dtype), found[1]) if better else (S, outcome)


def fine_scores(direction: Direction, batches: Sequence[Tensor]) -> tuple[Tensor, Outcome]:
    """Scores (m, n) in fp64, by W before it was rounded, and their outcome."""
    tally, wide, parts = BlockTally(direction), direction.wide.flatten(1), []
    for batch in batches:
        for few in batch.flatten(1).split(max(1, FEW_NUMBERS // wide.shape[1])):
            S, X = -(wide @ few.double().mT), tally.probes(len(few))
            tally.add(S, X, combine_rows(X, few))
            parts.append(S)
    outcome = tally.judged()
    if outcome.converged:
        outcome = replace(outcome, fallback=direction.outcome.fallback)
    return torch.cat(parts, dim=1), replace(outcome, precision="fp64")


def _scores(W: Tensor, batch: Tensor, tally: BlockTally | None) -> Tensor:
    W, P = W.flatten(1), batch.flatten(1)
    S = -row_dots([P], W)[0].mT.to(accumulation_dtype(W, P))
    if tally is not None and len(P):
        X = tally.probes(len(P))
        tally.add(S, X, combine_rows(X, P))
    return S

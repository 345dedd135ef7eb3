"""Solvers of the flattened empirical Fisher H = P^T P / n keep the training gradients as rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.checks import accumulation_dtype
from ..ops.costs import rates_of
from .base import Solver
from .block_gram import BlockGram
from .damping import DEFAULT_DAMPING, Damping
from .gram import REFINE_ABOVE, Seen, Sketch
from .inputs import Gradients, not_finite
from .judging import Attempt, Judged, best_of, by_residual, by_sketch, claimed, measured
from .planning import SolvePlan, flat_work, plan
from .report import RESIDUAL_LIMIT, Check, Outcome, angle, precision_of
from .rows import GradientRows
from .scaling import Scaled
from .scratch import Scratch

EPS32 = torch.finfo(torch.float32).eps
FINE_GRAM = 0.1  # fp32 rounding over damping at which refinement would no longer contract
GRAM_BYTES = 2**30  # Gram matrices kept for later calls; above, only the latest block's
GROUP_ROWS = 512  # training rows whose own influence is worked out together


class FlatSolver(Solver):
    """A solver of W (H + lambda I) = V with rows P (n, D), D = r d, per block.

    Where n < D the work is done in Gram space (see `gram`): `apply` on n x n matrices, and
    `scores`, the influence of the kept rows themselves, without forming W at all.

    Args:
        damping: as for every solver.
        folder: keep the rows in mapped files under this folder instead of memory, and a Gram
            matrix of over 1 GiB with its factor too. The files have no names, so they are gone with
            the solver or its process. None: in memory.
        check: as for every solver.
    """

    enough: ClassVar[float] = REFINE_ABOVE  # error of scores that is not worth another attempt

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        folder: str | os.PathLike[str] | None = None,
        check: Check = "bound",
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        super().__init__(damping, check=check)

    def reset(self) -> None:
        super().reset()
        self.rows: dict[str, GradientRows] = {}
        self._grams: dict[str, BlockGram] = {}
        self._moments: dict[str, tuple[int, Tensor]] = {}
        self._sketches: dict[str, Sketch] = {}
        self._inverted: tuple[object, Sketch] | None = None  # the latest
        self._scratch = None if self.folder is None else Scratch(self.folder)

    @property
    def kept(self) -> Mapping[str, GradientRows]:
        return self.rows

    def share(self, other: FlatSolver) -> None:
        """Work on another solver's rows and Gram matrices, not on copies; for one more `fit`."""
        self.blocks, self.rows = other.blocks, other.rows
        self._grams, self._moments = other._grams, other._moments
        self._sketches, self._scratch = other._sketches, other._scratch

    def forget_grams(self) -> None:
        """Free the n x n and D x D matrices and sketches; they are formed anew when needed."""
        self._grams.clear()
        self._moments.clear()
        self._sketches.clear()

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        flat = batch.flatten(1)
        if copy and flat.data_ptr() == batch.data_ptr():
            flat = flat.clone()
        self._rows_of(name, flat.shape[1]).append(flat)

    def _rows_of(self, name: str, width: int) -> GradientRows:
        fresh = GradientRows(width, self._scratch, self.blocks[name].exponent)
        return self.rows.setdefault(name, fresh)

    def _rescale(self, name: str, shift: int) -> None:
        self.rows[name] = self.rows[name].rescaled(shift)

    def _fit_block(self, name: str, lam: float) -> None:
        if lam <= 0 and self.blocks[name].sum_square > 0:
            raise InputError(
                f"block {name}: the damping ({self.damping}) resolves to {lam:g}, but "
                f"{self.method} needs a positive one: without it the Fisher of {self.n} samples "
                "is singular"
            )

    def plan(
        self, shapes: Mapping[str, tuple[int, int]], n: int, queries: int, device: str = "cpu"
    ) -> SolvePlan:
        works = lambda r, d: flat_work(  # noqa: E731
            self.method, n, r * d, queries, self._steps_at_most(r, d, n)
        )
        return plan(shapes, n, queries, rates_of(device), works)

    def _steps_at_most(self, r: int, d: int, n: int) -> float:
        """Of an iterative method, from the damping rule."""
        return 0.0

    def scores(self, queries: Gradients) -> dict[str, Tensor]:
        """Influence of the kept training rows on queries, `-<W_q, g_k>` per block.

        Args:
            queries: {block: (m, r, d)}, the fitted blocks.

        Returns:
            {block: (m, n)} in fp32 (fp64 for fp64 input).

        Raises:
            InputError: as `apply`.
        """
        return dict(self.scores_by_block(queries))

    def scores_by_block(self, queries: Gradients) -> Iterator[tuple[str, Tensor]]:
        """`scores` one block after the other, for sums that need not hold all of them."""
        if not self.lambdas:
            self.fit()
        for name, V in self.check_queries(queries).items():
            yield name, self.block_scores(name, V.flat())

    def seen(self, name: str, V: Tensor) -> Seen:
        """Flattened queries V (m, D), in range, as the rows of one block see them."""
        rows = self.rows[name]
        return Seen(rows, V, rows.dots(V))

    def block_scores(self, name: str, given: Scaled, seen: Seen | None = None) -> Tensor:
        """`scores` of one fitted block for flattened queries (m, D); `seen` where it is known."""
        S, outcome, turn = self._scores(name, given.values, seen)
        S, outcome = self._delivered(name, S, given, self.blocks[name].exponent, outcome)
        self.record(name, outcome, turn)
        return S

    def _scores(
        self, name: str, V: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Outcome, float | None]:
        """S (m, n), how it was solved and its angle to gradient dot, in the units of the block."""
        rows = self.rows[name]
        if not len(V):
            return V.new_zeros(0, rows.n), Outcome(residual=0.0), None
        seen = self.seen(name, V) if seen is None else seen
        S, outcome = self._gram_scores(name, seen)
        return S, outcome, None if self.check == "off" else angle(-seen.L, S)

    def _in_gram_space(self, rows: GradientRows) -> bool:
        """Whether scores of the rows come from products with them, not from W."""
        return rows.n < rows.width

    def own_influence(self) -> Tensor:
        """influence[k, k] of every kept training row, (n,), summed over blocks.

        In Gram space, so after K = P P^T it costs n x n algebra.
        """
        if not self.lambdas:
            self.fit()
        total: Tensor | None = None
        for name in self.blocks:
            parts = [S[:, part].diagonal() for part, S in self._own_scores(name)]
            if not bool(torch.isfinite(own := torch.cat(parts)).all()):
                raise not_finite(name, self.method)
            total = own if total is None else total + own
        if total is None:
            raise InputError("there are no training gradients: update() was given zero rows")
        return total

    def _own_scores(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their scores on themselves and all others) in groups."""
        rows = self.rows[name]
        small = self._in_gram_space(rows) and rows.n < rows.width
        for part, chunk in rows.chunks():
            start = part.start
            for group in chunk.split(GROUP_ROWS):
                own = slice(start, start + len(group))
                V = group.to(accumulation_dtype(group))
                seen = None
                if small:
                    seen = Seen(rows, V, self.gram(name).between(own).to(V.dtype), own)
                # rows are in the units of their block already, and so no scale is left in S
                S, outcome, turn = self._scores(name, V, seen)
                self.record(name, outcome, turn)
                yield own, S
                start = own.stop

    def gram(self, name: str, *, fine: bool = False) -> BlockGram:
        """K of a fitted block, formed once: fp32, or fp64 if `fine` or the damping asks for it."""
        rows = self.rows[name]
        wanted = torch.float64 if fine or self._needs_fine_sums(name) else None
        held = self._grams.get(name)
        if held is None or held.n != rows.n or (wanted is not None and held.dtype != wanted):
            size = rows.n**2 * 4
            if size * len(self.blocks) > GRAM_BYTES:
                self._grams.clear()
            for other in self._grams.values():
                other.drop_factors()
            scratch = self._scratch if size > GRAM_BYTES else None
            held = self._grams[name] = BlockGram(name, rows, wanted, scratch)
        return held

    def _needs_fine_sums(self, name: str) -> bool:
        bound = self._condition_bound(name) or float("inf")
        return bound * EPS32 > FINE_GRAM

    def sketch(self, name: str) -> Sketch:
        """What checks of a block's scores need, read from its rows once."""
        held = self._sketches.get(name)
        if held is None or held.n != self.rows[name].n:
            held = self._sketches[name] = Sketch.by_signs(self.rows[name])
        return held

    def inverted_sketch(self, name: str) -> Sketch:
        """The same through (K / n + lambda I)^-1 X, which shows the error of scores itself."""
        gram, lam = self.gram(name), self.lambdas[name]
        key = (name, lam, gram.n, gram.dtype)
        if self._inverted is None or self._inverted[0] != key:
            Y = gram.n * gram.solve(self.sketch(name).X.mT, lam).mT
            self._inverted = (key, Sketch(self.rows[name], Y.contiguous()))
        return self._inverted[1]

    def moment(self, name: str) -> Tensor:
        """H = P^T P / n (D, D) in fp64; kept for the block asked for last."""
        rows = self.rows[name]
        if name not in self._moments or self._moments[name][0] != rows.n:
            self._moments.clear()
            self._moments[name] = (rows.n, rows.second_moment() / rows.n)
        return self._moments[name][1]

    def _gram_scores(self, name: str, seen: Seen) -> tuple[Tensor, Outcome]:
        """S (m, n) in V's dtype: the first attempt that serves, or the best one."""
        small = self._in_gram_space(self.rows[name])
        attempts = self._gram_attempts(name, seen) if small else self._primal_attempts(name, seen)
        if self.check == "off":
            first = next(attempts)
            return first.S.to(seen.V.dtype), self._unchecked(name, first.steps, first.precision)
        attempt, judged = best_of(attempts, self.enough)
        S = attempt.S.to(seen.V.dtype)
        outcome = self._judged(name, judged.residual, attempt.steps, attempt.precision)
        return S, claimed(outcome, judged, S.dtype)

    def _gram_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        """Scores by n x n algebra, better and dearer ones later."""
        raise NotImplementedError

    def _primal_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        """Scores by W from the D x D side, better and dearer ones later."""
        raise NotImplementedError

    def _gram_attempt(
        self, name: str, seen: Seen, S: Tensor, steps: int, dtype: torch.dtype
    ) -> Attempt:
        return Attempt(S, steps, precision_of(dtype), lambda: self._judge(name, seen, S))

    def _primal_attempt(self, name: str, V: Tensor, W: Tensor, steps: int) -> Attempt:
        # W in fp64: what is left of it along the rows may be far smaller than its rounding
        S, state, lam = -self.rows[name].dots(W), self.blocks[name], self.lambdas[name]

        def judge() -> Judged:
            R = self._residual(name, V, W)
            return by_residual(V, W, R, S, state.n, lam, state.sum_square)

        return Attempt(S, steps, "fp64", judge)

    def _judge(self, name: str, seen: Seen, S: Tensor) -> Judged:
        """What is known of scores from Gram space."""
        lam, gram = self.lambdas[name], self.gram(name)
        if self.check == "full":
            return measured(seen, S, lam, lambda E: gram.solve(E, lam))
        judged = by_sketch(self.sketch(name), None, seen, S, lam)
        if judged.error <= self.enough or not gram.definite(lam):
            return judged
        return by_sketch(self.sketch(name), self.inverted_sketch(name), seen, S, lam)

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        W, outcome = self._directions(name, V.flatten(1).double(), V.dtype)
        return W.view_as(V), outcome

    def _directions(self, name: str, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Outcome]:
        """W (m, D) in the given dtype, judged as such, for V (m, D) in fp64."""
        raise NotImplementedError

    def _judged(self, name: str, residual: float, iterations: int, precision: str) -> Outcome:
        """An outcome of a solve to 1e-3, its residual measured."""
        return Outcome(
            precision=precision,
            condition_bound=self._condition_bound(name),
            products=1,
            iterations=iterations,
            residual=residual,
            residual_by="measured",
            converged=residual <= RESIDUAL_LIMIT,
        )

    def _unchecked(self, name: str, iterations: int, precision: str) -> Outcome:
        """An outcome that claims nothing."""
        outcome = FlatSolver._judged(self, name, 0.0, iterations, precision)
        return replace(outcome, residual=None, residual_by=None, converged=None)

    def _residual(self, name: str, V: Tensor, W: Tensor) -> Tensor:
        """V - W (H + lambda I) in fp64, (m, D)."""
        rows, lam = self.rows[name], self.lambdas[name]
        W64 = W.double()
        return V.double() - lam * W64 - rows.combine(rows.dots(W64)) / rows.n

    def _merge(self, other: Self) -> None:
        for name, theirs in other.rows.items():
            mine = self._rows_of(name, theirs.width)
            for _, chunk in theirs.chunks():
                mine.append(chunk)

    def _tensors(self) -> dict[str, Tensor]:
        return {name: rows.tensor() for name, rows in self.rows.items()}

    def _take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self._rows_of(name, tensor.shape[1]).append(tensor)

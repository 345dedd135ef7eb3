"""Solvers of the flattened empirical Fisher H = P^T P / n keep the training gradients as rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
from .gram import Seen, Sketch, Span, worst_ratio
from .inputs import Gradients, not_finite
from .planning import SolvePlan, flat_work, plan
from .report import RESIDUAL_LIMIT, Check, Outcome, angle, precision_of
from .rows import GradientRows
from .scaling import Scaled
from .scratch import Scratch

EPS32 = torch.finfo(torch.float32).eps
FINE_GRAM = 0.1  # fp32 rounding over damping at which refinement would no longer contract
FINE_STEPS = 1e-4  # the same where nothing is refined: iterations only solve what L and K say
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

    fine_gram: ClassVar[float] = FINE_GRAM  # fp32 rounding over damping from which K is fp64

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
        return Seen(rows, V, rows.dots(V), V.double() @ self.sketch(name).rows)

    def block_scores(self, name: str, given: Scaled, seen: Seen | None = None) -> Tensor:
        """`scores` of one fitted block for flattened queries (m, D); `seen` where it is known."""
        S, outcome, turn = self._scores(name, given.values, seen)
        S, outcome = self._delivered(name, S, given, self.blocks[name].exponent, outcome)
        self._record(name, self.blocks[name], outcome, turn)
        return S

    def _scores(
        self, name: str, V: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Outcome, float | None]:
        """S (m, n), how it was solved and its angle to gradient dot, in the units of the block."""
        rows = self.rows[name]
        if not len(V):
            return V.new_zeros(0, rows.n), Outcome(residual=0.0), None
        if self._in_gram_space(rows):
            seen = self.seen(name, V) if seen is None else seen
            L = seen.L
            S, outcome = self._gram_scores(name, seen)
        else:
            # W as it is: what is left of it along the rows may be far smaller than its rounding
            W, outcome = self._directions(name, V.double(), torch.float64)
            S = -rows.dots(W).to(V.dtype)
            L = rows.dots(V) if seen is None else seen.L
        return S, outcome, angle(-L, S)

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
                    K = self.gram(name).between(own).to(V.dtype)
                    seen = Seen(rows, V, K, self.sketch(name).image[own])
                # rows are in the units of their block already, and so no scale is left in S
                S, outcome, turn = self._scores(name, V, seen)
                self._record(name, self.blocks[name], outcome, turn)
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
        return bound * EPS32 > self.fine_gram

    def sketch(self, name: str) -> Sketch:
        """What checks of a block's scores need, read from its rows once."""
        held = self._sketches.get(name)
        if held is None or held.n != self.rows[name].n:
            held = self._sketches[name] = Sketch(self.rows[name])
        return held

    def moment(self, name: str) -> Tensor:
        """H = P^T P / n (D, D) in fp64; kept for the block asked for last."""
        rows = self.rows[name]
        if name not in self._moments or self._moments[name][0] != rows.n:
            self._moments.clear()
            self._moments[name] = (rows.n, rows.second_moment() / rows.n)
        return self._moments[name][1]

    def _gram_scores(self, name: str, seen: Seen) -> tuple[Tensor, Outcome]:
        """S (m, n) in V's dtype, by the method's `_span`, judged through P in fp64."""
        lam, gram = self.lambdas[name], self.gram(name)
        L = seen.fine if gram.dtype == torch.float64 else seen.L.double()
        span = self._span(gram, seen.V, L, lam)
        S = -(span.a * L + gram.image(span.B)).to(seen.V.dtype)
        residual = self.sketch(name).residual(seen, S, lam)
        return S, self._judged(name, residual, span.iterations, precision_of(gram.dtype))

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        W, outcome = self._directions(name, V.flatten(1).double(), V.dtype)
        return W.view_as(V), outcome

    def _directions(self, name: str, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Outcome]:
        """W (m, D) in the given dtype, judged as such, for V (m, D) in fp64."""
        rows = self.rows[name]
        if rows.n < rows.width:
            span = self._span(self.gram(name), V, rows.dots(V), self.lambdas[name])
            W, steps = span.a * V + rows.combine(span.B), span.iterations
        else:
            W, steps = self._primal_solve(name, V)
        W = W.to(dtype)
        residual = worst_ratio(self._residual(name, V, W), V)
        return W, self._judged(name, residual, steps, "fp64")

    def _primal_solve(self, name: str, V: Tensor) -> tuple[Tensor, int]:
        """W (m, D) in fp64 for V (m, D), on the D x D side, and the steps it took."""
        raise NotImplementedError

    def _span(self, gram: BlockGram, V: Tensor, L: Tensor, lam: float) -> Span:
        """The method in Gram space; V (m, D) serves for norms only, L (m, n) is fp64."""
        raise NotImplementedError

    def _judged(self, name: str, residual: float, iterations: int, precision: str) -> Outcome:
        """An outcome of a solve to 1e-3."""
        return Outcome(
            precision=precision,
            condition_bound=self._condition_bound(name),
            products=1,
            iterations=iterations,
            residual=residual,
            converged=residual <= RESIDUAL_LIMIT,
        )

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

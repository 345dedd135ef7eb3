"""CG and LiSSA: the exact system by steps, to a residual, or until its scores are right."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from .block_gram import BlockGram
from .damping import Damping
from .flat import FlatSolver
from .gram import MARGIN, Seen, Span, worst_ratio
from .judging import Attempt
from .options import at_least_one, positive
from .report import RESIDUAL_LIMIT, Check, Outcome

TIGHTER = (1.0, 1e-2, 1e-4)  # of the tolerance, until the scores are right


class IterativeSolver(FlatSolver):
    """W A = V with A = H + lambda I by steps in fp64, on n x n or D x D matrices.

    A small residual of W says little of the scores -W P^T where the rows' columns differ by orders
    of magnitude. So scores are judged themselves; where they are off, the tolerance is tightened,
    and then K summed in fp64, as far as `iterations` reach.
    """

    enough = RESIDUAL_LIMIT / MARGIN
    option_names: ClassVar[tuple[str, ...]] = ("iterations", "tol")
    words: ClassVar[str]  # for its steps, in a sentence

    def __init__(
        self,
        damping: Damping | float,
        iterations: int,
        tol: float,
        folder: str | os.PathLike[str] | None,
        check: Check,
    ) -> None:
        at_least_one(iterations=iterations)
        positive(tol=tol)
        self.iterations, self.tol = iterations, tol
        super().__init__(damping, folder=folder, check=check)

    def _gram_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        for fine in (False, True):
            gram, lam = self.gram(name, fine=fine), self.lambdas[name]
            L = seen.fine if gram.dtype == torch.float64 else seen.L.double()
            sizes = torch.linalg.vector_norm(seen.V, dim=1, dtype=torch.float64).square()
            for share in TIGHTER:
                span = self._span(gram, sizes, L, lam, self.tol * share)
                S = -(span.a * L + gram.image(span.B))
                yield self._gram_attempt(name, seen, S, span.iterations, gram.dtype)
                if span.iterations >= self.iterations:
                    return
            if gram.dtype == torch.float64:
                return

    def _primal_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        V = seen.V.double()
        for share in TIGHTER:
            W, steps = self._primal_solve(name, V, self.tol * share)
            yield self._primal_attempt(name, V, W, steps)
            if steps >= self.iterations:
                return

    def _directions(self, name: str, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Outcome]:
        rows = self.rows[name]
        if rows.n < rows.width:
            # no scores are looked at that would tell where K in fp32 is not enough
            gram, L = self.gram(name, fine=True), rows.dots(V)
            span = self._span(gram, V.square().sum(1), L, self.lambdas[name], self.tol)
            W, steps = span.a * V + rows.combine(span.B), span.iterations
        else:
            W, steps = self._primal_solve(name, V, self.tol)
        W = W.to(dtype)
        if self.check == "off":
            return W, self._unchecked(name, steps, "fp64")
        residual = worst_ratio(self._residual(name, V, W), V)
        return W, self._judged(name, residual, steps, "fp64")

    def _primal_solve(self, name: str, V: Tensor, tol: float) -> tuple[Tensor, int]:
        """W (m, D) in fp64 for V (m, D), on the D x D side, and the steps it took."""
        raise NotImplementedError

    def _span(self, gram: BlockGram, sizes: Tensor, L: Tensor, lam: float, tol: float) -> Span:
        """The method in Gram space; `sizes` (m,) are ||V_q||^2, L (m, n) is V P^T; fp64."""
        raise NotImplementedError

    def _limit(self) -> float:
        """The residual of W up to which it counts as solved."""
        return self.tol

    def _judged(self, name: str, residual: float, iterations: int, precision: str) -> Outcome:
        note = None
        if not residual <= self._limit():
            note = f"residual {residual:.1e} after {iterations} {self.words}, asked {self.tol:.1e}"
        outcome = super()._judged(name, residual, iterations, precision)
        return replace(outcome, converged=note is None, fallback=note)

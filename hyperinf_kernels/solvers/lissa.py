"""LiSSA: a Neumann series, with the step that makes it converge and a residual that tells."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from torch import Tensor

from ..ops.bounds import upper_bound
from .block_gram import BlockGram
from .damping import DEFAULT_DAMPING, Damping
from .gram import Span, worst_ratio
from .iterative import IterativeSolver
from .options import positive_or_none
from .planning import condition_bound
from .report import Check, Outcome

CHECK_EVERY = 10


class LiSSA(IterativeSolver):
    """R <- s V + R (I - s A) from R = 0, A = H + lambda I (arXiv 1602.03943, 1703.04730).

    After k steps the filter on an eigenvalue mu of A is (1 - (1 - s mu)^k) / mu, which tends to
    1 / mu iff 0 < s < 2 / max mu. The step is s = 2 / (u + lambda) with a rigorous upper bound u,
    so it always converges, at the rate 1 - 2 / (condition + 1): the report says when `iterations`
    did not suffice. Steps run in fp64 on the n x n Gram matrix, or on the D x D Fisher if smaller.

    Args:
        damping: as for every solver.
        iterations: steps at most.
        tol: stop once ||V - W A||_F / ||V||_F is below, or later where the scores ask for it; a W
            of a larger residual is not converged.
        scale: the step s; None: the safe one above.
        folder, check: as for every solver that keeps rows.
    """

    method = "lissa"
    words = "steps of LiSSA"
    option_names = ("iterations", "tol", "scale")

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        iterations: int = 1000,
        tol: float = 1e-3,
        scale: float | None = None,
        folder: str | os.PathLike[str] | None = None,
        check: Check = "bound",
    ) -> None:
        positive_or_none(scale=scale)
        self.scale = scale
        super().__init__(damping, iterations, tol, folder, check)

    def _steps_at_most(self, r: int, d: int, n: int) -> float:
        condition = condition_bound(self.damping, r, d, r * d)
        return min(self.iterations, condition / 2 * math.log(1 / self.tol))

    def _judged(self, name: str, residual: float, iterations: int, precision: str) -> Outcome:
        outcome = super()._judged(name, residual, iterations, precision)
        if self.scale is None or residual <= 1:
            return outcome
        note = (
            f"{outcome.fallback}; its scale {self.scale:.1e} is too long where it exceeds 2 / the "
            "largest eigenvalue, and then it diverges"
        )
        return replace(outcome, fallback=note)

    def _step(self, bound: float, lam: float) -> float:
        return self.scale or 2 / (bound + 2 * lam)

    def _primal_solve(self, name: str, V: Tensor, tol: float) -> tuple[Tensor, int]:
        H, lam = self.moment(name), self.lambdas[name]
        s, R = self._step(float(upper_bound(H)), lam), torch.zeros_like(V)
        for step in range(1, self.iterations + 1):
            E = V - R @ H - lam * R
            if step % CHECK_EVERY == 0 and worst_ratio(E, V) <= tol / 2:
                return R, step - 1
            R = R + s * E
        return R, self.iterations

    def _span(self, gram: BlockGram, sizes: Tensor, L: Tensor, lam: float, tol: float) -> Span:
        # R = a V + B P stays in the span of V and the rows, so only (a, B) is iterated
        times, n = gram.times(), gram.n
        s, a, B, steps = self._step(gram.bound / n, lam), 0.0, torch.zeros_like(L), self.iterations
        for step in range(1, self.iterations + 1):
            image = (a * L + times(B)) / n
            # V - R A = e V + F P with e = 1 - lam a, F = -(image + lam B)
            e, F = 1 - lam * a, image.add(B, alpha=lam).neg_()
            if step % CHECK_EVERY == 0:
                square = e * e * sizes + 2 * e * (F * L).sum(1) + (times(F) * F).sum(1)
                if bool((square <= (tol / 2) ** 2 * sizes).all()):
                    steps = step - 1
                    break
            a, B = a + s * e, B.add(F, alpha=s)
        return Span(a, B, iterations=steps)

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
from .flat import FINE_STEPS, FlatSolver
from .gram import Span, worst_ratio
from .options import at_least_one, positive, positive_or_none
from .planning import condition_bound
from .report import Check, Outcome

CHECK_EVERY = 10


class LiSSA(FlatSolver):
    """R <- s V + R (I - s A) from R = 0, A = H + lambda I (arXiv 1602.03943, 1703.04730).

    After k steps the filter on an eigenvalue mu of A is (1 - (1 - s mu)^k) / mu, which tends to
    1 / mu iff 0 < s < 2 / max mu. The step is s = 2 / (u + lambda) with a rigorous upper bound u,
    so it always converges, at the rate 1 - 2 / (condition + 1): the report says when `iterations`
    did not suffice. Steps run in fp64 on the n x n Gram matrix, or on the D x D Fisher if smaller.

    Args:
        damping: as for every solver.
        iterations: steps at most.
        tol: stop once ||V - W A||_F / ||V||_F is below; a larger residual is not converged.
        scale: the step s; None: the safe one above.
        folder, check: as for every solver that keeps rows.
    """

    method = "lissa"
    fine_gram = FINE_STEPS
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
        at_least_one(iterations=iterations)
        positive(tol=tol)
        positive_or_none(scale=scale)
        self.iterations, self.tol, self.scale = iterations, tol, scale
        super().__init__(damping, folder=folder, check=check)

    def _steps_at_most(self, r: int, d: int, n: int) -> float:
        condition = condition_bound(self.damping, r, d, r * d)
        return min(self.iterations, condition / 2 * math.log(1 / self.tol))

    def _judged(self, name: str, residual: float, iterations: int, precision: str) -> Outcome:
        note = None
        if not residual <= self.tol:
            note = (
                f"residual {residual:.1e} after {iterations} steps of LiSSA, asked {self.tol:.1e}"
            )
            if self.scale is not None and not residual <= 1:
                note += (
                    f"; its scale {self.scale:.1e} is too long where it exceeds 2 / the largest "
                    "eigenvalue, and then it diverges"
                )
        outcome = super()._judged(name, residual, iterations, "fp64")
        return replace(outcome, converged=note is None, fallback=note)

    def _step(self, bound: float, lam: float) -> float:
        return self.scale or 2 / (bound + 2 * lam)

    def _primal_solve(self, name: str, V: Tensor) -> tuple[Tensor, int]:
        H, lam = self.moment(name), self.lambdas[name]
        s, R = self._step(float(upper_bound(H)), lam), torch.zeros_like(V)
        for step in range(1, self.iterations + 1):
            E = V - R @ H - lam * R
            if step % CHECK_EVERY == 0 and worst_ratio(E, V) <= self.tol / 2:
                return R, step - 1
            R = R + s * E
        return R, self.iterations

    def _span(self, gram: BlockGram, V: Tensor, L: Tensor, lam: float) -> Span:
        # R = a V + B P stays in the span of V and the rows, so only (a, B) is iterated
        times, n = gram.times(), gram.n
        s, a, B, steps = self._step(gram.bound / n, lam), 0.0, torch.zeros_like(L), self.iterations
        size = V.double().square().sum(1)
        for step in range(1, self.iterations + 1):
            image = (a * L + times(B)) / n
            # V - R A = e V + F P with e = 1 - lam a, F = -(image + lam B)
            e, F = 1 - lam * a, image.add(B, alpha=lam).neg_()
            if step % CHECK_EVERY == 0:
                square = e * e * size + 2 * e * (F * L).sum(1) + (times(F) * F).sum(1)
                if bool((square <= (self.tol / 2) ** 2 * size).all()):
                    steps = step - 1
                    break
            a, B = a + s * e, B.add(F, alpha=s)
        return Span(a, B, iterations=steps)

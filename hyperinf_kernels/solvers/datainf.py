"""DataInf: swap mean and inverse, then invert each rank-1 term by Sherman and Morrison."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..ops import explain, sherman_morrison
from .flat import FlatSolver
from .gram import MARGIN, REFINE_ABOVE, Seen, rooted, worst_ratio
from .planning import GRAM_PAYS
from .report import RESIDUAL_LIMIT, Outcome, precision_of
from .rows import GradientRows
from .sketched import solve_checked

WIDENED = 32  # rows taken to fp64 at a time


class DataInf(FlatSolver):
    """W = V mean_i (g_i g_i^T + lambda I)^-1 on flattened gradients (arXiv 2310.00902).

    A closed form: nothing is solved, so the report's residual is the relative error of the worst
    query row against the same formula in fp64, about; every row is looked at, and those where fp32
    cancels are done again in fp64. How far the swap of mean and inverse is from the exact method is
    not in it; run `method="exact"` to see.
    `scores` of the kept rows are ((1/n) L diag(1 / (lambda + diag K)) K - L) / lambda, by K where
    it is at hand or cheaper (n < 4 m), else by two more products with P; there the residual is the
    relative error of the worst query's scores, measured on random combinations of training rows.
    """

    method = "datainf"

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        W, outcome = solve_checked(lambda X: self._mean(name, X), V.flatten(1))
        backend, bound = explain("sherman_morrison", W).backend, self._condition_bound(name)
        return W.view_as(V), replace(outcome, backend=backend, condition_bound=bound)

    def _mean(self, name: str, V: Tensor) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        total = torch.zeros_like(V)
        wide = V.dtype == torch.float64
        for _, chunk in rows.chunks():
            # fresh memory for the fp64 copy of a whole chunk would cost more than the products
            for part in chunk.split(WIDENED if wide else len(chunk)):
                part = part.double() if wide else part
                total += sherman_morrison(V, part, lam) * (len(part) / rows.n)
        return total

    def _half(self, name: str, V: Tensor) -> Tensor:
        # the mean of the inverses is (I - R^T R) / lambda, R = diag(sqrt(weights)) P
        rows, lam, gram = self.rows[name], self.lambdas[name], self.gram(name, fine=True)
        scale = (rows.n * (lam + gram.norms_sq)).rsqrt()
        c, U = torch.linalg.eigh(scale[:, None] * gram.whole() * scale)
        gain = -1 / (1 + (1 - c.clamp(0, 1)).sqrt())
        return (rooted(rows, V.flatten(1).double(), scale[:, None] * U, gain) / lam**0.5).to(
            V.dtype
        )

    def _in_gram_space(self, rows: GradientRows) -> bool:
        # W minus what it loses along the rows would cancel, whatever n is
        return True

    def _gram_scores(self, name: str, seen: Seen) -> tuple[Tensor, Outcome]:
        rows, lam, dtype, L = self.rows[name], self.lambdas[name], seen.V.dtype, seen.L
        few = rows.n < GRAM_PAYS * len(seen.V)
        by_gram = rows.n < rows.width and (name in self._grams or few)
        gram = self.gram(name) if by_gram else None
        # rounded norms would be no error that the check could see
        weights = 1 / (rows.n * (lam + self.sketch(name).norms_sq))
        B = L.double() * weights
        image = rows.image(B.to(dtype)) if gram is None else gram.image(B)
        S = ((image - L.double()) / lam).to(dtype)
        error = self._error(name, seen, L, S, weights)
        precision = precision_of(dtype)
        if not error <= REFINE_ABOVE:
            # fp32 cancels where the damping is small beside the gradients
            L = seen.fine
            S = ((rows.image(L * weights) - L) / lam).to(dtype)
            error = self._error(name, seen, L, S, weights)
            precision = "fp64"
        return S, Outcome(
            backend=explain("gram_accumulate_", S, seen.V).backend,
            precision=precision,
            condition_bound=self._condition_bound(name),
            residual=error,
            converged=MARGIN * error <= RESIDUAL_LIMIT,
        )

    def _error(self, name: str, seen: Seen, L: Tensor, S: Tensor, weights: Tensor) -> float:
        """The worst query's relative error of S against the formula, through the sketch of P.

        ((L diag(w)) K X - L X) / lambda is exact but for L diag(w), where the rounded L serves;
        what its rounding (known through X) does there is added as that of independent errors.
        """
        sketch, lam, L = self.sketch(name), self.lambdas[name], L.double()
        LX = seen.through(sketch)
        weighted = weights[:, None] * sketch.image
        gap = S.double() @ sketch.X - (L @ weighted - LX) / lam
        rounding = (L @ sketch.X - LX).square().sum(1)
        rounding = rounding * weighted.square().sum() / sketch.X.square().sum() / lam**2
        total = (gap.square().sum(1) + rounding) / sketch.X.shape[1]
        return worst_ratio(total.sqrt()[:, None], S)

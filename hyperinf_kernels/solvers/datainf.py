"""DataInf: swap mean and inverse, then invert each rank-1 term by Sherman and Morrison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import explain, sherman_morrison
from .flat import FlatSolver
from .gram import REFINE_ABOVE, Seen, rooted, worst_ratio
from .planning import GRAM_PAYS
from .report import RESIDUAL_LIMIT, Outcome, precision_of
from .rows import GradientRows

PROBES = 4


class DataInf(FlatSolver):
    """W = V mean_i (g_i g_i^T + lambda I)^-1 on flattened gradients (arXiv 2310.00902).

    A closed form: nothing is solved, so the report's residual is the largest relative error of a
    few query rows against the same formula in fp64, which replaces the result if it is over 1e-3.
    How far the swap of mean and inverse is from the
    exact method is not in it; run `method="exact"` to see.
    `scores` of the kept rows are ((1/n) L diag(1 / (lambda + diag K)) K - L) / lambda, by K where
    it is at hand or cheaper (n < 4 m), else by two more products with P; there the residual is the
    relative error of the worst query's scores, measured on random combinations of training rows.
    """

    method = "datainf"

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1)
        W = self._mean(name, flat, None)
        places = _spread_rows(flat)
        exact = self._mean(name, flat[places].double(), torch.float64)
        errors = (W[places].double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
        error = float(errors.max())
        if error > RESIDUAL_LIMIT:
            # fp32 cancels where the damping is small beside the gradients
            W = self._mean(name, flat.double(), torch.float64).to(W.dtype)
            error = float(((W[places].double() - exact).norm(dim=1) / exact.norm(dim=1)).max())
        outcome = Outcome(
            backend=explain("sherman_morrison", W).backend,
            precision=precision_of(W.dtype),
            condition_bound=self._condition_bound(name),
            residual=error,
            converged=error <= RESIDUAL_LIMIT,
        )
        return W.view_as(V), outcome

    def _mean(self, name: str, V: Tensor, dtype: torch.dtype | None) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        total = torch.zeros_like(V)
        for _, chunk in rows.chunks(dtype):
            total += sherman_morrison(V, chunk, lam) * (len(chunk) / rows.n)
        return total

    def _half(self, name: str, V: Tensor) -> Tensor:
        # the mean of the inverses is (I - R^T R) / lambda, R = diag(sqrt(weights)) P
        rows, lam, gram = self.rows[name], self.lambdas[name], self.gram(name)
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
            converged=error <= RESIDUAL_LIMIT,
        )

    def _error(self, name: str, seen: Seen, L: Tensor, S: Tensor, weights: Tensor) -> float:
        """The worst query's relative error of S against the formula, through the sketch of P.

        ((L diag(w)) K X - L X) / lambda is exact but for L diag(w), where the rounded L serves;
        what its rounding (known through X) does there is added as that of independent errors.
        """
        sketch, lam, L = self.sketch(name), self.lambdas[name], L.double()
        weighted = weights[:, None] * sketch.image
        gap = S.double() @ sketch.X - (L @ weighted - seen.LX) / lam
        rounding = (L @ sketch.X - seen.LX).square().sum(1)
        rounding = rounding * weighted.square().sum() / sketch.X.square().sum() / lam**2
        total = (gap.square().sum(1) + rounding) / sketch.X.shape[1]
        return worst_ratio(total.sqrt()[:, None], S)


def _spread_rows(V: Tensor) -> Tensor:
    """A few rows to check: evenly spaced in the order of their norms, the extremes included."""
    order = V.norm(dim=1).argsort()
    places = torch.linspace(0, len(V) - 1, min(PROBES, len(V))).round().long()
    return order[places.to(order.device)]

"""DataInf: swap mean and inverse, then invert each rank-1 term by Sherman and Morrison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import explain, sherman_morrison
from .flat import FlatSolver
from .report import RESIDUAL_LIMIT, Outcome, precision_of

PROBES = 4


class DataInf(FlatSolver):
    """W = V mean_i (g_i g_i^T + lambda I)^-1 on flattened gradients (arXiv 2310.00902).

    A closed form: nothing is solved, so the report's residual is the largest relative error of a
    few query rows against the same formula in fp64, which replaces the result if it is over 1e-3.
    How far the swap of mean and inverse is from the
    exact method is not in it; run `method="exact"` to see.
    """

    method = "datainf"

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1)
        W = self._mean(name, flat, None)
        probes = _probes(flat)
        exact = self._mean(name, flat[probes].double(), torch.float64)
        errors = (W[probes].double() - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-300)
        error = float(errors.max())
        if error > RESIDUAL_LIMIT:
            # fp32 cancels where the damping is small beside the gradients
            W = self._mean(name, flat.double(), torch.float64).to(W.dtype)
            error = float(((W[probes].double() - exact).norm(dim=1) / exact.norm(dim=1)).max())
        outcome = Outcome(
            backend=explain("sherman_morrison", W).backend,
            precision=precision_of(W),
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


def _probes(V: Tensor) -> Tensor:
    """A few rows to check: evenly spaced in the order of their norms, the extremes included."""
    order = V.norm(dim=1).argsort()
    places = torch.linspace(0, len(V) - 1, min(PROBES, len(V))).round().long()
    return order[places.to(order.device)]

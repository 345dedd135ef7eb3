"""DataInf: swap mean and inverse, then invert each rank-1 term by Sherman and Morrison."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import explain, sherman_morrison
from .flat import FlatSolver
from .report import Outcome

ROUNDING_LIMIT = 1e-3


class DataInf(FlatSolver):
    """W = V mean_i (g_i g_i^T + lambda I)^-1 on flattened gradients (arXiv 2310.00902).

    A closed form: nothing is solved, so the report's residual is the relative error of the largest
    query row against the same formula in fp64. How far the swap of mean and inverse is from the
    exact method is not in it; run `method="exact"` to see.
    """

    method = "datainf"

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1)
        W = self._mean(name, flat, None)
        probe = int(flat.norm(dim=1).argmax())
        exact = self._mean(name, flat[probe : probe + 1].double(), torch.float64)
        size = float(exact.norm())
        error = float((W[probe].double() - exact[0]).norm()) / size if size else 0.0
        outcome = Outcome(
            backend=explain("sherman_morrison", W).backend,
            precision=str(W.dtype).removeprefix("torch."),
            condition_bound=self._condition_bound(name),
            residual=error,
            converged=error <= ROUNDING_LIMIT,
        )
        return W.view_as(V), outcome

    def _mean(self, name: str, V: Tensor, dtype: torch.dtype | None) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        total = torch.zeros_like(V)
        for _, chunk in rows.chunks(dtype):
            total += sherman_morrison(V, chunk, lam) * (len(chunk) / rows.n)
        return total

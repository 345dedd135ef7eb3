"""Exact influence under the flattened empirical Fisher, in the cheaper of two forms."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .flat import FlatSolver, relative
from .report import RESIDUAL_LIMIT, Outcome

MAX_REFINEMENTS = 5
EPS32 = torch.finfo(torch.float32).eps
FINE_GRAM = 0.1  # fp32 rounding over damping at which refinement would no longer contract


class Exact(FlatSolver):
    """W = V (P^T P / n + lambda I)^-1, P (n, D) the flattened training gradients.

    Primal (D <= n): one D x D Cholesky. Gram form (n < D): by Woodbury
    W = (V - V P^T (P P^T + n lambda I)^-1 P) / lambda, one n x n Cholesky for all queries. Both
    factor in fp64 and refine with fp64 residuals against P itself until only the rounding of W is
    left; the Gram matrix is formed in fp32, or in fp64 where the damping is too small for that.
    """

    method = "exact"

    def reset(self) -> None:
        super().reset()
        self._factors: dict[str, Tensor] = {}
        self._spread = 0.0  # root mean square eigenvalue of the block factored last

    def _fit_block(self, name: str, lam: float) -> None:
        super()._fit_block(name, lam)
        self._factors.pop(name, None)

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1).double()
        W = self._approximate(name, flat).to(V.dtype)
        E = self._residual(name, flat, W)
        refinements = 0
        # W is judged as delivered: what its rounding leaves behind, scattered evenly over the
        # directions of A, ends the refinement
        gain = self._spread * float(W.norm()) / max(float(V.norm()), 1e-300)
        enough = torch.finfo(W.dtype).eps * (0.5 + 0.5 * gain)
        while relative(E, flat) > enough and refinements < MAX_REFINEMENTS:
            better = (W.double() + self._approximate(name, E)).to(V.dtype)
            E_better = self._residual(name, flat, better)
            if relative(E_better, flat) >= relative(E, flat) / 2:
                break
            W, E, refinements = better, E_better, refinements + 1
        residual = relative(E, flat)
        outcome = Outcome(
            precision="fp64",
            condition_bound=self._condition_bound(name),
            products=1,
            iterations=refinements,
            residual=residual,
            converged=residual <= RESIDUAL_LIMIT,
        )
        return W.view_as(V), outcome

    def _approximate(self, name: str, V: Tensor) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        if rows.width <= rows.n:
            return torch.cholesky_solve(V.mT, self._factor(name)).mT
        B = torch.cholesky_solve(rows.dots(V).mT, self._factor(name)).mT
        return (V - rows.combine(B)) / lam

    def _factor(self, name: str) -> Tensor:
        if name not in self._factors:
            rows, lam = self.rows[name], self.lambdas[name]
            if rows.width <= rows.n:
                A, shift = rows.second_moment() / rows.n, lam
            else:
                bound = self._condition_bound(name) or float("inf")
                fine = torch.float64 if bound * EPS32 > FINE_GRAM else None
                A, shift = rows.gram(fine).double(), rows.n * lam
            scale = 1 if rows.width <= rows.n else rows.n
            self._spread = float(A.norm()) / scale / rows.width**0.5
            A.diagonal().add_(shift)
            factor, info = torch.linalg.cholesky_ex(A)
            if int(info) > 0:
                raise InputError(
                    f"block {name}: curvature plus damping {lam:g} is not positive definite in "
                    "fp64; increase the damping"
                )
            self._factors = {name: factor}
        return self._factors[name]

"""Exact influence under the flattened empirical Fisher, in the cheaper of two forms."""

from __future__ import annotations

import torch
from torch import Tensor

from .block_gram import BlockGram, not_definite
from .flat import FlatSolver, relative
from .gram import Seen, Span, rooted, seen_residual
from .report import Outcome, precision_of

MAX_REFINEMENTS = 5
REFINE_ABOVE = 1e-5  # residual of scores at which one reading of P in fp64 is worth its time


class Exact(FlatSolver):
    """W = V (P^T P / n + lambda I)^-1, P (n, D) the flattened training gradients.

    Primal (D <= n): one D x D Cholesky. Gram form (n < D): by Woodbury
    W = (V - V P^T (P P^T + n lambda I)^-1 P) / lambda, one n x n Cholesky for all queries. Both
    factor in fp64 and refine with fp64 residuals against P itself until only the rounding of W is
    left; the Gram matrix is formed in fp32, or in fp64 where the damping is too small for that.
    `scores` of the kept rows are -n L (K + n lambda I)^-1, which does not cancel, refined in the
    same way where their residual is over 1e-5.
    """

    method = "exact"

    def reset(self) -> None:
        super().reset()
        self._primal: tuple[str, float, int, Tensor] | None = None  # the latest D x D factor

    def _span(self, gram: BlockGram, V: Tensor, L: Tensor, lam: float) -> Span:
        X = gram.solve(L, lam)
        return Span(1 / lam, X / -lam, scores=-gram.n * X)

    def _gram_scores(self, name: str, V: Tensor, seen: Seen) -> tuple[Tensor, Outcome]:
        S, outcome = super()._gram_scores(name, V, seen)
        residual = outcome.residual or 0.0
        if residual <= REFINE_ABOVE:
            return S, outcome
        gram, rows, lam = self.gram(name), self.rows[name], self.lambdas[name]
        E, residual = seen_residual(rows, V, S, lam)
        S64, refinements = S.double(), 0
        while residual > REFINE_ABOVE and refinements < MAX_REFINEMENTS:
            S64 = S64 - gram.n * gram.solve(E, lam)
            better = S64.to(V.dtype)
            E, after = seen_residual(rows, V, better, lam)
            if not after < residual:
                break
            gained = after < residual / 2
            S, residual, refinements = better, after, refinements + 1
            if not gained:
                break
        return S, self._judged(name, residual, refinements, precision_of(gram.dtype))

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1).double()
        W = self._approximate(name, flat).to(V.dtype)
        E = self._residual(name, flat, W)
        refinements = 0
        # W is judged as delivered: what its rounding leaves behind, scattered evenly over the
        # directions of A, ends the refinement
        gain = self._spread(name) * float(W.norm()) / max(float(V.norm()), 1e-300)
        enough = torch.finfo(W.dtype).eps * (0.5 + 0.5 * gain)
        while relative(E, flat) > enough and refinements < MAX_REFINEMENTS:
            better = (W.double() + self._approximate(name, E)).to(V.dtype)
            E_better = self._residual(name, flat, better)
            if relative(E_better, flat) >= relative(E, flat) / 2:
                break
            W, E, refinements = better, E_better, refinements + 1
        return W.view_as(V), self._judged(name, relative(E, flat), refinements, "fp64")

    def _approximate(self, name: str, V: Tensor) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        if rows.width <= rows.n:
            return torch.cholesky_solve(V.mT, self._factor(name)).mT
        return (V - rows.combine(self.gram(name).solve(rows.dots(V), lam))) / lam

    def _spread(self, name: str) -> float:
        """Root mean square eigenvalue of the undamped Fisher."""
        rows = self.rows[name]
        if rows.width <= rows.n:
            return float(self.moment(name).norm()) / rows.width**0.5
        return self.gram(name).norm / rows.n / rows.width**0.5

    def _factor(self, name: str) -> Tensor:
        key = (name, self.lambdas[name], self.rows[name].n)
        if self._primal is None or self._primal[:3] != key:
            A = self.moment(name).clone()
            A.diagonal().add_(self.lambdas[name])
            factor, info = torch.linalg.cholesky_ex(A)
            if int(info) > 0:
                raise not_definite(name, self.lambdas[name])
            self._primal = (*key, factor)
        return self._primal[3]

    def _half(self, name: str, V: Tensor) -> Tensor:
        rows, lam = self.rows[name], self.lambdas[name]
        flat = V.flatten(1).double()
        if rows.width <= rows.n:
            mu, U = torch.linalg.eigh(self.moment(name))
            root = (flat @ U * (mu.clamp_min(0) + lam).rsqrt()) @ U.mT
        else:
            # (sqrt(n lam / (k + n lam)) - 1) / k without cancellation, also where k = 0
            k, U = self.gram(name, fine=True).diagonalise()
            whole, floor = (k + rows.n * lam).sqrt(), (rows.n * lam) ** 0.5
            root = rooted(rows, flat, U, -1 / (whole * (whole + floor))) / lam**0.5
        return root.to(V.dtype)

"""Exact influence under the flattened empirical Fisher, in the cheaper of two forms."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .block_gram import not_definite
from .flat import FlatSolver
from .gram import Seen, gap, rooted, worst_ratio
from .judging import Attempt
from .report import RESIDUAL_LIMIT, Outcome, with_rounding

MAX_REFINEMENTS = 5


class Exact(FlatSolver):
    """W = V (P^T P / n + lambda I)^-1, P (n, D) the flattened training gradients.

    Primal (D <= n): one D x D Cholesky. Gram form (n < D): by Woodbury
    W = (V - V P^T (P P^T + n lambda I)^-1 P) / lambda, one n x n Cholesky for all queries. Both
    factor in fp64 and refine with fp64 residuals against P itself until only the rounding of W is
    left; the Gram matrix is formed in fp32, or in fp64 where the damping is too small for that.
    `scores` of the kept rows are -n L (K + n lambda I)^-1, which does not cancel, refined in the
    same way where their error is over 1e-5, with K in fp64 where that does not suffice.
    """

    method = "exact"

    def reset(self) -> None:
        super().reset()
        self._primal: tuple[str, float, int, Tensor] | None = None  # the latest D x D factor

    def _gram_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        rows, lam = self.rows[name], self.lambdas[name]
        for fine in (False, True):
            gram = self.gram(name, fine=fine)
            L = seen.fine if gram.dtype == torch.float64 else seen.L.double()
            S, size = -gram.n * gram.solve(L, lam), math.inf
            yield self._gram_attempt(name, seen, S, 0, gram.dtype)
            for refinement in range(1, MAX_REFINEMENTS + 1):
                step = gram.n * gram.solve(gap(rows, seen.V, S, lam), lam)
                S = S - step
                yield self._gram_attempt(name, seen, S, refinement, gram.dtype)
                before, size = size, worst_ratio(step, S)
                if not size < before / 2:
                    break
            if gram.dtype == torch.float64:
                return

    def _primal_attempts(self, name: str, seen: Seen) -> Iterator[Attempt]:
        V = seen.V.double()
        W, outcome = self._directions(name, V, torch.float64)
        yield self._primal_attempt(name, V, W, outcome.iterations)

    def _directions(self, name: str, V: Tensor, dtype: torch.dtype) -> tuple[Tensor, Outcome]:
        W = self._approximate(name, V).to(dtype)
        if self.check == "off":
            return W, self._unchecked(name, 0, "fp64")
        E = self._residual(name, V, W)
        refinements = 0
        # W is judged as delivered: what its rounding leaves behind, scattered evenly over the
        # directions of A, ends the refinement
        gain = self._spread(name) * float(W.norm()) / max(float(V.norm()), 1e-300)
        enough = torch.finfo(dtype).eps * (0.5 + 0.5 * gain)
        while worst_ratio(E, V) > enough and refinements < MAX_REFINEMENTS:
            better = (W.double() + self._approximate(name, E)).to(dtype)
            E_better = self._residual(name, V, better)
            if worst_ratio(E_better, V) >= worst_ratio(E, V) / 2:
                break
            W, E, refinements = better, E_better, refinements + 1
        outcome = self._judged(name, worst_ratio(E, V), refinements, "fp64")
        if not outcome.converged:
            before = self._residual(name, V, self._approximate(name, V))
            outcome = with_rounding(outcome, worst_ratio(before, V), RESIDUAL_LIMIT, dtype)
        return W, outcome

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

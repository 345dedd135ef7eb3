"""Conjugate gradients on the flattened Fisher, one recurrence per query row."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .block_gram import BlockGram
from .damping import DEFAULT_DAMPING, Damping
from .gram import Span
from .iterative import IterativeSolver
from .planning import cg_steps, condition_bound
from .report import RESIDUAL_LIMIT, Check


@dataclass
class Space:
    """Vectors as rows x in coordinates where the metric and the operator are small.

    `metric(x)` gives rows m with <x, y> = sum(m(x) * y); `operator(x, m(x))` gives A x.
    """

    start: Tensor
    metric: Callable[[Tensor], Tensor]
    operator: Callable[[Tensor, Tensor], Tensor]


class CG(IterativeSolver):
    """W A = V with A = H + lambda I by conjugate gradients, stopped per row.

    n < D: iterates stay in the span of each query and the training rows, so they are kept as n + 1
    coordinates and one step costs 2 m n^2 flop; otherwise on the D x D Fisher. In fp64.

    Args:
        damping: as for every solver.
        iterations: steps at most.
        tol: stop a row once its ||v - w A|| / ||v|| is below, or later where its scores ask for
            it. The report judges the rounded W, so there a residual of 1e-3 counts as converged.
        folder, check: as for every solver that keeps rows.
    """

    method = "cg"
    words = "steps"

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        iterations: int = 200,
        tol: float = 1e-6,
        folder: str | os.PathLike[str] | None = None,
        check: Check = "bound",
    ) -> None:
        super().__init__(damping, iterations, tol, folder, check)

    def _primal_solve(self, name: str, V: Tensor, tol: float) -> tuple[Tensor, int]:
        lam, H = self.lambdas[name], self.moment(name)
        return self._steps(Space(V, lambda x: x, lambda x, m: lam * x + x @ H), tol)

    def _steps_at_most(self, r: int, d: int, n: int) -> float:
        return cg_steps(condition_bound(self.damping, r, d, r * d), min(n + 1, r * d), self.tol)

    def _limit(self) -> float:
        # a tighter tolerance than the rounding of W can hold is met by the iterates, not by W
        return max(self.tol, RESIDUAL_LIMIT)

    def _span(self, gram: BlockGram, sizes: Tensor, L: Tensor, lam: float, tol: float) -> Span:
        X, steps = self._steps(self._gram_space(gram, sizes, L, lam), tol)
        return Span(X[:, :1], X[:, 1:], iterations=steps)

    def _gram_space(self, gram: BlockGram, sizes: Tensor, L: Tensor, lam: float) -> Space:
        """x = (a, b) stands for a v + b P."""
        times, size = gram.times(), sizes[:, None]

        def metric(x: Tensor) -> Tensor:
            a, b = x[:, :1], x[:, 1:]
            return torch.cat([a * size + (b * L).sum(1, keepdim=True), a * L + times(b)], 1)

        def operator(x: Tensor, m: Tensor) -> Tensor:
            # the metric's tail is x P^T, so H x costs nothing more
            return lam * x + torch.cat([torch.zeros_like(size), m[:, 1:] / gram.n], 1)

        start = torch.zeros(len(L), gram.n + 1, dtype=L.dtype, device=L.device)
        start[:, 0] = 1
        return Space(start, metric, operator)

    def _steps(self, space: Space, tol: float) -> tuple[Tensor, int]:
        R = space.start
        X, direction = torch.zeros_like(R), R
        R_metric = direction_metric = space.metric(R)
        rho = (R_metric * R).sum(1)
        goal = rho * tol**2
        for step in range(self.iterations):
            active = rho > goal
            if not bool(active.any()):
                return X, step
            image = space.operator(direction, direction_metric)
            curvature = (direction_metric * image).sum(1)
            alpha = torch.where(active, rho / curvature, 0)[:, None]
            X, R = X + alpha * direction, R - alpha * image
            R_metric = space.metric(R)
            fresh = (R_metric * R).sum(1).clamp_min(0)
            beta = torch.where(active, fresh / rho, 0)[:, None]
            direction = R + beta * direction
            direction_metric = R_metric + beta * direction_metric
            rho = torch.where(active, fresh, rho)
        return X, self.iterations

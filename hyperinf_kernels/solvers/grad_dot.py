"""Gradient dot (TracIn with one checkpoint, Hessian-free): the curvature is the identity."""

from __future__ import annotations

from torch import Tensor

from .base import Solver
from .report import Outcome


class GradDot(Solver):
    """W = V: influence is minus the plain dot product of gradients. Damping plays no part."""

    method = "grad_dot"
    needs_damping = False

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        return V, Outcome(residual=0.0)

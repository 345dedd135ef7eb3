"""Gradient dot (TracIn with one checkpoint, Hessian-free): the curvature is the identity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.costs import rates_of
from .base import Solver
from .inputs import Gradients
from .planning import SolvePlan, flat_work, plan
from .report import Outcome
from .rows import squares
from .scaling import TINY, Scaled


class GradDot(Solver):
    """W = V: influence is minus the plain dot product of gradients. Damping plays no part."""

    method = "grad_dot"
    needs_damping = False
    scale_free = False
    takes_dots = True

    def plan(
        self, shapes: Mapping[str, tuple[int, int]], n: int, queries: int, device: str = "cpu"
    ) -> SolvePlan:
        works = lambda r, d: flat_work(self.method, n, r * d, queries)  # noqa: E731
        return plan(shapes, n, queries, rates_of(device), works)

    def check_queries(self, queries: Gradients) -> dict[str, Scaled]:
        found = super().check_queries(queries)
        reach = torch.stack([
            (squares(V.values.flatten(1)) * self.blocks[name].top).sqrt()
            for name, V in found.items()
        ]).amax(0)  # fmt: skip
        refuse_lost((reach > 0) & (reach < TINY))
        return found

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        return V, Outcome(residual=0.0)

    def foreseen_scores(self, name: str, V: Scaled) -> Tensor | None:
        if self._foreseen is None:
            return None
        taken = self._foreseen.dots(name, V.values.flatten(1), self.blocks[name].n)
        return None if taken is None else -taken[0].mT.to(V.values.dtype)

    def _half(self, name: str, V: Tensor) -> Tensor:
        return V.flatten(1)

    def self_influence(self, grads: Gradients) -> Tensor:
        solved = self.apply(grads)
        return torch.stack([-squares(g.flatten(1)).to(g.dtype) for g in solved.values()]).sum(0)


def refuse_lost(lost: Tensor) -> None:
    """Raise InputError naming the first query (m,) whose dot products fp32 cannot hold."""
    if bool(lost.any()):
        raise InputError(
            f"grad_dot: the dot products of query {int(torch.nonzero(lost)[0])} with the training "
            f"gradients are below {TINY:.0e}, too small for fp32; rescale the loss"
        )

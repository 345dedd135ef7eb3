"""Solvers of the flattened empirical Fisher H = P^T P / n keep the training gradients as rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from .base import Solver
from .rows import GradientRows

EPS32 = torch.finfo(torch.float32).eps


class FlatSolver(Solver):
    """A solver of W (H + lambda I) = V with rows P (n, D), D = r d, per block."""

    def reset(self) -> None:
        super().reset()
        self.rows: dict[str, GradientRows] = {}

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        flat = batch.flatten(1)
        if copy and flat.data_ptr() == batch.data_ptr():
            flat = flat.clone()
        self.rows.setdefault(name, GradientRows(flat.shape[1])).append(flat)

    def _fit_block(self, name: str, lam: float) -> None:
        if lam <= 0:
            raise InputError(
                f"block {name}: {self.method} needs a positive damping, got {lam:g} from "
                f"{self.damping}: the flattened Fisher of {self.n} samples is singular without it"
            )

    def _residual(self, name: str, V: Tensor, W: Tensor) -> Tensor:
        """V - W (H + lambda I) in fp64, (m, D)."""
        rows, lam = self.rows[name], self.lambdas[name]
        W64 = W.double()
        return V.double() - lam * W64 - rows.combine(rows.dots(W64)) / rows.n

    def _floor(self, name: str, V: Tensor, W: Tensor) -> float:
        """The residual that rounding W to its dtype leaves behind at most."""
        state, lam = self.blocks[name], self.lambdas[name]
        top = state.sum_square / state.n + lam
        eps = torch.finfo(W.dtype).eps
        return min(0.5, eps * (1 + top * float(W.norm()) / max(float(V.norm()), 1e-300)))

    def _tensors(self) -> dict[str, Tensor]:
        return {name: rows.tensor() for name, rows in self.rows.items()}

    def _take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            self.rows[name] = GradientRows(tensor.shape[1])
            self.rows[name].append(tensor)


def relative(E: Tensor, V: Tensor) -> float:
    """||E||_F / ||V||_F, 0 for V = 0."""
    norm = float(V.double().norm())
    return float(E.norm()) / norm if norm else 0.0

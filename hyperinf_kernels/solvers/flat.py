"""Solvers of the flattened empirical Fisher H = P^T P / n keep the training gradients as rows."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..errors import InputError
from .base import Solver
from .rows import GradientRows


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
        if lam <= 0 and self.blocks[name].sum_square > 0:
            raise InputError(
                f"block {name}: the damping ({self.damping}) resolves to {lam:g}, but "
                f"{self.method} needs a positive one: without it the Fisher of {self.n} samples "
                "is singular"
            )

    def _residual(self, name: str, V: Tensor, W: Tensor) -> Tensor:
        """V - W (H + lambda I) in fp64, (m, D)."""
        rows, lam = self.rows[name], self.lambdas[name]
        W64 = W.double()
        return V.double() - lam * W64 - rows.combine(rows.dots(W64)) / rows.n

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

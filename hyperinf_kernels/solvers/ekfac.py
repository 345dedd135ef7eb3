"""EK-FAC: the eigenvectors of K-FAC with the Fisher's own diagonal in that basis."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.checks import accumulation_dtype
from .damping import DEFAULT_DAMPING, Damping
from .directions import Direction, norms
from .inputs import Gradients, check_shapes, row_squares
from .kfac import EPS64, KFAC, Basis, Tokens
from .report import Check
from .rows import GradientRows
from .scratch import Scratch

SAMPLES = 64  # rotated at a time, so that memory stays bounded
FINE_SQUARES = 1e-2  # times the mean square: a damping below needs rotations in fp64
EPS32 = torch.finfo(torch.float32).eps


class EKFAC(KFAC):
    """W = V F^-1 with F = Q diag(E) Q^T + lambda I, Q the eigenvectors of K-FAC (arXiv 1806.03884).

    E_oi = mean over samples of (Q_r^T g Q_c)_oi^2, from per-sample gradients, so the scale of the
    factors and the split of a gradient into tokens matter for the basis only, and the mean of E is
    the mean squared gradient entry exactly.

    Args:
        damping: as for every solver.
        two_pass: False: keep the training gradients until `fit`, like every method that needs all
            of them. True: keep only the factors, and be shown the gradients a second time by
            `revisit` after the last `update` (`Attributor` and `influence` do it by themselves).
        folder: keep the gradients in mapped files under this folder instead of memory.
        check: as for every solver.
    """

    method = "ekfac"

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        two_pass: bool = False,
        folder: str | os.PathLike[str] | None = None,
        check: Check = "bound",
    ) -> None:
        self.second_pass = two_pass
        self.folder = None if folder is None else Path(folder)
        super().__init__(damping, check=check)

    def reset(self) -> None:
        super().reset()
        self.rows: dict[str, GradientRows] = {}
        self._scratch = None if self.folder is None else Scratch(self.folder)
        self._squares: dict[str, tuple[int, Tensor]] = {}  # samples seen, and their sum (r, d)
        self._fine: set[str] = set()  # blocks whose squares are of fp64 rotations

    @property
    def kept(self) -> Mapping[str, GradientRows] | None:
        return None if self.second_pass else self.rows

    def options(self) -> dict[str, Any]:
        return {"two_pass": self.second_pass}

    def update(self, grads: Gradients, *, copy: bool = True, tokens: Tokens | None = None) -> None:
        self._refuse_without_rows()
        super().update(grads, copy=copy, tokens=tokens)

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        self._squares.pop(name, None)
        if not self.second_pass:
            flat = batch.flatten(1).clone() if copy else batch.flatten(1)
            self._rows_of(name, flat.shape[1]).append(flat)

    def _rows_of(self, name: str, width: int) -> GradientRows:
        fresh = GradientRows(width, self._scratch, self.blocks[name].exponent)
        return self.rows.setdefault(name, fresh)

    def _rescale(self, name: str, shift: int) -> None:
        super()._rescale(name, shift)
        if name in self.rows:
            self.rows[name] = self.rows[name].rescaled(shift)

    def revisit(self, grads: Gradients) -> None:
        if not self.second_pass:
            raise InputError("this EK-FAC keeps its gradients; revisit() is for two_pass=True")
        check_shapes(grads, {name: s.shape for name, s in self.blocks.items()}, "train")
        seen = max((count for count, _ in self._squares.values()), default=0)
        for name, batch in grads.items():
            row_squares(name, batch, "train", seen)
        self.lambdas = {}
        for name, batch in grads.items():
            before, total = self._squares.get(name, (0, 0.0))
            found = self._rotated(name, [self.scaled(name, batch)])
            self._squares[name] = (before + len(batch), total + found)

    def _rotated(self, name: str, batches: Iterable[Tensor], fine: bool = False) -> Tensor:
        """Sum of the squares (r, d) of batches (B, r, d) in the basis, a few samples at a time."""
        basis = self.kronecker(name)
        total = torch.zeros_like(basis.eigenvalues)
        if fine or self._needs_fine_squares(name):
            self._fine.add(name)
        for batch in batches:
            for part in batch.split(SAMPLES):
                dtype = torch.float64 if name in self._fine else accumulation_dtype(part)
                total += basis.into(part.to(dtype)).double().square().sum(0)
        return total

    def _needs_fine_squares(self, name: str) -> bool:
        """Whether what fp32 rotations leave in a small eigenvalue counts beside the damping."""
        state = self.blocks[name]
        return self._lambda(name, state.mean_square) < FINE_SQUARES * state.mean_square

    def _doubt(self, name: str, V: Tensor, W: Tensor, image: Tensor) -> Tensor:
        # the formula is its own in the basis, so only the eigenvalues and the rotations can be off
        basis, lam, state = self.basis(name), self.lambdas[name], self.blocks[name]
        E, unit = basis.eigenvalues, EPS64 if name in self._fine else EPS32
        each = 4 * unit * (state.sum_square / state.n) ** 0.5
        off = (2 * E.sqrt() * each + each**2) / (E + lam)
        moved = norms(basis.into(W) * off * basis.into(image).square().mean(0).sqrt())
        return torch.hypot(moved, self._hidden(name, V, W, image))

    def finer(self, name: str, V: Tensor, batches: Sequence[Tensor]) -> Direction | None:
        if name in self._fine:
            return None
        self._squares[name] = (self.blocks[name].n, self._rotated(name, batches, fine=True))
        return self._direction(name, V)

    def basis(self, name: str) -> Basis:
        n, shape = self.blocks[name].n, self.blocks[name].shape
        if name not in self._squares and name in self.rows:
            samples = (chunk.view(-1, *shape) for _, chunk in self.rows[name].chunks())
            self._squares[name] = (n, self._rotated(name, samples))
        seen, total = self._squares.get(
            name, (0, torch.empty(0, dtype=torch.float64, device="cpu"))
        )
        if seen != n:
            raise InputError(
                f"block {name}: EK-FAC with two_pass=True saw {n} training rows in update() and "
                f"{seen} in revisit(); show it every batch once more before fit()"
            )
        return replace(self.kronecker(name), eigenvalues=total / n)

    def _refuse_without_rows(self) -> None:
        """A saved fit has no gradients, and the eigenvalues of more data need all of them."""
        if not self.second_pass and self.n > 0 and not self.rows:
            raise InputError(
                "this EK-FAC was restored from a saved fit, which holds no training gradients, so "
                "it cannot take further ones: fit a new one on all of them, or save one with "
                "two_pass=True, which is then shown every batch once more by revisit()"
            )

    def _merge(self, other: Self) -> None:
        self._refuse_without_rows()
        other._refuse_without_rows()
        for name, theirs in other.rows.items():
            mine = self._rows_of(name, theirs.width)
            for _, chunk in theirs.chunks():
                mine.append(chunk)
        super()._merge(other)
        self._squares.clear()

    def _restore_basis(self, name: str, basis: Basis) -> None:
        super()._restore_basis(name, basis)
        n = self.blocks[name].n
        self._squares[name] = (n, basis.eigenvalues * n)

"""EK-FAC: the eigenvectors of K-FAC with the Fisher's own diagonal in that basis."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from torch import Tensor

from ..errors import InputError
from ..ops.checks import accumulation_dtype
from .damping import DEFAULT_DAMPING, Damping
from .inputs import Gradients, check_shapes, sum_square
from .kfac import KFAC, Basis
from .rows import GradientRows
from .scratch import Scratch

SAMPLES = 64  # rotated at a time, so that memory stays bounded


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
    """

    method = "ekfac"

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        two_pass: bool = False,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.second_pass = two_pass
        self.folder = None if folder is None else Path(folder)
        super().__init__(damping)

    def reset(self) -> None:
        super().reset()
        self.rows: dict[str, GradientRows] = {}
        self._scratch = None if self.folder is None else Scratch(self.folder)
        self._squares: dict[str, tuple[int, Tensor]] = {}  # samples seen, and their sum (r, d)

    @property
    def kept(self) -> Mapping[str, GradientRows] | None:
        return None if self.second_pass else self.rows

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        super()._keep(name, batch, copy)
        self._squares.pop(name, None)
        if not self.second_pass:
            flat = batch.flatten(1).clone() if copy else batch.flatten(1)
            self.rows.setdefault(name, GradientRows(flat.shape[1], self._scratch)).append(flat)

    def revisit(self, grads: Gradients) -> None:
        if not self.second_pass:
            raise InputError("this EK-FAC keeps its gradients; revisit() is for two_pass=True")
        check_shapes(grads, {name: s.shape for name, s in self.blocks.items()}, "train")
        seen = max((count for count, _ in self._squares.values()), default=0)
        for name, batch in grads.items():
            sum_square(name, batch, "train", seen)
        for name, batch in grads.items():
            self._add_squares(name, batch)

    def _add_squares(self, name: str, batch: Tensor) -> None:
        """Add the squares of a batch (B, r, d) in the basis, a few samples at a time."""
        seen, total = self._squares.get(name, (0, None))
        for part in batch.split(SAMPLES):
            rotated = self.kronecker(name).into(part.to(accumulation_dtype(part)))
            squares = rotated.double().square().sum(0)
            total = squares if total is None else total.add_(squares)
            seen += len(part)
        if total is not None:
            self._squares[name] = (seen, total)

    def basis(self, name: str) -> Basis:
        n = self.blocks[name].n
        if name not in self._squares and name in self.rows:
            for _, chunk in self.rows[name].chunks():
                self._add_squares(name, chunk.view(-1, *self.blocks[name].shape))
        seen, total = self._squares.get(name, (0, None))
        if seen != n or total is None:
            raise InputError(
                f"block {name}: EK-FAC with two_pass=True saw {n} training rows in update() and "
                f"{seen} in revisit(); show it every batch once more before fit()"
            )
        return replace(self.kronecker(name), eigenvalues=total / n)

    def _merge(self, other: Self) -> None:
        super()._merge(other)
        self._squares.clear()
        for name, theirs in other.rows.items():
            mine = self.rows.setdefault(name, GradientRows(theirs.width, self._scratch))
            for _, chunk in theirs.chunks():
                mine.append(chunk)

    def _restore_basis(self, name: str, basis: Basis) -> None:
        super()._restore_basis(name, basis)
        n = self.blocks[name].n
        self._squares[name] = (n, basis.eigenvalues * n)

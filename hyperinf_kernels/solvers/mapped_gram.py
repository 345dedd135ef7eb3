"""Gram space out of core: K and its Cholesky factor as panels of rows in mapped files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gram import BlockGram, not_definite
from .rows import GradientRows
from .scratch import Scratch


class MappedGram:
    """A `BlockGram` whose matrices lie in files: their lower halves, one panel per chunk of rows.

    Panel i is (rows of chunk i, all rows up to its last), so one panel in fp64 is the most that is
    in memory. A product with K reads 2 n^2 bytes (fp32), the factorisation every earlier
    panel of the factor once per panel, and `solve` the factor twice.
    """

    def __init__(
        self, name: str, rows: GradientRows, dtype: torch.dtype | None, scratch: Scratch
    ) -> None:
        self.name, self.n, self._scratch = name, rows.n, scratch
        self._panels = [scratch.mapped(panel) for panel in rows.gram_panels(dtype)]
        self._factor: tuple[float, list[Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._panels[0].dtype

    @property
    def norms_sq(self) -> Tensor:
        """||g_i||^2 (n,) in fp64."""
        return torch.cat([_corner(panel).diagonal().double() for panel in self._panels])

    @property
    def norm(self) -> float:
        """||K||_F."""
        # what is left of a panel's corner stands for its mirror image too
        squares = [
            2 * float(torch.linalg.vector_norm(panel, dtype=torch.float64)) ** 2
            - float(torch.linalg.vector_norm(_corner(panel), dtype=torch.float64)) ** 2
            for panel in self._panels
        ]
        return sum(squares) ** 0.5

    @property
    def bound(self) -> float:
        """An upper bound of K's eigenvalues."""
        return min(self.norm, float(self.norms_sq.sum())) * (1 + 1e-9)

    def between(self, rows: slice) -> Tensor:
        """K[rows] (b, n)."""
        picks = torch.zeros(rows.stop - rows.start, self.n, dtype=torch.float64)
        picks[:, rows].fill_diagonal_(1)
        return self.image(picks)

    def image(self, X: Tensor) -> Tensor:
        """X K (m, n) in fp64."""
        X, out = X.double(), torch.zeros(len(X), self.n, dtype=torch.float64)
        for panel in self._panels:
            wide, start = panel.double(), panel.shape[1] - len(panel)
            out[:, : panel.shape[1]] += X[:, start : panel.shape[1]] @ wide
            out[:, start : panel.shape[1]].addmm_(X[:, :start], wide[:, :start].mT)
        return out

    def times(self) -> Callable[[Tensor], Tensor]:
        """`image`, for many calls."""
        return self.image

    def whole(self) -> Tensor:
        """K (n, n) in fp64, in memory."""
        K = torch.zeros(self.n, self.n, dtype=torch.float64)
        for panel in self._panels:
            stop = panel.shape[1]
            K[stop - len(panel) : stop, :stop] = panel
            K[:stop, stop - len(panel) : stop] = panel.mT
        return K

    def diagonalise(self) -> tuple[Tensor, Tensor]:
        """K = U diag(k) U^T in fp64, in memory and not kept."""
        k, U = torch.linalg.eigh(self.whole())
        return k.clamp_min(0), U

    def solve(self, X: Tensor, lam: float) -> Tensor:
        """X (K + n lambda I)^-1 (m, n) in fp64.

        Raises:
            InputError: K + n lambda I is not positive definite in fp64.
        """
        if self._factor is None or self._factor[0] != lam:
            self._factor = None
            self._factor = (lam, self._cholesky(lam))
        factor = self._factor[1]
        Y = _forward(factor, X.double().clone())
        for panel in reversed(factor):
            start, stop = panel.shape[1] - len(panel), panel.shape[1]
            own = torch.linalg.solve_triangular(
                _corner(panel), Y[:, start:stop], upper=False, left=False
            )
            Y[:, start:stop] = own
            Y[:, :start].addmm_(own, panel[:, :start], alpha=-1)
        return Y

    def drop_factors(self) -> None:
        """Free what `solve` keeps between calls."""
        self._factor = None

    def _cholesky(self, lam: float) -> list[Tensor]:
        """L of K + n lambda I, top panels first: they suffice for what is left of a corner."""
        factor: list[Tensor] = []
        for panel in self._panels:
            A = panel.double() if panel.dtype != torch.float64 else panel.clone()
            start = A.shape[1] - len(A)
            head, corner = A[:, :start], A[:, start:]
            _forward(factor, head)
            corner.diagonal().add_(self.n * lam)
            corner, info = torch.linalg.cholesky_ex(corner.addmm_(head, head.mT, alpha=-1))
            if int(info) > 0:
                raise not_definite(self.name, lam)
            A[:, start:] = corner
            factor.append(self._scratch.mapped(A))
        return factor


Gram = BlockGram | MappedGram


def _corner(panel: Tensor) -> Tensor:
    """The square on the diagonal."""
    return panel[:, panel.shape[1] - len(panel) :]


def _forward(factor: list[Tensor], X: Tensor) -> Tensor:
    """X L^-T in place, for X (m, as many columns as the panels given have rows)."""
    for panel in factor:
        start, stop = panel.shape[1] - len(panel), panel.shape[1]
        X[:, start:stop].addmm_(X[:, :start], panel[:, :start].mT, alpha=-1)
        X[:, start:stop] = torch.linalg.solve_triangular(
            _corner(panel).mT, X[:, start:stop], upper=True, left=False
        )
    return X

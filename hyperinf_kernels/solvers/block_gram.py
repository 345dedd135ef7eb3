"""A block's Gram matrix K and its Cholesky factor, by panels of rows: in memory or in files."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from .rows import GradientRows
from .scratch import Scratch


class BlockGram:
    """K = P P^T of one block with its latest factorisation or its eigenvectors.

    Only the lower half is kept. Panel i is (rows of chunk i, all rows up to its last), its corner
    whole; the factor has the same panels in fp64. With `scratch` both lie in files, and one panel
    is the most that is in memory: a product with K reads all panels, the factorisation every
    earlier panel of the factor once per panel, and `solve` the factor twice.
    """

    def __init__(
        self,
        name: str,
        rows: GradientRows,
        dtype: torch.dtype | None = None,
        scratch: Scratch | None = None,
    ) -> None:
        self.name, self.n, self._scratch = name, rows.n, scratch
        self._panels = [self._stored(panel) for panel in rows.gram_panels(dtype)]
        self._factor: tuple[float, list[Tensor]] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._panels[0].dtype

    @property
    def in_files(self) -> bool:
        return self._scratch is not None

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
        """An upper bound of K's eigenvalues: its trace or its Frobenius norm."""
        return min(self.norm, float(self.norms_sq.sum())) * (1 + 1e-9)

    def between(self, rows: slice) -> Tensor:
        """K[rows] (b, n)."""
        out = self._panels[0].new_empty(rows.stop - rows.start, self.n)
        for panel in self._panels:
            own = _own(panel)
            above, below = min(rows.stop, own.start), max(rows.start, own.start)
            if rows.start < above:
                out[: above - rows.start, own] = panel[:, rows.start : above].mT
            if below < min(rows.stop, own.stop):
                mine = slice(below - own.start, min(rows.stop, own.stop) - own.start)
                place = slice(below - rows.start, below - rows.start + mine.stop - mine.start)
                out[place, : own.stop] = panel[mine]
        return out

    def image(self, X: Tensor) -> Tensor:
        """X K (m, n) in fp64."""
        return _image(self._panels, X.double())

    def times(self) -> Callable[[Tensor], Tensor]:
        """`image`, for many calls."""
        panels = self._panels if self.in_files else [panel.double() for panel in self._panels]
        return lambda X: _image(panels, X.double())

    def whole(self) -> Tensor:
        """K (n, n) in fp64, in memory."""
        K = self._panels[0].new_empty(self.n, self.n, dtype=torch.float64)
        for panel in self._panels:
            own = _own(panel)
            K[own, : own.stop] = panel
            K[: own.start, own] = panel[:, : own.start].mT
        return K

    def diagonalise(self) -> tuple[Tensor, Tensor]:
        """K = U diag(k) U^T in fp64 and memory: then `solve` costs 4 m n^2 flop at any damping."""
        if self._spectrum is None:
            k, U = torch.linalg.eigh(self.whole())
            self._spectrum = (k.clamp_min(0), U)
        return self._spectrum

    def solve(self, X: Tensor, lam: float) -> Tensor:
        """X (K + n lambda I)^-1 (m, n) in fp64.

        Raises:
            InputError: K + n lambda I is not positive definite in fp64.
        """
        if self._spectrum is not None:
            k, U = self._spectrum
            return (X @ U / (k + self.n * lam)) @ U.mT
        if self._factor is None or self._factor[0] != lam:
            self._factor = None
            self._factor = (lam, self._cholesky(lam))
        factor = self._factor[1]
        Y = _forward(factor, X.double().clone())
        for panel in reversed(factor):
            own = _own(panel)
            Y[:, own] = torch.linalg.solve_triangular(
                _corner(panel), Y[:, own], upper=False, left=False
            )
            Y[:, : own.start].addmm_(Y[:, own], panel[:, : own.start], alpha=-1)
        return Y

    def definite(self, lam: float) -> bool:
        """Whether `solve` can."""
        try:
            self.solve(self._panels[0].new_zeros(0, self.n, dtype=torch.float64), lam)
        except InputError:
            return False
        return True

    def drop_factors(self) -> None:
        """Free what `solve` keeps between calls."""
        self._factor = self._spectrum = None

    def _cholesky(self, lam: float) -> list[Tensor]:
        """L of K + n lambda I, top panels first: they suffice for what is left of a corner."""
        factor: list[Tensor] = []
        for panel in self._panels:
            A = panel.to(torch.float64, copy=True)
            left, corner = A[:, : _own(A).start], _corner(A)
            _forward(factor, left)
            corner.addmm_(left, left.mT, alpha=-1).diagonal().add_(self.n * lam)
            L, info = torch.linalg.cholesky_ex(corner)
            if int(info) > 0:
                raise not_definite(self.name, lam)
            corner.copy_(L)
            factor.append(self._stored(A))
        return factor

    def _stored(self, panel: Tensor) -> Tensor:
        return panel if self._scratch is None else self._scratch.mapped(panel)


def not_definite(name: str, lam: float) -> InputError:
    return InputError(
        f"block {name}: curvature plus damping {lam:g} is not positive definite in fp64; "
        "increase the damping"
    )


def _own(panel: Tensor) -> slice:
    """The rows of K that a panel holds, which are also its last columns."""
    return slice(panel.shape[1] - len(panel), panel.shape[1])


def _corner(panel: Tensor) -> Tensor:
    return panel[:, _own(panel)]


def _image(panels: list[Tensor], X: Tensor) -> Tensor:
    out = torch.zeros_like(X)
    for panel in panels:
        own, wide = _own(panel), panel.double()
        out[:, : own.stop].addmm_(X[:, own], wide)
        out[:, own].addmm_(X[:, : own.start], wide[:, : own.start].mT)
    return out


def _forward(factor: list[Tensor], X: Tensor) -> Tensor:
    """X L^-T in place, for X (m, as many columns as the panels given have rows)."""
    for panel in factor:
        own = _own(panel)
        X[:, own].addmm_(X[:, : own.start], panel[:, : own.start].mT, alpha=-1)
        X[:, own] = torch.linalg.solve_triangular(
            _corner(panel).mT, X[:, own], upper=True, left=False
        )
    return X

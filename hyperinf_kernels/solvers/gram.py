"""Gram space: a block's K = P P^T, and influence as algebra on n x n and m x n matrices.

For every method of the flattened Fisher W = a V + B P with a number or column a and B (m, n), both
functions of K and L = V P^T alone, so the scores -W P^T = -(a L + B K) need no gradient again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.bounds import upper_bound
from .rows import GradientRows

PROBES = 12  # a norm is off by a factor of two once in 200 even where a single query counts


@dataclass(frozen=True)
class Span:
    """W = a V + B P as its coefficients, in fp64, and what finding them took.

    `scores` (m, n) is -(a L + B K), given where a form without cancellation is at hand.
    """

    a: float | Tensor
    B: Tensor
    scores: Tensor | None = None
    iterations: int = 0


class BlockGram:
    """K = P P^T of one block in memory, with its latest factorisation or its eigenvectors."""

    def __init__(self, name: str, rows: GradientRows, dtype: torch.dtype | None = None) -> None:
        self.name, self.n, self.K = name, rows.n, rows.gram(dtype)
        self._factor: tuple[float, Tensor] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.K.dtype

    @property
    def norms_sq(self) -> Tensor:
        """||g_i||^2 (n,) in fp64."""
        return self.K.diagonal().double()

    @property
    def norm(self) -> float:
        """||K||_F."""
        return float(self.K.norm())

    @property
    def bound(self) -> float:
        """An upper bound of K's eigenvalues."""
        return float(upper_bound(self.K.double()))

    def between(self, rows: slice) -> Tensor:
        """K[rows] (b, n)."""
        return self.K[rows]

    def image(self, X: Tensor) -> Tensor:
        """X K (m, n) in fp64."""
        return X.double() @ self.K.double()

    def times(self) -> Callable[[Tensor], Tensor]:
        """`image`, for many calls."""
        K = self.K.double()
        return lambda X: X.double() @ K

    def whole(self) -> Tensor:
        """K (n, n) in fp64; not to be written to."""
        return self.K.double()

    def diagonalise(self) -> tuple[Tensor, Tensor]:
        """K = U diag(k) U^T in fp64: afterwards `solve` costs 4 m n^2 flop at any damping."""
        if self._spectrum is None:
            k, U = torch.linalg.eigh(self.K.double())
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
            A = self.K.double()
            # fp64 rows make `double` return K itself
            A = A.clone() if A.data_ptr() == self.K.data_ptr() else A
            A.diagonal().add_(self.n * lam)
            factor, info = torch.linalg.cholesky_ex(A)
            if int(info) > 0:
                raise not_definite(self.name, lam)
            self._factor = (lam, factor)
        return torch.cholesky_solve(X.mT, self._factor[1]).mT

    def drop_factors(self) -> None:
        """Free what `solve` keeps between calls."""
        self._factor = self._spectrum = None


def not_definite(name: str, lam: float) -> InputError:
    return InputError(
        f"block {name}: curvature plus damping {lam:g} is not positive definite in fp64; "
        "increase the damping"
    )


class Seen(NamedTuple):
    """Queries V as a block's training rows see them, whatever the method and the damping.

    `L` (m, n) is V P^T in V's dtype, `LX` (m, s) its product with a `Sketch`'s X, in fp64 from P
    and V themselves.
    """

    L: Tensor
    LX: Tensor


class Sketch:
    """P seen by a few random sign vectors X (n, s), in fp64: what every check of scores needs.

    For a matrix E with n columns ||E X||_F^2 / s is ||E||_F^2 on average, so an error or a residual
    of all queries at any damping is measured without reading P again.
    """

    def __init__(self, rows: GradientRows) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (rows.n, PROBES), generator=generator, dtype=torch.float64)
        _, first = next(rows.chunks())
        self.n, self.X = rows.n, (2 * signs - 1).to(first.device)
        # P^T X (D, s), K X (n, s), and while P is read anyway diag K (n,) to fp64
        self.rows, self.image, self.norms_sq = rows.sketch(self.X)

    def residual(self, LX: Tensor, S: Tensor, lam: float) -> float:
        """||(V - W A) P^T||_F / ||V P^T||_F, about, from L X and the delivered S = -W P^T."""
        E = LX + S.double() @ (self.image / self.n + lam * self.X)
        return ratio(E, LX)


def seen_residual(rows: GradientRows, V: Tensor, S: Tensor, lam: float) -> tuple[Tensor, float]:
    """(V - W A) P^T (m, n) itself, in fp64 and one reading of P, and its size beside V P^T."""
    S64 = S.double()
    L, image = rows.probe(V.double(), S64)
    E = L + image / rows.n + lam * S64
    return E, ratio(E, L)


def ratio(E: Tensor, L: Tensor) -> float:
    """||E||_F / ||L||_F, ||E||_F itself for L = 0."""
    norm = float(L.norm())
    return float(E.norm()) / norm if norm else float(E.norm())


def rooted(rows: GradientRows, V: Tensor, U: Tensor, gain: Tensor) -> Tensor:
    """V (I + P^T U diag(gain) U^T P), (m, D), for V (m, D) and U (n, n) in fp64."""
    return V + rows.combine((rows.dots(V) @ U * gain) @ U.mT)

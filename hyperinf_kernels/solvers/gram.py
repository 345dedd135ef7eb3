"""Gram space: a block's K = P P^T, and influence as algebra on n x n and m x n matrices.

For every method of the flattened Fisher W = a V + B P with a number or column a and B (m, n), both
functions of K and L = V P^T alone, so the scores -W P^T = -(a L + B K) need no gradient again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from .rows import GradientRows

PROBES = 8


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
    """K = P P^T of one block, with its latest factorisation or its eigenvectors."""

    def __init__(self, name: str, rows: GradientRows, K: Tensor) -> None:
        self.name, self.rows, self.K, self.n = name, rows, K, rows.n
        self._factor: tuple[float, Tensor] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @property
    def norms_sq(self) -> Tensor:
        """||g_i||^2 (n,) in fp64."""
        return self.K.diagonal().double()

    def image(self, X: Tensor) -> Tensor:
        """X K (m, n) in fp64."""
        return X.double() @ self.K.double()

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
                raise InputError(
                    f"block {self.name}: curvature plus damping {lam:g} is not positive definite "
                    "in fp64; increase the damping"
                )
            self._factor = (lam, factor)
        return torch.cholesky_solve(X.mT, self._factor[1]).mT

    def drop_factors(self) -> None:
        """Free what `solve` keeps between calls."""
        self._factor = self._spectrum = None


def probes(m: int, device: torch.device) -> Tensor:
    """Z (s, m) with E ||Z E||^2 = s ||E||^2: every row where m is small, random signs otherwise."""
    if m <= PROBES:
        return torch.eye(m, dtype=torch.float64, device=device)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PROBES, m), generator=generator, dtype=torch.float64)
    return (2 * signs - 1).to(device)


def seen_residual(
    rows: GradientRows, V: Tensor, S: Tensor, lam: float, every: bool = False
) -> tuple[Tensor, float]:
    """What V - W (H + lambda I) leaves behind as the training rows see it, from S = -W P^T.

    Args:
        V: (m, D) queries. S: (m, n) scores as delivered.
        every: all queries, not a few combinations of them with random signs.

    Returns:
        E = (V - W A) P^T = L + S (K / n + lambda I) of these combinations, fp64 and from P itself,
        and ||E||_F / ||L||_F.
    """
    m = len(V)
    Z = torch.eye(m, dtype=torch.float64, device=V.device) if every else probes(m, V.device)
    V64, S64 = (V.double(), S.double()) if len(Z) == m else (Z @ V.double(), Z @ S.double())
    L, image = rows.probe(V64, S64)
    E = L + image / rows.n + lam * S64
    norm = float(L.norm())
    return E, float(E.norm()) / norm if norm else float(E.norm())


def rooted(rows: GradientRows, V: Tensor, U: Tensor, gain: Tensor) -> Tensor:
    """V (I + P^T U diag(gain) U^T P), (m, D), for V (m, D) and U (n, n) in fp64."""
    return V + rows.combine((rows.dots(V) @ U * gain) @ U.mT)

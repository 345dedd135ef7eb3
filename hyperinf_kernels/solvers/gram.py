"""Gram space: a block's K = P P^T, and influence as algebra on n x n and m x n matrices.

For every method of the flattened Fisher W = a V + B P with a number or column a and B (m, n), both
functions of K and L = V P^T alone, so the scores -W P^T = -(a L + B K) need no gradient again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

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

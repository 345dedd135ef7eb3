"""Gram space: a block's K = P P^T, and influence as algebra on n x n and m x n matrices.

For every method of the flattened Fisher W = a V + B P with a number or column a and B (m, n), both
functions of K and L = V P^T alone, so the scores -W P^T = -(a L + B K) need no gradient again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .rows import GradientRows

REFINE_ABOVE = 1e-5  # error of scores at which one reading of P in fp64 is worth its time
PROBES = 12  # a norm is off by a factor of two once in 200 even where a single query counts


@dataclass(frozen=True)
class Span:
    """W = a V + B P as its coefficients, in fp64, and what finding them took."""

    a: float | Tensor
    B: Tensor
    iterations: int = 0


class Seen:
    """Queries V (m, D) as a block's training rows see them, whatever the method and the damping.

    `L` (m, n) is V P^T in V's dtype, `LX` (m, s) its product with a `Sketch`'s X, in fp64 from P
    and V themselves.
    """

    def __init__(self, rows: GradientRows, V: Tensor, L: Tensor, LX: Tensor) -> None:
        self.rows, self.V, self.L, self.LX = rows, V, L, LX

    @cached_property
    def fine(self) -> Tensor:
        """V P^T in fp64."""
        return self.rows.dots(self.V.double())


class Sketch:
    """P seen by a few random sign vectors X (n, s), in fp64: what every check of scores needs.

    For a matrix E with n columns ||E X||^2 / s is ||E||^2 on average, row by row, so an error or a
    residual of all queries at any damping is measured without reading P again.
    """

    def __init__(self, rows: GradientRows) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (rows.n, PROBES), generator=generator, dtype=torch.float64)
        _, first = next(rows.chunks())
        self.n, self.X = rows.n, (2 * signs - 1).to(first.device)
        # P^T X (D, s), K X (n, s), and while P is read anyway diag K (n,) to fp64
        self.rows, self.image, self.norms_sq = rows.sketch(self.X)

    def residual(self, seen: Seen, S: Tensor, lam: float) -> float:
        """||E|| / ||V P^T||, about, for E = (V - W A) P^T and S = -W P^T; the worst query's."""
        return worst_ratio(self._gap(seen, S, lam), seen.L)

    def error(self, seen: Seen, S: Tensor, lam: float) -> float:
        """A bound, about, of the relative error of S against -V A^-1 P^T; the worst query's.

        S is off by E (K / n + lambda I)^-1, which is at most ||E|| / lambda.
        """
        return worst_ratio(self._gap(seen, S, lam), lam * S.double())

    def _gap(self, seen: Seen, S: Tensor, lam: float) -> Tensor:
        E = seen.LX + S.double() @ (self.image / self.n + lam * self.X)
        return E / PROBES**0.5


class InvertedSketch:
    """A sketch through Y = (K / n + lambda I)^-1 X: the error of exact scores itself, no bound.

    E Y is what the error E (K / n + lambda I)^-1 of S does to X. One more reading of P per damping.
    """

    def __init__(self, rows: GradientRows, Y: Tensor, lam: float) -> None:
        self.rows, image, _ = rows.sketch(Y)
        self.image = image / rows.n + lam * Y

    def error(self, V: Tensor, S: Tensor) -> float:
        """The relative error, about, of S (m, n) for V (m, D); the worst query's."""
        E = V.double() @ self.rows + S.double() @ self.image
        return worst_ratio(E / PROBES**0.5, S)


def gap(rows: GradientRows, V: Tensor, S: Tensor, lam: float) -> Tensor:
    """(V - W A) P^T (m, n) for S = -W P^T, in fp64 and one reading of P."""
    L, image = rows.probe(V.double(), S)
    return L + image / rows.n + lam * S


def worst_ratio(E: Tensor, V: Tensor) -> float:
    """The largest ||E_q|| / ||V_q|| over rows q; ||E_q|| itself where V_q is zero."""
    size = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64)
    ratios = torch.linalg.vector_norm(E, dim=1, dtype=torch.float64)
    return float((ratios / torch.where(size > 0, size, 1.0)).max()) if len(V) else 0.0


def rooted(rows: GradientRows, V: Tensor, U: Tensor, gain: Tensor) -> Tensor:
    """V (I + P^T U diag(gain) U^T P), (m, D), for V (m, D) and U (n, n) in fp64."""
    return V + rows.combine((rows.dots(V) @ U * gain) @ U.mT)

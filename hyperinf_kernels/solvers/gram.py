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

REFINE_ABOVE = 1e-5  # error of scores at which better ones are worth another reading of P
PROBES = 4  # a mean over 4 lay within 0.35 and 2.1 of the true norm in 2,880 trials
MARGIN = 10  # certified when this many times an estimate is within the limit: 2 in 10,000 are not
QUERIES = 64  # taken to fp64 at a time


@dataclass(frozen=True)
class Span:
    """W = a V + B P as its coefficients, in fp64, and what finding them took."""

    a: float | Tensor
    B: Tensor
    iterations: int = 0


class Seen:
    """Queries V (m, D) as a block's training rows see them, whatever the method and the damping.

    `L` (m, n) is V P^T in V's dtype.
    """

    def __init__(self, rows: GradientRows, V: Tensor, L: Tensor, own: slice | None = None) -> None:
        self.rows, self.V, self.L, self.own = rows, V, L, own
        self._through: tuple[Sketch, Tensor] | None = None

    @cached_property
    def fine(self) -> Tensor:
        """V P^T in fp64."""
        return self.rows.dots(self.V, torch.float64)

    def through(self, sketch: Sketch) -> Tensor:
        """L X (m, s) in fp64, from P and V themselves; `own`: these are rows of P."""
        if self.own is not None:
            return sketch.image[self.own]
        if self._through is None or self._through[0] is not sketch:
            parts = [V.double() @ sketch.seen.mT for V in self.V.split(QUERIES)]
            self._through = (sketch, torch.cat(parts))
        return self._through[1]


class Sketch:
    """P seen by a few vectors X (n, s), in fp64: what every check of scores needs.

    With random signs ||E X||^2 / s is ||E||^2 on average for a matrix E with n columns, row by row,
    so an error or a residual of all queries at any damping is known without reading P again.
    """

    def __init__(self, rows: GradientRows, X: Tensor) -> None:
        self.n, self.X = rows.n, X
        # X^T P (s, D) and K X (n, s)
        self.seen, self.image = rows.sketch(X)

    @staticmethod
    def by_signs(rows: GradientRows) -> Sketch:
        """Through random signs, the same for every block of n rows."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(
            0, 2, (rows.n, PROBES), generator=generator, dtype=torch.float64, device="cpu"
        )
        _, first = next(rows.chunks())
        return Sketch(rows, (2 * signs - 1).to(first.device))

    def gap(self, seen: Seen, S: Tensor, lam: float) -> Tensor:
        """||E_q||, about, (m,), for E = (V - W A) P^T and S = -W P^T.

        With X = (K / n + lambda I)^-1 of random signs: the error of the scores itself, since
        S + V A^-1 P^T = E (K / n + lambda I)^-1.
        """
        E = seen.through(self) + S.double() @ (self.image / self.n + lam * self.X)
        return torch.linalg.vector_norm(E, dim=1) / PROBES**0.5


def gap(rows: GradientRows, V: Tensor, S: Tensor, lam: float) -> Tensor:
    """(V - W A) P^T (m, n) for S = -W P^T, in fp64 and one reading of P."""
    L, image = rows.probe(V.double(), S)
    return L + image / rows.n + lam * S


def ratios(sizes: Tensor, of: Tensor) -> Tensor:
    """sizes (m,) / ||of_q|| over the rows of `of`; sizes themselves where these are zero."""
    whole = torch.linalg.vector_norm(of, dim=1, dtype=torch.float64)
    return sizes / torch.where(whole > 0, whole, 1.0)


def worst_ratio(E: Tensor, V: Tensor) -> float:
    """The largest ||E_q|| / ||V_q|| over rows q; ||E_q|| itself where V_q is zero."""
    sizes = torch.linalg.vector_norm(E, dim=1, dtype=torch.float64)
    return float(ratios(sizes, V).max()) if len(V) else 0.0


def rooted(rows: GradientRows, V: Tensor, U: Tensor, gain: Tensor) -> Tensor:
    """V (I + P^T U diag(gain) U^T P), (m, D), for V (m, D) and U (n, n) in fp64."""
    return V + rows.combine((rows.dots(V) @ U * gain) @ U.mT)

"""W = V A^-1 of one block, and what is known of its error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .report import Outcome

PROBES = 4


class Sight(NamedTuple):
    """Scored rows P (n, D) as a few normal X (n, s) see them: `image` = X^T P (s, r, d) in fp64."""

    image: Tensor


@dataclass(frozen=True)
class Direction:
    """W (m, r, d) as it is delivered, and how it was found.

    Attributes:
        outcome: judged by W's residual.
        lost: W before it was rounded minus W, in W's dtype; None where nothing more is known.
        doubt: the size (m,), about, of ||(W - V A^-1) P^T|| of W before it was rounded, for the
            rows P that a `Sight` shows. None: nothing is known.
        turn: degrees between V and W.
    """

    W: Tensor
    outcome: Outcome
    lost: Tensor | None = None
    doubt: Callable[[Sight], Tensor] | None = None
    turn: float | None = None

    @property
    def wide(self) -> Tensor:
        """W in fp64, to about 48 bits of what it was before it was rounded."""
        W = self.W.double()
        return W if self.lost is None else W + self.lost

    def scaled(self, W: Tensor, outcome: Outcome, unit: float, powers: Tensor | None) -> Direction:
        """The same where rows are given in other units.

        Args:
            W: what is delivered there. unit: of their rows in these. powers: (m,), of their scores
                in these, or None for 1.
        """
        doubt, column = self.doubt, None if powers is None else powers.view(-1, 1, 1)
        lost = None
        if self.lost is not None:
            wide = self.wide * unit if column is None else self.wide * unit * column
            lost = (wide - W).to(W.dtype)

        def moved(sight: Sight) -> Tensor:
            assert doubt is not None
            size = doubt(Sight(sight.image * unit))
            return size if powers is None else size * powers

        there = moved if doubt is not None else None
        return replace(self, W=W, outcome=outcome, lost=lost, doubt=there)


def rounded(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W in `dtype`, and what rounding it lost."""
    W = wide.to(dtype)
    return W, None if dtype == torch.float64 else (wide - W).to(dtype)


def normal(count: int, size: int) -> Tensor:
    """(count, size) in fp64, the same always; signs would let errors of equal rows cancel."""
    draw = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(count, size, generator=draw, dtype=torch.float64, device="cpu")


def norms(E: Tensor) -> Tensor:
    """||E_q|| (m,) of any layout whose first dimension holds the queries."""
    return torch.linalg.vector_norm(E.flatten(1), dim=1, dtype=torch.float64)


def spread(residuals: Tensor, solved: Tensor) -> Tensor:
    """||E A^-1 P^T|| (m,) from ||E|| (m,) and X^T P A^-1 (s, r, d), as if E pointed anywhere.

    Args:
        residuals: of V - W A. solved: with the side that A inverts last.
    """
    return residuals * (float(solved.norm()) / (len(solved) * solved.shape[-1]) ** 0.5)

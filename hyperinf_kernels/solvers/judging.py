"""What is known of the scores of kept rows: their relative error per query, cheapest figure first.

Scores S in Gram space are off by E (K / n + lambda I)^-1 where E = (V - W A) P^T is seen through P
itself, in fp64:

1. ||E_q|| / (lambda ||S_q||) bounds the error; a `Sketch` by random signs gives it for next to
   nothing, and it is tight wherever the error is large.
2. A sketch through (K / n + lambda I)^-1 X gives the error itself, for one more reading of P.
3. `check="full"`: E whole, and the error from it by the factor at hand.

Scores that are dot products with a W are off by (V - W A) A^-1 P^T, and no singular value of
A^-1 P^T exceeds sqrt(n / lambda) / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .gram import MARGIN, Seen, Sketch, gap, ratios
from .report import RESIDUAL_LIMIT, Known, Outcome

EPS = torch.finfo(torch.float64).eps
GROWTH = 8  # of fp64 rounding in products of long rows, generously
LOOSE = 2  # how much too small a measured error may be, whose inverse is only nearly right


@dataclass(frozen=True)
class Judged:
    """The worst query's residual and relative error of its scores.

    Certified where `margin` times the error is within the limit.
    """

    residual: float
    error: float
    by: Known
    margin: float = 1.0

    @property
    def right(self) -> bool:
        return self.margin * self.error <= RESIDUAL_LIMIT


@dataclass(frozen=True)
class Attempt:
    """Scores S (m, n) of one block in fp64, the steps they took, how K was summed, their judge."""

    S: Tensor
    steps: int
    precision: str
    judge: Callable[[], Judged]


def best_of(attempts: Iterator[Attempt], enough: float) -> tuple[Attempt, Judged]:
    """The first attempt whose error is `enough`, else the best of all."""
    best: tuple[Attempt, Judged] | None = None
    for attempt in attempts:
        judged = attempt.judge()
        if best is None or judged.error < best[1].error:
            best = attempt, judged
        if judged.error <= enough:
            break
    assert best is not None
    return best


def by_sketch(sketch: Sketch, inverted: Sketch | None, seen: Seen, S: Tensor, lam: float) -> Judged:
    """Level 1 and, with `inverted`, 2."""
    sizes = sketch.gap(seen, S, lam)
    error = ratios(sizes / lam, S)
    if inverted is not None:
        error = torch.minimum(error, ratios(inverted.gap(seen, S, lam), S))
    residual, worst = torch.stack([ratios(sizes, seen.L).max(), error.max()]).tolist()
    return Judged(residual, worst, "estimate", MARGIN)


def measured(seen: Seen, S: Tensor, lam: float, solve: Callable[[Tensor], Tensor]) -> Judged:
    """Level 3; `solve` gives E (K + n lambda I)^-1, nearly."""
    E = gap(seen.rows, seen.V, S, lam)
    sizes = torch.linalg.vector_norm(E, dim=1)
    steps = torch.linalg.vector_norm(seen.rows.n * solve(E), dim=1)
    error = ratios(torch.minimum(sizes / lam, LOOSE * steps), S)
    residual, worst = torch.stack([ratios(sizes, seen.L).max(), error.max()]).tolist()
    return Judged(residual, worst, "measured")


def by_residual(
    V: Tensor, W: Tensor, R: Tensor, S: Tensor, n: int, lam: float, sum_square: float
) -> Judged:
    """Of S = -W P^T, from R = V - W A (m, D); all fp64. `sum_square` is ||P||_F^2."""
    of_w, of_r = torch.linalg.vector_norm(W, dim=1), torch.linalg.vector_norm(R, dim=1)
    of_r = of_r + GROWTH * EPS * (sum_square / n + lam) * of_w
    off = of_r * (math.sqrt(n / lam) / 2) + GROWTH * EPS * math.sqrt(sum_square) * of_w
    residual, worst = torch.stack([ratios(of_r, V).max(), ratios(off, S).max()]).tolist()
    return Judged(residual, worst, "bound")


def claimed(outcome: Outcome, judged: Judged, dtype: torch.dtype) -> Outcome:
    """The certificate of scores rounded to `dtype`; `outcome` says how they were solved."""
    error = math.hypot(judged.error, torch.finfo(dtype).eps / 2)
    note = None
    if not judged.right:
        how = f", and that may be {judged.margin:g} times too low" if judged.margin > 1 else ""
        note = outcome.fallback or f"scores are {error:.1e} off by {judged.by}{how}"
    return replace(
        outcome,
        residual=judged.residual,
        residual_by=judged.by,
        score_error=error,
        score_error_by=judged.by,
        converged=judged.right,
        fallback=note,
    )

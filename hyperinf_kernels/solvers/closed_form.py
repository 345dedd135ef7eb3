"""Closed forms judged by a bound of their own rounding; probes and fp64 only where it fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .report import RESIDUAL_LIMIT, Check, Known, precision_of

PROBES = 4
# an error of rank one shows less than a tenth of itself to 4 probes twice in 10,000
SURE = 10.0
GOOD_ENOUGH = 1e-5  # an estimated error above which rows are worth their time in fp64
GROUP = 8  # rows compared at a time, so that their fp64 copies stay in cache


class Bounded(NamedTuple):
    """Rows (m, k) of a closed form and a bound (m,) of the relative error of each."""

    rows: Tensor
    error: Tensor


class Certificate(NamedTuple):
    """What is known of the worst row's relative error, and the precision of the work."""

    error: float | None
    by: Known | None
    converged: bool | None
    precision: str


def certified(
    formula: Callable[[Tensor], Bounded],
    estimate: Callable[[Tensor, Tensor], Tensor],
    V: Tensor,
    check: Check,
) -> tuple[Tensor, Certificate]:
    """`formula` of queries V (m, D) with a certificate of the worst row.

    Rows whose bound is over the limit are looked at through a few probes; rows that these find
    wanting are done again in fp64. With `check="full"` all of them are done in fp64 and compared.

    Args:
        formula: of queries, in their dtype, fp32 or fp64.
        estimate: of queries (k, D) and their rows: the relative errors, about.
    """
    rows, bound = formula(V)
    precision = precision_of(V.dtype)
    if check == "off":
        return rows, Certificate(None, None, None, precision)
    if check == "full":
        truth = formula(V.double()).rows
        bound = relative(rows, truth, truth)
        rows = torch.where((bound <= RESIDUAL_LIMIT)[:, None], rows, truth.to(rows.dtype))
        return rows, _worst([(relative(rows, truth, truth), "measured", 1.0)], precision)
    failed = torch.nonzero(~(bound <= RESIDUAL_LIMIT)).flatten()
    if not len(failed):
        return rows, _worst([(bound, "bound", 1.0)], precision)
    bound[failed] = 0.0
    guess = estimate(V[failed], rows[failed])
    good = guess <= GOOD_ENOUGH
    again, kept = failed[~good], guess[good]
    if len(again):
        fine = formula(V[again].double())
        rows[again] = fine.rows.to(rows.dtype)
        bound[again] = fine.error + torch.finfo(rows.dtype).eps / 2
        # where nothing is left of the fp64 result either, only probes can tell
        lost = again[~(bound[again] <= RESIDUAL_LIMIT)]
        bound[lost] = 0.0
        kept = torch.cat([kept, estimate(V[lost], rows[lost])]) if len(lost) else kept
        precision = "fp64" if len(again) == len(V) else "fp32 and fp64"
    return rows, _worst([(bound, "bound", 1.0), (kept, "estimate", SURE)], precision)


def probes(size: int, device: torch.device) -> Tensor:
    """Random signs (4, size) in fp64, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PROBES, size), generator=generator, dtype=torch.float64)
    return (2 * signs - 1).to(device)


def probed(rows: Tensor, Z: Tensor, V: Tensor, image: Tensor) -> Tensor:
    """||row - v A|| / ||row||, about, of every row (m, k), from Z (s, k) and `image` = Z A^T."""
    gaps = [
        (row.double() @ Z.mT).sub_(v.double() @ image.mT).norm(dim=1)
        for row, v in zip(rows.split(GROUP), V.split(GROUP), strict=True)
    ]
    return _over(torch.cat(gaps) / len(Z) ** 0.5, rows)


def relative(rows: Tensor, truth: Tensor, size: Tensor) -> Tensor:
    """||row - truth|| / ||size|| of every row."""
    gaps = [
        (row.double() - true).norm(dim=1)
        for row, true in zip(rows.split(GROUP), truth.split(GROUP), strict=True)
    ]
    return _over(torch.cat(gaps), size)


def _over(gap: Tensor, rows: Tensor) -> Tensor:
    """gap / ||row||, the gap itself where a row is zero."""
    size = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return gap / torch.where(size > 0, size, 1.0)


def _worst(found: list[tuple[Tensor, Known, float]], precision: str) -> Certificate:
    """The largest of the errors; each times its safety has to be within the limit."""
    worst = [(float(e.max()) if len(e) else 0.0, by, safety) for e, by, safety in found]
    held = all(error * safety <= RESIDUAL_LIMIT for error, _, safety in worst)
    # a NaN is the largest of all
    error, by, _ = max(worst, key=lambda entry: (entry[0] != entry[0], entry[0]))
    return Certificate(error, by, held, precision)

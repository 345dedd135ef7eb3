"""Products of many rows with a few queries that read the rows as seldom as can be."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, native
from .dispatch import call, explain


def row_dots(rows: Sequence[Tensor], V: Tensor) -> tuple[Tensor, Tensor]:
    """Dot products of all rows with all queries and the rows' squared norms, in one reading.

    Args:
        rows: tensors (n_i, D), n rows in all: one matrix P (n, D) in parts, of one dtype.
        V: (m, D); m may be 0, for the norms alone.

    Returns:
        P V^T (n, m) and ||g_i||^2 (n,), both fp64. NaN and inf stay; squares of fp32 that leave
        its range are inf or lost.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: an input is not floating point.
    """
    _check(rows, V)
    found: tuple[Tensor, Tensor] = call("row_dots", (V, *kinds(rows)), rows=rows)
    return found


def span(rows: Sequence[Tensor], V: Tensor, B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """W = a V + B^T P, (m, D) in V's precision, and ||w_q||^2 (m,) in fp64.

    Args:
        rows, V: as for `row_dots`.
        B: (n, m), taken in the precision of the result.
    """
    _check(rows, V, B)
    found: tuple[Tensor, Tensor] = call("span", (V, *kinds(rows)), rows=rows, B=B, a=a)
    return found


def span_dots(rows: Sequence[Tensor], V: Tensor, B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """P W^T (n, m) in fp64 for W = a V + B^T P, which is never whole, and ||w_q||^2 (m,)."""
    _check(rows, V, B)
    found: tuple[Tensor, Tensor] = call("span_dots", (V, *kinds(rows)), rows=rows, B=B, a=a)
    return found


class Rounding(NamedTuple):
    """What these ops lose at most: relative to ||v|| ||g||, and to sum_i |b_i| ||g_i||."""

    dot: float
    sum: float
    unit: float


def rounding_of(rows: Sequence[Tensor], V: Tensor) -> Rounding:
    """Bounds for the ops above on these tensors: the length of a chain of roundings times u.

    The compiled kernels add few numbers in fp32 and their sums in fp64, whatever the size; of other
    backends only the number of terms is known.
    """
    some = kinds(rows)
    unit = torch.finfo(checks.accumulation_dtype(V, *some)).eps / 2
    terms = (V.shape[1], sum(map(len, rows)))
    compiled = explain("row_dots", V, *some).backend == "cpu"
    dot, total = native.row_depths() if compiled else terms
    return Rounding(dot * unit, total * unit, unit)


def kinds(rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The longest of each kind that a choice of kernel can tell apart: parts may be thousands."""
    longest: dict[tuple[Hashable, ...], Tensor] = {}
    for part in rows:
        held = longest.setdefault(_kind(part), part)
        if part.ndim and part.shape[0] > held.shape[0]:
            longest[_kind(part)] = part
    return tuple(longest.values())


def _kind(part: Tensor) -> tuple[Hashable, ...]:
    plain = type(part) is Tensor and part.layout == torch.strided
    step = part.stride(-1) if plain and part.ndim else None
    return (type(part), part.dtype, part.layout, part.device, part.requires_grad, part.ndim, step,
            None if plain else id(part))  # fmt: skip


def _check(rows: Sequence[Tensor], V: Tensor, B: Tensor | None = None) -> None:
    if not rows:
        raise ValueError("rows must hold at least one tensor")
    checks.floating(V=V, **{f"rows[{i}]": part for i, part in enumerate(kinds(rows))})
    checks.agree(
        V.ndim == 2
        and all(part.ndim == 2 and part.shape[1] == V.shape[1] for part in rows)
        and len({part.dtype for part in rows}) == 1,
        "rows (n_i, D) of one dtype and V (m, D) must share D", V=V, rows=rows[0],
    )  # fmt: skip
    if B is not None:
        checks.floating(V=V, B=B)
        n = sum(map(len, rows))
        checks.agree(tuple(B.shape) == (n, len(V)), f"B must be (n, m) with n = {n}", B=B, V=V)

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
    found: tuple[Tensor, Tensor] = call("row_dots", (V, *_checked(rows, V)), rows=rows)
    return found


def span(rows: Sequence[Tensor], V: Tensor, B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """W = a V + B^T P, (m, D) in V's precision, and ||w_q||^2 (m,) in fp64.

    Args:
        rows, V: as for `row_dots`.
        B: (n, m), taken in the precision of the result.
    """
    some = _checked(rows, V, B)
    found: tuple[Tensor, Tensor] = call("span", (V, *some), rows=rows, B=B, a=a)
    return found


def span_dots(rows: Sequence[Tensor], V: Tensor, B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """P W^T (n, m) in fp64 for W = a V + B^T P, which is never whole, and ||w_q||^2 (m,)."""
    some = _checked(rows, V, B)
    found: tuple[Tensor, Tensor] = call("span_dots", (V, *some), rows=rows, B=B, a=a)
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
    longest: dict[Hashable, Tensor] = {}
    for part in rows:
        # what is no plain matrix is a kind of its own, to be refused by name
        plain = type(part) is Tensor and part.layout is torch.strided and part.ndim == 2
        kind = (part.dtype, part.device, part.requires_grad, part.stride(1)) if plain else id(part)
        held = longest.setdefault(kind, part)
        if plain and part.shape[0] > held.shape[0]:
            longest[kind] = part
    return tuple(longest.values())


def _checked(rows: Sequence[Tensor], V: Tensor, B: Tensor | None = None) -> tuple[Tensor, ...]:
    """`kinds` of rows that fit V and B."""
    if not rows:
        raise ValueError("rows must hold at least one tensor")
    some = kinds(rows)
    checks.floating(V=V, **{f"rows[{i}]": part for i, part in enumerate(some)})
    checks.agree(
        V.ndim == 2
        and all(part.ndim == 2 for part in some)
        and {part.shape[1] for part in rows} == {V.shape[1]}
        and len({part.dtype for part in some}) == 1,
        "rows (n_i, D) of one dtype and V (m, D) must share D", V=V, rows=rows[0],
    )  # fmt: skip
    if B is not None:
        checks.floating(V=V, B=B)
        n = sum(map(len, rows))
        checks.agree(tuple(B.shape) == (n, len(V)), f"B must be (n, m) with n = {n}", B=B, V=V)
    return some

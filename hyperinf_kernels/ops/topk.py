"""An exact top-k of a stream of scores, one batch of columns at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import checked, run

LAST_POSITION = 2**31  # positions are packed into 31 bits beside the score


def topk_empty(
    queries: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Values (m, k) and positions (m, k) of a stream of which nothing has been seen: NaN and -1.

    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    values = torch.full((queries, k), torch.nan, dtype=dtype, device=device)
    return values, torch.full((queries, k), -1, dtype=torch.int64, device=device)


def topk_merge_(
    values: Tensor, positions: Tensor, scores: Tensor, first: int, *, largest: bool = False
) -> None:
    """Keep the k first of what is kept and `scores`, ordered by value and then by position.

    `torch.sort(cat([values, scores], 1), stable=True)` cut to k columns, updated in place; however
    a stream is cut into batches, the result is the same. NaN is never kept.

    Args:
        values: (m, k) fp32 or fp64, positions: (m, k) int64, contiguous, from `topk_empty`.
        scores: (m, B) in the dtype of `values`: the columns first, first + 1, ... of the stream.
        first: position of the first column, behind every position given before.
        largest: keep the largest, largest first, instead of the smallest.

    Raises:
        ValueError: shapes, devices or layouts do not fit, positions outside [0, 2^31).
        TypeError: a dtype does not fit.
    """
    tensors = (values, positions, scores)
    ready = checked("topk_merge_", _fit, tensors)
    if not 0 <= first <= first + scores.shape[1] <= LAST_POSITION:
        raise ValueError(
            f"positions must lie in [0, 2^31), got {first} to {first + scores.shape[1]}"
        )
    run(ready, tensors, first, largest)


def _fit(values: Tensor, positions: Tensor, scores: Tensor) -> tuple[()]:
    checks.floating(values=values, scores=scores)
    checks.accumulator("values", values)
    checks.plain("positions", positions)
    if scores.dtype != values.dtype or positions.dtype != torch.int64:
        raise TypeError(
            f"scores must have the dtype of values and positions int64, got values "
            f"{checks.show(values)}, scores {checks.show(scores)}, positions "
            f"{checks.show(positions)}"
        )
    checks.agree(
        values.ndim == scores.ndim == 2
        and positions.shape == values.shape
        and len(scores) == len(values)
        and values.is_contiguous()
        and positions.is_contiguous()
        and positions.device == values.device,
        "values and positions must be contiguous (m, k) and scores (m, B), on one device",
        values=values, positions=positions, scores=scores,
    )  # fmt: skip
    return ()

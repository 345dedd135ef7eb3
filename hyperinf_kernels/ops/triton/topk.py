"""One step of an exact streaming top-k: each batch of columns is merged into k kept per query.

Value and position are packed into one 64-bit key, so equal values are ordered by position and the
result does not depend on how the stream is cut into batches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import arch_of, on_device


@triton.jit
def _keys(value, position, sign):
    """Keys that sort by sign * value, then by position below 2^31."""
    # -0.0 and 0.0 are equal and must be ordered by position
    bits = (sign * value + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | position


@triton.jit
def _topk_kernel(
    VALUES, POSITIONS, SCORES, k, columns, first_position, sign, stride_q, PLACES: tl.constexpr
):  # fmt: skip
    """Merge SCORES (queries, columns) into VALUES and POSITIONS (queries, k)."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    empty = tl.full((PLACES,), 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    at = query * k + place
    value = tl.load(VALUES + at, mask=place < k, other=0.0)
    position = tl.load(POSITIONS + at, mask=place < k, other=-1)
    kept = tl.where(position >= 0, _keys(value, position, sign), empty)
    for first in range(0, columns, PLACES):
        j = first + place
        score = tl.load(SCORES + query * stride_q + j, mask=j < columns, other=0.0)
        key = _keys(score, j.to(tl.int64) + first_position, sign)
        new = tl.where((j < columns) & (score == score), key, empty)
        merged = tl.sort(tl.reshape(tl.join(kept, new), (2 * PLACES,)))
        halves = tl.trans(tl.reshape(merged, (2, PLACES)))
        kept, _ = tl.split(halves)
        kept = tl.where(place < k, kept, empty)
    ordered = (kept >> 32).to(tl.int32)
    value = sign * (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    seen = kept != empty
    nothing = tl.full((PLACES,), float("nan"), dtype=tl.float32)
    tl.store(VALUES + at, tl.where(seen, value, nothing), mask=place < k)
    tl.store(POSITIONS + at, tl.where(seen, kept & 0xFFFFFFFF, -1), mask=place < k)


@torch.library.custom_op("hyperinf_triton::topk_merge_", mutates_args={"values", "positions"})
def topk_merge_(
    values: Tensor, positions: Tensor, scores: Tensor, first: int, largest: bool
) -> None:
    """Merge scores (m, B) of positions first, first + 1, ... below 2^31 into the kept (m, k).

    Args:
        values: (m, k) fp32, positions: (m, k) int64, both contiguous, k at most 512.
        scores: fp32 with unit column stride.
    """
    if scores.numel() == 0:
        return
    k = values.shape[1]
    config = choose("topk", arch_of(values), "ieee", k)
    with on_device(values):
        _topk_kernel[(len(values),)](
            values, positions, scores, k, scores.shape[1], first, -1.0 if largest else 1.0,
            scores.stride(0), **config.options(),
        )  # fmt: skip


@topk_merge_.register_fake
def _(values: Tensor, positions: Tensor, scores: Tensor, first: int, largest: bool) -> None:
    return None

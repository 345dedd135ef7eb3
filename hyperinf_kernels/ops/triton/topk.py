"""An exact streaming top-k of scores: each batch of columns is merged into k kept ones per query.

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

EMPTY = torch.iinfo(torch.int64).max  # the key of a place not yet taken
LARGEST_K = 128


@triton.jit
def _topk_kernel(
    KEYS, SCORES, k, columns, first_id, sign, stride_q, PLACES: tl.constexpr
):  # fmt: skip
    """Merge SCORES (queries, columns) into KEYS (queries, PLACES), smallest sign * score first."""
    query = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PLACES)
    empty = tl.full((PLACES,), 0x7FFFFFFFFFFFFFFF, dtype=tl.int64)
    kept = tl.load(KEYS + query * PLACES + place)
    for first in range(0, columns, PLACES):
        j = first + place
        score = sign * tl.load(SCORES + query * stride_q + j, mask=j < columns, other=0.0)
        # -0.0 and 0.0 are equal and must be ordered by position
        bits = (score + 0.0).to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (ordered.to(tl.int64) << 32) | (first_id + j).to(tl.int64)
        new = tl.where((j < columns) & (score == score), key, empty)
        merged = tl.sort(tl.reshape(tl.join(kept, new), (2 * PLACES,)))
        halves = tl.trans(tl.reshape(merged, (2, PLACES)))
        kept, _ = tl.split(halves)
        kept = tl.where(place < k, kept, empty)
    tl.store(KEYS + query * PLACES + place, kept)


@torch.library.custom_op("hyperinf_triton::topk_merge_", mutates_args={"keys"})
def topk_merge_(keys: Tensor, scores: Tensor, k: int, first_id: int, largest: bool) -> None:
    """Merge scores (m, B) of positions first_id, first_id + 1, ... into `keys` (m, places).

    Args:
        keys: from `topk_empty`, updated in place; kept ascending.
        scores: fp32 with unit column stride. NaN is never kept.
        first_id: position of the first column in the stream, below 2^31.
        largest: keep the largest scores instead of the smallest.
    """
    if scores.numel() == 0:
        return
    config = choose("topk", arch_of(keys), "ieee", keys.shape[1])
    with on_device(keys):
        _topk_kernel[(len(keys),)](
            keys, scores, k, scores.shape[1], first_id, -1.0 if largest else 1.0, scores.stride(0),
            **config.options(),
        )  # fmt: skip


@topk_merge_.register_fake
def _(keys: Tensor, scores: Tensor, k: int, first_id: int, largest: bool) -> None:
    return None


def topk_empty(queries: int, k: int, device: torch.device) -> Tensor:
    """The state of a stream in which nothing has been seen.

    Raises:
        ValueError: k is not in [1, LARGEST_K].
    """
    if not 1 <= k <= LARGEST_K:
        raise ValueError(f"k must lie in [1, {LARGEST_K}], got {k}")
    places = 32 if k <= 32 else LARGEST_K
    return torch.full((queries, places), EMPTY, dtype=torch.int64, device=device)


def topk_values(keys: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Kept scores (m, k) and positions (m, k), best first; position -1 where nothing was seen."""
    keys = keys[:, :k]
    ordered = (keys >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    seen = keys != EMPTY
    ids = torch.where(seen, keys & 0xFFFFFFFF, -1)
    return torch.where(seen, -values if largest else values, torch.nan), ids

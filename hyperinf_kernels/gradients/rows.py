"""One row of a batch as a batch of its own, never by guessing which dimension is the sample."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import TEXT_KEYS, unwrapped

# (batch, row) -> a batch of this row alone
OneRow = Callable[[Any, int], Any]

# the sample is the first dimension by the interface of every transformers model
SAMPLE_FIRST = frozenset(
    (*TEXT_KEYS, "labels", "decoder_input_ids", "decoder_attention_mask", "input_features",
     "input_values", "id", "ids")
)  # fmt: skip


def row_cutter(model: nn.Module, one_row: OneRow | None) -> Callable[[Any, int], Any | None]:
    """The caller's way to cut a row, or the one by the names of columns, which may give None."""
    if one_row is not None:
        return one_row
    config = getattr(unwrapped(model), "config", None)
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    return functools.partial(known_row, decodes=decodes)


def known_row(batch: Any, row: int, decodes: bool = False) -> Any | None:
    """One row without its padding where every column is known by name, else None.

    Images are known as samples only where no text counts the samples.

    Args:
        decodes: labels are a decoder's, so they have a length of their own.
    """
    if not isinstance(batch, Mapping):
        return None
    known = SAMPLE_FIRST if "input_ids" in batch else SAMPLE_FIRST | {"pixel_values"}
    if any(key not in known for key in batch):
        return None
    sizes = {len(value) for value in batch.values() if hasattr(value, "__len__")}
    if len(sizes) != 1:
        return None
    alone = {k: v[row : row + 1] if hasattr(v, "__len__") else v for k, v in batch.items()}
    mask = alone.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return alone
    seen = torch.nonzero(mask[0]).flatten()
    if not len(seen):
        return alone
    kept = slice(int(seen[0]), int(seen[-1]) + 1)
    texts = TEXT_KEYS if decodes else (*TEXT_KEYS, "labels")
    return {
        k: v[:, kept] if k in texts and getattr(v, "shape", ()) == mask.shape else v
        for k, v in alone.items()
    }


def most_padded(batch: Any) -> int:
    """The row with the fewest tokens, on which padding would show first."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return int(mask.sum(1).argmin()) if isinstance(mask, Tensor) and mask.ndim == 2 else 0

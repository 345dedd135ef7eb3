"""How far gradients computed in bf16 or fp16 are from those of the same weights in fp32."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import Block, find_blocks
from .capture import batch_gradients
from .losses import Loss

LOW = (torch.bfloat16, torch.float16)


def precision_of(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block],
    grads: Mapping[str, Tensor], budget: int,
) -> dict[str, Any]:  # fmt: skip
    """In which dtype gradients were computed, and what that did to the first row's.

    Args:
        grads: {block: (B, r, d)} of this batch, from a `prepared` model.
        budget: bytes that a copy of the model in fp32 may take.

    Returns:
        {"dtype"}; for bf16 and fp16 also "first row", the relative difference over all blocks
        together from the fp32 copy's gradient, or None where there was no room for the copy.
    """
    device = next(model.parameters()).device.type
    autocast = torch.is_autocast_enabled(device)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if autocast:
        dtypes.add(torch.get_autocast_dtype(device))
    low = [str(dtype).removeprefix("torch.") for dtype in LOW if dtype in dtypes]
    if not low:
        return {"dtype": str(next(iter(grads.values())).dtype).removeprefix("torch.")}
    said: dict[str, Any] = {"dtype": " and ".join(low), "first row": None}
    if sum(4 * p.numel() for p in model.parameters()) > budget:
        return said
    exact = copy.deepcopy(model).float()
    try:
        with torch.autocast(device, enabled=False):
            names = [block.name for block in blocks]
            want = batch_gradients(exact, _widened(batch), loss, find_blocks(exact, names))
    except (InputError, RuntimeError, TypeError):
        # a loss that insists on its dtype, or weights that no copy can widen
        return said
    off = sum(float((grads[n][0].double() - g[0].double()).square().sum()) for n, g in want.items())
    whole = sum(float(g[0].double().square().sum()) for g in want.values())
    said["first row"] = (off / whole) ** 0.5 if whole else None
    return said


def _widened(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.float() if batch.dtype in LOW else batch
    if isinstance(batch, Mapping):
        return {key: _widened(value) for key, value in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(_widened(value) for value in batch)
    return batch

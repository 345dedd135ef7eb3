"""Losses scaled by a power of two where backward runs in fp16, and gradients scaled back.

fp16 ends at 6e-8, and gradients of a model that fits its data lie below. The largest scale at
which nothing overflows is found by trying; in every other dtype the scale is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

Found = TypeVar("Found")
EXPONENTS = (14, 8, 2, -4)


def runs_fp16(model: nn.Module) -> bool:
    """Whether any part of backward would be in fp16."""
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return True
    return any(p.dtype == torch.float16 for p in model.parameters())


def scaled(
    model: nn.Module,
    run: Callable[[float], Found],
    tensors: Callable[[Found], Iterable[Tensor]],
) -> Found:
    """`run(scale)` at the first scale whose `tensors` are finite, the last one as it is.

    Args:
        run: one pass with the loss times `scale`, its results divided by it again.
    """
    if not runs_fp16(model):
        return run(1.0)
    for exponent in EXPONENTS:
        found = run(2.0**exponent)
        if all(bool(torch.isfinite(tensor).all()) for tensor in tensors(found)):
            break
    return found

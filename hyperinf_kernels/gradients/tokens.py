"""A layer's gradient taken apart into tokens, which is what K-FAC builds its factors from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from ..ops.checks import accumulation_dtype
from .blocks import Block
from .layers import normalised


def check_token_factors(blocks: Sequence[Block]) -> None:
    """Raise InputError for the first block whose layer has no token factors."""
    for block in blocks:
        if not block.is_bias and block.layer.kind not in ("linear", "conv1d", "norm"):
            raise InputError(
                f"block {block.name}: K-FAC and EK-FAC take the factors of linear and norm layers, "
                f"not of {type(block.module).__name__}; leave the block out or use another method"
            )


def token_factors(block: Block, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """left (t, r) and right (t, d) with sum_t left_t right_t^T the gradients of the batch, added.

    Tokens whose delta is zero (padding, positions that the loss cannot see) are left out: they add
    nothing to a gradient, and counting them would let padding shrink the activation factor.

    Args:
        x: the layer's input, samples first. delta: the loss gradient at its output.
    """
    dtype = accumulation_dtype(x, delta)
    if block.layer.kind == "norm" and not block.is_bias:
        scaled, features = normalised(block.module, x)
        delta = (scaled * delta).movedim(features, -1)
    elif block.is_bias:
        delta = delta.movedim(block.features, -1)
    delta = delta.reshape(-1, delta.shape[-1]).to(dtype)
    seen = (delta != 0).any(1)
    delta = delta[seen]
    if block.is_bias or block.layer.kind == "norm":
        return delta.new_ones(len(delta), 1), delta
    act = x.reshape(-1, x.shape[-1])[seen].to(dtype)
    return (act, delta) if block.transpose else (delta, act)

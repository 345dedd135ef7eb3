"""Is what the hooks captured really the gradient? Checked once per run, on its first batch.

A parameter that the model uses without running its layer, a layer class that changes the forward it
inherits, or a layer that does not see the samples first would give plausible wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import Block, block_parameters
from .losses import Loss

# batched and single passes differ by rounding only; bf16 keeps 8 bits
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}
LOW_PRECISION = 0.3


def verify_first_batch(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block], grads: Mapping[str, Tensor]
) -> None:
    """Compare captured gradients with autograd, of the whole batch and of its first row alone.

    Args:
        grads: {block: (B, r, d)} as captured from this batch by a `prepared` model.

    Raises:
        InputError: a block disagrees with autograd.
    """
    samples = len(next(iter(grads.values())))
    parameters = block_parameters(blocks)
    limit = max(LIMITS.get(p.dtype, LOW_PRECISION) for p in model.parameters())
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        limit = LOW_PRECISION
    whole = _autograd(model, batch, loss, parameters)
    _compare(blocks, {n: g.sum(0) for n, g in grads.items()}, whole, limit, (
        "the model uses the parameter outside its layer, or the layer's class changes the forward "
        "it inherits"
    ))  # fmt: skip
    row = first_row(batch, samples)
    if samples > 1 and row is not None:
        alone = _autograd(model, row, loss, parameters)
        _compare(blocks, {n: g[0] for n, g in grads.items()}, alone, limit, (
            "its layer does not have the samples in its first dimension, or a sample's loss "
            "depends on the others"
        ))  # fmt: skip


def first_row(batch: Any, samples: int) -> Any:
    """The first sample of a dict, list or tuple of tensors as a batch of one, None if unclear."""
    if isinstance(batch, Mapping):
        return {k: v[:1] if _per_sample(v, samples) else v for k, v in batch.items()}
    if type(batch) in (list, tuple):
        return type(batch)(v[:1] if _per_sample(v, samples) else v for v in batch)
    return batch[:1] if _per_sample(batch, samples) else None


def _per_sample(value: Any, samples: int) -> bool:
    sized = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(value, list)
    return sized and len(value) == samples


def _autograd(
    model: nn.Module, batch: Any, loss: Loss, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The summed loss's gradient by ordinary backward; leaves no .grad and no flag behind."""
    held = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
            p.grad = None
        with torch.inference_mode(False), torch.enable_grad():
            loss(model, batch).sum().backward()
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in parameters.items()
        }
    finally:
        for name, p in parameters.items():
            p.requires_grad_(False)
            p.grad = held[name]


def _compare(
    blocks: Sequence[Block],
    captured: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    limit: float,
    why: str,
) -> None:
    # a block whose true gradient almost cancels is judged on the scale of the largest one
    scale = max(float(g.double().norm()) for g in reference.values())
    for block in blocks:
        want = block.layout(reference[block.name]).double()
        error = float((captured[block.name].double() - want).norm())
        if error > limit * max(float(want.norm()), 1e-3 * scale):
            raise InputError(
                f"block {block.name}: its captured gradient differs from autograd's by "
                f"{error / max(float(want.norm()), 1e-300):.0%}: {why}; leave it out of blocks"
            )

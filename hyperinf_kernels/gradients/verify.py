"""Is what the hooks captured really the gradient? Asked of a stream's first batch.

A parameter that the model uses without running its layer, a layer class that changes the forward it
inherits, or a layer that does not see the samples first would give plausible wrong numbers. Nothing
is cut: the gradient of a differently weighted sum of the same losses tells the rows apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .blocks import Block, block_parameters
from .inputs import local
from .losses import Loss
from .rows import OneRow, most_padded, row_cutter
from .scaling import scaled

# one pass and another differ by rounding only; bf16 keeps 8 bits
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-2}
LOW_PRECISION = 0.3


def verify_first_batch(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    blocks: Sequence[Block],
    grads: Mapping[str, Tensor],
    one_row: OneRow | None = None,
) -> None:
    """Compare captured gradients with autograd: the sum of the losses, a weighted sum, one alone.

    The last where `one_row`, or the names of the columns, say how to cut a row; it is cut without
    its padding.

    Args:
        grads: {block: (B, r, d)} as captured from this batch by a `prepared` model.

    Raises:
        InputError: a block disagrees with autograd, or two calls of the loss disagree.
    """
    samples = len(next(iter(grads.values())))
    parameters = block_parameters(blocks)
    limit = max(LIMITS.get(p.dtype, LOW_PRECISION) for p in model.parameters())
    if torch.is_autocast_enabled(next(model.parameters()).device.type):
        limit = LOW_PRECISION
    weightings = [torch.ones(samples, dtype=torch.float64, device="cpu"), _signed_powers(samples)]
    row = most_padded(batch)
    alone = row_cutter(model, one_row)(batch, row)
    references = _autograd(model, batch, loss, parameters, weightings)
    try:
        for weights, reference, why in zip(weightings, references, REASONS, strict=True):
            _compare(blocks, grads, weights, reference, limit, why)
        if alone is not None:
            one = torch.zeros(samples, dtype=torch.float64, device="cpu")
            one[row] = 1
            whole = torch.ones(1, dtype=torch.float64, device="cpu")
            references = _autograd(model, alone, loss, parameters, [whole])
            _compare(blocks, grads, one, references[0], limit, (
                f"row {row} of the batch has another gradient alone and without padding, so "
                "padding or other rows change it (pad on the other side, or give an attention mask)"
            ))  # fmt: skip
    except InputError:
        check_repeatable(model, batch, loss)
        raise


def _signed_powers(count: int) -> Tensor:
    """Random weights of six values, powers of two, which no format rounds."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    signs, powers = (
        torch.randint(0, most, (count,), generator=generator, dtype=torch.int64, device="cpu")
        for most in (2, 3)
    )
    return (signs * 2 - 1) * 2.0 ** powers.double()


REASONS = (
    "the model uses the parameter outside its layer, or the layer's class changes the forward "
    "it inherits; leave it out of blocks",
    "its layer does not have the samples in its first dimension, or a sample's loss depends on "
    "the others; leave it out of blocks",
)


def _autograd(
    model: nn.Module, batch: Any, loss: Loss, parameters: Mapping[str, Tensor],
    weightings: Sequence[Tensor],
) -> list[dict[str, Tensor]]:  # fmt: skip
    """The gradient of each weighted sum of one batch's losses, by ordinary backward.

    Leaves no .grad and no flag behind.
    """
    model = local(model)
    held = {name: (p.grad, p.requires_grad) for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            losses = loss(model, batch)
            return [_backward(losses, w.to(losses), parameters, model) for w in weightings]
    finally:
        for name, p in parameters.items():
            p.grad = held[name][0]
            p.requires_grad_(held[name][1])


def _backward(
    losses: Tensor, weights: Tensor, parameters: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    def run(scale: float) -> dict[str, Tensor]:
        for p in parameters.values():
            p.grad = None
        losses.backward(weights * scale, retain_graph=True)
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.double() / scale
            for name, p in parameters.items()
        }

    return scaled(model, run, lambda found: found.values())


def check_repeatable(model: nn.Module, batch: Any, loss: Loss) -> None:
    """Raise InputError for a loss that draws noise, which has no gradient to speak of."""
    with torch.no_grad():
        first, second = loss(local(model), batch), loss(local(model), batch)
    near = torch.isclose(first, second, rtol=1e-3, atol=1e-6)
    if not bool(near.all()):
        row = int(torch.nonzero(~near)[0])
        raise InputError(
            f"two calls of the loss on the same batch differ (row {row}: {float(first[row]):.6g} "
            f"and {float(second[row]):.6g}): it draws random numbers; draw noise and timesteps "
            "once, into the batch, or seed them from the row"
        )


def _compare(
    blocks: Sequence[Block], grads: Mapping[str, Tensor], weights: Tensor,
    reference: Mapping[str, Tensor], limit: float, why: str,
) -> None:  # fmt: skip
    # a block whose true gradient almost cancels is judged on the scale of the largest one
    scale = max(float(g.double().norm()) for g in reference.values())
    for block in blocks:
        want = block.layout(reference[block.name]).double()
        captured = torch.einsum("b,brd->rd", weights.to(want.device), grads[block.name].double())
        error = float((captured - want).norm())
        if error > limit * max(float(want.norm()), 1e-3 * scale):
            raise InputError(
                f"block {block.name}: its captured gradient differs from autograd's by "
                f"{error / max(float(want.norm()), 1e-300):.0%}: {why}"
            )

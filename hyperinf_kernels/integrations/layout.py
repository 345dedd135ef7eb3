"""Hosts flatten all parameters into one vector per sample; solvers want blocks (B, r, d)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["Layout", "block_of"]

LORA_B = re.compile(r"(^|\.)lora_B(\.|$)")


def block_of(name: str, grad: Tensor) -> Tensor:
    """A parameter's per-sample gradients (B, *shape) as its block (B, r, d), without a copy.

    `lora_B` (d_out, rank) is transposed, so that the rank comes first; a vector is one row; a
    convolution (O, I, h, w) becomes (O, I h w).
    """
    if grad.ndim <= 2:
        return grad.reshape(len(grad), 1, -1)
    flat = grad.flatten(2)
    return flat.mT if LORA_B.search(name) else flat


class Layout:
    """Where each block lies in a flat gradient: {name: parameter shape} in the host's order.

    Args:
        shapes: the parameters' own shapes, in the order in which the host joins them.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        self.width = sum(self.sizes.values())

    @classmethod
    def of(cls, parameters: Iterable[tuple[str, Tensor]]) -> Layout:
        """From `model.named_parameters()` or any part of it."""
        return cls({name: tuple(parameter.shape) for name, parameter in parameters})

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """(B, D) -> {block: (B, r, d)}, views where possible.

        Raises:
            InputError: D is not the sum of the parameters' sizes.
        """
        if flat.ndim != 2 or flat.shape[1] != self.width:
            raise InputError(
                f"flat gradients must be (samples, {self.width}) for {len(self.shapes)} "
                f"parameters, got {tuple(flat.shape)}"
            )
        parts = flat.split(list(self.sizes.values()), dim=1)
        return {
            name: block_of(name, part.reshape(len(flat), *shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def join(self, blocks: Mapping[str, Tensor]) -> Tensor:
        """{block: (B, r, d)} -> (B, D) in the host's order and shapes, the inverse of `split`."""
        parts = []
        for name, shape in self.shapes.items():
            block = blocks[name]
            if len(shape) > 1 and LORA_B.search(name):
                block = block.mT
            parts.append(block.reshape(len(block), -1))
        return torch.cat(parts, 1)

"""Products whose operands are rounded as tensor cores round them, with sums in fp32.

On a processor without such units this is emulation: slower than fp32, for studying when a low
precision is safe and for running the same schedule everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import implements
from .schedule import Step

# unit roundoff of the operands
ROUNDOFF = {"tf32x3": 2.0**-22, "tf32": 2.0**-11, "bf16": 2.0**-8}


def tf32(x: Tensor) -> Tensor:
    """fp32 numbers rounded to 10 explicit mantissa bits, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return torch.where(torch.isfinite(x), rounded.view(torch.float32), x)


def bf16(x: Tensor) -> Tensor:
    """fp32 numbers rounded to 7 explicit mantissa bits."""
    return x.bfloat16().float()


def _tf32x3(a: Tensor, b: Tensor) -> Tensor:
    high_a, high_b = tf32(a), tf32(b)
    low_a, low_b = tf32(a - high_a), tf32(b - high_b)
    # small terms first, as the three passes of a tensor core sum them
    return low_a @ high_b + high_a @ low_b + high_a @ high_b


PRODUCT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tf32x3": _tf32x3,
    "tf32": lambda a, b: tf32(a) @ tf32(b),
    "bf16": lambda a, b: bf16(a) @ bf16(b),
}


@implements("schulz_rounded")
def schulz_rounded(
    A: Tensor, start: Tensor, steps: Sequence[Step], precision: str
) -> tuple[Tensor, int]:
    """`reference.schulz` on fp32 A with every product's operands rounded."""
    return reference.schulz(A, start, steps, PRODUCT[precision])

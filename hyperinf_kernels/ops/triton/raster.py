"""The order in which the output tiles of one matrix are computed, as a table that programs read.

A table serves full and triangular outputs alike, and what the L2 model counts is exactly the order
that runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import uploaded

GROUP = 8  # tile rows walked together, so that a wave of programs shares operands in L2


@uploaded
def raster(rows: int, cols: int, symmetric: bool, device: torch.device) -> Tensor:
    """(count, 2) int32 pairs (row tile, column tile); with `symmetric` only row <= column."""
    return torch.tensor(order(rows, cols, symmetric), dtype=torch.int32, device=device)


def order(rows: int, cols: int, symmetric: bool, group: int = GROUP) -> list[tuple[int, int]]:
    """Column by column inside groups of `group` rows."""
    return [
        (row, col)
        for first in range(0, rows, group)
        for col in range(cols)
        for row in range(first, min(first + group, rows))
        if not symmetric or row <= col
    ]

"""Examples in batches, the same in every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import InputError
from .protocol import Example


class Batches:
    """Batches of rows of similar size, largest first, the same in every pass.

    Rows come out of order; their ids travel with them.
    """

    def __init__(
        self,
        dataset: Sequence[Example],
        collate: Callable[[Sequence[Example]], dict[str, Any]],
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size
        self._ordered = sorted(dataset, key=lambda example: -example.size)

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._ordered), self.batch_size):
            yield self.collate(self._ordered[start : start + self.batch_size])

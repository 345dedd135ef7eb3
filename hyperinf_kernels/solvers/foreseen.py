"""Dot products with queries known before the rows arrive, taken while these are checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import row_dots
from .inputs import Gradients

SHARE = 8  # what is taken needs at most this part of the rows' own memory


class Foreseen:
    """One reading of arriving rows for their norms, which are wanted anyway, and their dots.

    Args:
        queries: {block: (m, r, d)}, not changed until the scores are there. What does not fit is
            left out, for the checks of queries to name.
    """

    def __init__(self, queries: Gradients) -> None:
        self._queries = queries
        self._taken: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def take(self, name: str, batch: Tensor) -> Tensor | None:
        """||g_i||^2 (B,) in fp64 of the next rows (B, r, d), their dots kept; None: not taken."""
        V = self._queries.get(name)
        if V is None or not len(batch) or not _fit(V, batch):
            return None
        found = row_dots([batch.detach().flatten(1)], V.detach().flatten(1))
        self._taken.setdefault(name, []).append(found)
        return found[1]

    def dots(self, name: str, V: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
        """P V^T (n, m) and ||g_i||^2 (n,) for V (m, D), where both were taken of all n rows."""
        given, taken = self._queries.get(name), self._taken.get(name, [])
        if given is None or V.dtype != given.dtype or V.data_ptr() != given.data_ptr():
            return None
        if len(V) != len(given) or sum(len(norms) for _, norms in taken) != n:
            return None
        if len(taken) == 1:
            return taken[0]
        return torch.cat([dots for dots, _ in taken]), torch.cat([norms for _, norms in taken])


def _fit(V: Tensor, batch: Tensor) -> bool:
    small = 8 * len(V) * SHARE <= batch[0].numel() * batch.element_size()
    return (
        small
        and V.ndim == 3
        and len(V) > 0
        and V.shape[1:] == batch.shape[1:]
        and V.dtype == torch.float32
        and batch.dtype in (torch.float32, torch.bfloat16)
        and V.is_contiguous()
        and V.device == batch.device
    )

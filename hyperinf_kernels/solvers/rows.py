"""The training gradients of one block, kept as rows, and the products that solvers take of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..ops import gram_accumulate_
from ..ops.checks import accumulation_dtype

CHUNK_ROWS = 512


class GradientRows:
    """P (n, D): per-sample gradients of one block, flattened, in chunks of about 512 rows.

    Batches are kept by reference and joined once enough have arrived, so the peak is the data plus
    one chunk. Products with P run chunk by chunk in the dtype of their other operand.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.n = 0
        self._chunks: list[Tensor] = []
        self._pending: list[Tensor] = []

    def append(self, rows: Tensor) -> None:
        """Add (B, D) rows."""
        self.n += len(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= CHUNK_ROWS:
            self._join()

    def _join(self) -> None:
        if self._pending:
            whole = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
            self._chunks.extend(whole.split(2 * CHUNK_ROWS))
            self._pending.clear()

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(row range, rows) of every chunk, widened to `dtype` if given."""
        self._join()
        start = 0
        for chunk in self._chunks:
            yield slice(start, start + len(chunk)), chunk if dtype is None else chunk.to(dtype)
            start += len(chunk)

    def gram(self, dtype: torch.dtype | None = None) -> Tensor:
        """K = P P^T (n, n), summed in fp32 (fp64 for fp64 rows) unless `dtype` says otherwise."""
        self._join()
        dtype = dtype or accumulation_dtype(self._chunks[0])
        K = torch.zeros(self.n, self.n, dtype=dtype, device=self._chunks[0].device)
        for i, upper in self.chunks():
            gram_accumulate_(K[i, i], upper)
            for j, lower in self.chunks():
                if j.start > i.start:
                    gram_accumulate_(K[i, j], upper, lower)
                    K[j, i] = K[i, j].mT
        return K

    def second_moment(self) -> Tensor:
        """P^T P (D, D) in fp64."""
        total: Tensor | None = None
        for _, rows in self.chunks(torch.float64):
            total = rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)
        assert total is not None
        return total

    def dots(self, V: Tensor) -> Tensor:
        """V P^T (m, n), in V's dtype."""
        return torch.cat([V @ rows.mT for _, rows in self.chunks(V.dtype)], dim=1)

    def combine(self, B: Tensor) -> Tensor:
        """B P (m, D), in B's dtype."""
        total = torch.zeros(len(B), self.width, dtype=B.dtype, device=B.device)
        for part, rows in self.chunks(B.dtype):
            total.addmm_(B[:, part], rows)
        return total

    def tensor(self) -> Tensor:
        """P as one (n, D) tensor."""
        self._join()
        return self._chunks[0] if len(self._chunks) == 1 else torch.cat(self._chunks)

"""The training gradients of one block, kept as rows, and the products that solvers take of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import gram_accumulate_, row_dots
from ..ops.checks import accumulation_dtype
from ..ops.sketch import row_sketch
from .scratch import Scratch

CHUNK_ROWS = 512
SLICE = 256  # columns of P at a time, so that a slice in fp64 stays in cache
PAGE_SLICE = 1024  # of mapped rows: whole pages, so that none is read twice
DEEP_SLICE = 2048  # columns at a time where P is used as it is
LEAST_SQUARE = 1e-25  # squared norms from which what fp32 loses of tiny numbers is nothing


class Mark(NamedTuple):
    """What a `GradientRows` held at one time."""

    n: int
    chunks: tuple[Tensor, ...]
    pending: tuple[Tensor, ...]


class GradientRows:
    """P (n, D): per-sample gradients of one block, flattened, in chunks of about 512 rows.

    Batches are kept by reference and joined once enough have arrived, so the peak is the data plus
    one chunk. Products with P run chunk by chunk in the dtype of their other operand.

    Args:
        width: D.
        scratch: keep the chunks in mapped files there, out of core; None: in memory.
        exponent: the rows are the gradients x 2^exponent, see `scaling`.
    """

    def __init__(self, width: int, scratch: Scratch | None = None, exponent: int = 0) -> None:
        self.width = width
        self.scratch = scratch
        self.exponent = exponent
        self.n = 0
        self._chunks: list[Tensor] = []
        self._pending: list[Tensor] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows as they are kept."""
        return (self._chunks or self._pending)[0].dtype

    def append(self, rows: Tensor) -> None:
        """Add (B, D) rows."""
        self.n += len(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) >= CHUNK_ROWS:
            self._join()

    def mark(self) -> Mark:
        """Where it stands, for `back_to`."""
        return Mark(self.n, tuple(self._chunks), tuple(self._pending))

    def back_to(self, mark: Mark) -> None:
        """Forget the rows appended since."""
        self.n, self._chunks, self._pending = mark.n, list(mark.chunks), list(mark.pending)

    def rescaled(self, shift: int) -> GradientRows:
        """The same gradients as other rows, x 2^shift."""
        other = GradientRows(self.width, self.scratch, self.exponent + shift)
        for _, chunk in self.chunks():
            other.append(chunk * 2.0**shift)
        return other

    def _join(self) -> None:
        if self._pending:
            whole = self._pending[0] if len(self._pending) == 1 else torch.cat(self._pending)
            parts = whole.split(2 * CHUNK_ROWS)
            # all or none: a folder may have no room for the last
            self._chunks += [self.scratch.mapped(p) if self.scratch else p for p in parts]
            self._pending.clear()

    def chunks(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """(row range, rows) of every chunk, widened to `dtype` if given."""
        self._join()
        start = 0
        for chunk in self._chunks:
            yield slice(start, start + len(chunk)), chunk if dtype is None else chunk.to(dtype)
            start += len(chunk)

    def given(self) -> Iterator[tuple[slice, Tensor]]:
        """`chunks` at the scale of the gradients themselves."""
        for part, chunk in self.chunks():
            yield part, chunk * 2.0**-self.exponent if self.exponent else chunk

    def parts(self) -> list[Tensor]:
        """P in parts (n_i, D), one after the other."""
        self._join()
        return list(self._chunks)

    def gram_panels(self, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """K = P P^T by chunks: their rows, from the first column to the last of their own.

        Summed in fp32 (fp64 for fp64 rows) unless `dtype` says otherwise.
        """
        self._join()
        dtype = dtype or accumulation_dtype(self._chunks[0])
        for i, mine in self.chunks():
            panel = torch.zeros(len(mine), i.stop, dtype=dtype, device=mine.device)
            for j, other in self.chunks():
                if j.start < i.start:
                    gram_accumulate_(panel[:, j], mine, other)
            gram_accumulate_(panel[:, i], mine)
            yield panel

    def second_moment(self) -> Tensor:
        """P^T P (D, D) in fp64."""
        _, first = next(self.chunks())
        total = torch.zeros(self.width, self.width, dtype=torch.float64, device=first.device)
        for _, rows in self.chunks():
            gram_accumulate_(total, rows.mT)
        return total

    def dots(self, V: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """V P^T (m, n), summed in `dtype`, by default V's."""
        dtype = dtype or V.dtype
        out = torch.zeros(len(V), self.n, dtype=dtype, device=V.device)
        if V.dtype == torch.float64 and self.dtype != torch.float64:
            for columns, P in self._wide_slices():
                out.addmm_(V[:, columns], P.mT)
        else:
            for part, rows in self.chunks():
                gram_accumulate_(out[:, part], V, rows)
        return out

    def combine(self, B: Tensor) -> Tensor:
        """B P (m, D), in B's dtype."""
        total = torch.zeros(len(B), self.width, dtype=B.dtype, device=B.device)
        if B.dtype == torch.float64 and self.dtype != torch.float64:
            for columns, P in self._wide_slices():
                total[:, columns] = B @ P
        else:
            for part, rows in self.chunks(B.dtype):
                total.addmm_(B[:, part], rows)
        return total

    def image(self, B: Tensor) -> Tensor:
        """B P P^T (m, n) without the n x n matrix, in B's dtype and one reading of P."""
        out = torch.zeros_like(B)
        for columns in self._slices(DEEP_SLICE):
            T = torch.zeros(len(B), columns.stop - columns.start, dtype=B.dtype, device=B.device)
            for part, rows in self.chunks():
                gram_accumulate_(T, B[:, part], rows[:, columns].mT)
            for part, rows in self.chunks():
                gram_accumulate_(out[:, part], T, rows[:, columns])
        return out

    def probe(self, V: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """V P^T and B P P^T, both (s, n), in fp64 and one reading of P.

        Args:
            V: (s, D). B: (s, n). Both fp64.
        """
        dots = torch.zeros(len(V), self.n, dtype=torch.float64, device=V.device)
        image = torch.zeros_like(dots)
        for columns, P in self._wide_slices():
            dots.addmm_(V[:, columns], P.mT)
            image.addmm_(B @ P, P.mT)
        return dots, image

    def sketch(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """X^T P (s, D) and P P^T X (n, s) in fp64 and one reading of P.

        Args:
            X: (n, s) fp64, of few columns.
        """
        return row_sketch(X, self.parts())

    def squares(self) -> Tensor:
        """||row||^2 (n,) to fp64, which `squares` is not: weights of a closed form cancel."""
        parts = [part for rows in self.parts() for part in rows.split(32)]
        return torch.cat([part.double().square().sum(1) for part in parts])

    def _wide_slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of P in fp64, a slice at a time, in one buffer that the next slice reuses."""
        width = min(self.width, PAGE_SLICE if self.scratch else SLICE)
        device = next(self.chunks())[1].device
        # fresh memory for every slice would cost more than the products
        held = torch.empty(self.n, width, dtype=torch.float64, device=device)
        for columns in self._slices(width):
            P = held[:, : columns.stop - columns.start]
            for part, rows in self.chunks():
                P[part].copy_(rows[:, columns])
            yield columns, P

    def _slices(self, width: int) -> Iterator[slice]:
        for start in range(0, self.width, width):
            yield slice(start, min(start + width, self.width))

    def tensor(self) -> Tensor:
        """P as one (n, D) tensor."""
        self._join()
        return self._chunks[0] if len(self._chunks) == 1 else torch.cat(self._chunks)


def squares(rows: Tensor, known: Tensor | None = None) -> Tensor:
    """||row||^2 (B,) of rows (B, D) in fp64 to about 1e-6, whatever the scale; NaN and inf stay.

    `known`: the same by `row_dots`, to be mended in place where it left the range of fp32.
    """
    if not len(rows):
        return rows.new_zeros(0, dtype=torch.float64)
    found = known
    if found is None:
        found = row_dots([rows.detach()], rows.new_empty(0, rows.shape[1]))[1]
    if rows.dtype != torch.float64:
        # squares of fp32 that may have left its range
        lost = torch.nonzero((found < LEAST_SQUARE) | ~torch.isfinite(found)).flatten()
        for part in lost.split(32):
            found[part] = rows[part].double().square().sum(1)
    return found

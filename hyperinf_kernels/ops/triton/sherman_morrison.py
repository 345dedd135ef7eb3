"""The DataInf operator with one read of G from device memory.

G is walked in chunks of rows that stay in L2: one launch forms every row's squared norm and its dot
products with the queries, the next reads the same rows again, now from L2, for the weighted sum.
Rows of the norms and dots are cut along D as well, so that a short chunk fills the GPU; the parts
are added in order. Rows that are gradients of (delta, act) are formed in L2 before each chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .grad import formed
from .launch import MULTIPROCESSORS, QUERIES, arch_of, chunk_rows, on_device
from .tile import dot


@triton.jit
def _dots_kernel(
    V, G, NORMS, DOTS, queries, rows, columns, row_blocks, splits, per_split,
    stride_vb, stride_vm, stride_gb, stride_gn,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Squared norms (splits, rows) and dots (splits, rows, QUERIES) of a chunk's rows."""
    pid = tl.program_id(0)
    b = (pid // (row_blocks * splits)).to(tl.int64)
    split = (pid // row_blocks) % splits
    n = (pid % row_blocks) * ROWS + tl.arange(0, ROWS)
    q = tl.arange(0, QUERIES)
    c = split * per_split + tl.arange(0, COLUMNS)
    end = tl.minimum(columns, (split + 1) * per_split)
    g_at = G + b * stride_gb + n.to(tl.int64)[:, None] * stride_gn + c[None, :]
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if QUERIES == 1:
        products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    else:
        dots = tl.zeros((ROWS, QUERIES), dtype=tl.float32)
    for first in range(split * per_split, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        g = tl.load(g_at, mask=(n < rows)[:, None] & (column < end)[None, :], other=0.0)
        g = g.to(tl.float32)
        squares += g * g
        if QUERIES == 1:
            v = tl.load(V + b * stride_vb + column, mask=column < end, other=0.0)
            products += g * v[None, :]
        else:
            v = tl.load(V + b * stride_vb + q[None, :].to(tl.int64) * stride_vm + column[:, None],
                        mask=(q < queries) & (column < end)[:, None], other=0.0)  # fmt: skip
            dots = dot(g, v, dots, PRECISION)
        g_at += COLUMNS
    place = (b * splits + split) * rows + n
    tl.store(NORMS + place, tl.sum(squares, axis=1), mask=n < rows)
    if QUERIES == 1:
        tl.store(DOTS + place, tl.sum(products, axis=1), mask=n < rows)
    else:
        tl.store(DOTS + place[:, None] * QUERIES + q[None, :], dots, mask=(n < rows)[:, None])


@triton.jit
def _sum_kernel(
    V, G, NORMS, DOTS, LAM, OUT, queries, rows, columns, column_blocks, splits, first_chunk,
    last_chunk, total_rows, stride_vb, stride_vm, stride_gb, stride_gn, stride_ob,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT += sum_n dot_n / (lam + norm_n) g_n; the last chunk turns it into (V - OUT / n) / lam."""
    pid = tl.program_id(0)
    b = (pid // column_blocks).to(tl.int64)
    column = (pid % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    q = tl.arange(0, QUERIES)
    lam = tl.load(LAM + b)
    if QUERIES == 1:
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    else:
        total = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    for first in range(0, rows, ROWS):
        n = first + tl.arange(0, ROWS)
        place = b * splits * rows + n
        norm = tl.zeros((ROWS,), dtype=tl.float32)
        if QUERIES == 1:
            weight = tl.zeros((ROWS,), dtype=tl.float32)
        else:
            weight = tl.zeros((QUERIES, ROWS), dtype=tl.float32)
        for _ in range(splits):
            norm += tl.load(NORMS + place, mask=n < rows, other=0.0)
            if QUERIES == 1:
                weight += tl.load(DOTS + place, mask=n < rows, other=0.0)
            else:
                weight += tl.load(DOTS + place[None, :] * QUERIES + q[:, None],
                                  mask=(n < rows)[None, :], other=0.0)  # fmt: skip
            place += rows
        g = tl.load(G + b * stride_gb + n.to(tl.int64)[:, None] * stride_gn + column[None, :],
                    mask=(n < rows)[:, None] & (column < columns)[None, :], other=0.0)  # fmt: skip
        g = g.to(tl.float32)
        if QUERIES == 1:
            total += (weight / (lam + norm))[:, None] * g
        else:
            total = dot(weight / (lam + norm)[None, :], g, total, PRECISION)
    if QUERIES == 1:
        total = tl.sum(total, axis=0)[None, :]
    inside = (q < queries)[:, None] & (column < columns)[None, :]
    wide = q[:, None].to(tl.int64)
    at = OUT + b * stride_ob + wide * columns + column[None, :]
    if first_chunk == 0:
        total += tl.load(at, mask=inside, other=0.0)
    if last_chunk != 0:
        v = tl.load(V + b * stride_vb + wide * stride_vm + column[None, :],
                    mask=inside, other=0.0)  # fmt: skip
        total = (v - total / total_rows) / lam
    tl.store(at, total, mask=inside)


def _arithmetic(queries: int) -> tuple[int, str]:
    """Queries per launch and their precision: one needs no tensor cores, which work on 16."""
    return (1, "ieee") if queries == 1 else (QUERIES, "tf32x3")


class Accumulation:
    """The running sum of chunks of rows into `out`, with the buffers that its launches share.

    Args:
        V: (B, m, D) fp32, unit column stride. lam: (B,) fp32. out: (B, m, D) fp32, contiguous.
        step: rows of the largest chunk. total: rows of all chunks together.
    """

    def __init__(self, V: Tensor, lam: Tensor, out: Tensor, step: int, total: int) -> None:
        self.V, self.lam, self.out, self.total = V, lam, out, total
        self.seen = 0
        batch, queries, columns = V.shape
        arch = arch_of(V)
        self.width, self.precision = _arithmetic(queries)
        self.dots = choose("rows_dots", arch, self.precision, self.width)
        self.sums = choose("rows_sum", arch, self.precision, self.width)
        row_blocks = triton.cdiv(step, self.dots.blocks["ROWS"])
        tile = self.dots.blocks["COLUMNS"]
        wanted = triton.cdiv(MULTIPROCESSORS[arch], row_blocks * batch)
        splits = max(1, min(wanted, triton.cdiv(columns, tile)))
        self.per_split = triton.cdiv(triton.cdiv(columns, splits), tile) * tile
        self.splits = triton.cdiv(columns, self.per_split)
        self.norms = V.new_empty(batch * self.splits * step)
        self.products = V.new_empty(batch * self.splits * step * self.width)

    def add(self, chunk: Tensor) -> None:
        """Add rows (B, at most `step`, D); the last chunk turns the sum into the result."""
        batch, queries, columns = self.V.shape
        rows, splits, width = chunk.shape[1], self.splits, self.width
        first, last = self.seen == 0, self.seen + rows >= self.total
        self.seen += rows
        row_blocks = triton.cdiv(rows, self.dots.blocks["ROWS"])
        column_blocks = triton.cdiv(columns, self.sums.blocks["COLUMNS"])
        for query in range(0, queries, width):
            v, o = (t[:, query : query + width] for t in (self.V, self.out))
            _dots_kernel[(batch * splits * row_blocks,)](
                v, chunk, self.norms, self.products, v.shape[1], rows, columns, row_blocks, splits,
                self.per_split, v.stride(0), v.stride(1), chunk.stride(0), chunk.stride(1),
                QUERIES=width, PRECISION=self.precision, **self.dots.options(),
            )  # fmt: skip
            _sum_kernel[(batch * column_blocks,)](
                v, chunk, self.norms, self.products, self.lam, o, v.shape[1], rows, columns,
                column_blocks, splits, int(first), int(last), self.total, v.stride(0), v.stride(1),
                chunk.stride(0), chunk.stride(1), o.stride(0), QUERIES=width,
                PRECISION=self.precision, **self.sums.options(),
            )  # fmt: skip


@torch.library.custom_op("hyperinf_triton::sherman_morrison", mutates_args=())
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    """`V @ mean_i inv(outer(g_i, g_i) + lam * I)` per matrix of the batch.

    Args:
        V: (B, m, D) fp32. G: (B, n, D) fp32, fp16 or bf16; both with unit column stride.
        lam: (B,) fp32.

    Returns:
        (B, m, D) fp32, contiguous.
    """
    batch, queries, columns = V.shape
    out = V.new_empty(V.shape)
    if out.numel() == 0:
        return out
    arch, (width, precision) = arch_of(V), _arithmetic(queries)
    block = choose("rows_dots", arch, precision, width).blocks["ROWS"]
    step = chunk_rows(columns, G.element_size() * batch, arch, block)
    step = min(step, G.shape[1])
    total = Accumulation(V, lam, out, step, G.shape[1])
    with on_device(V):
        for first in range(0, G.shape[1], step):
            total.add(G[:, first : first + step])
    return out


@sherman_morrison.register_fake
def _(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    return V.new_empty(V.shape)


@torch.library.custom_op("hyperinf_triton::sherman_morrison_factored", mutates_args=())
def sherman_morrison_factored(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    """`sherman_morrison(V.flatten(1), (delta.mT @ act).flatten(1), lam)`, unflattened again.

    Gradients exist a slice at a time, in a buffer that stays in L2: delta and act are read once.

    Args:
        V: (m, O, I) fp32, contiguous. delta: (n, T, O). act: (n, T, I), the same dtype; both with
            unit column stride. lam: (1,) fp32.

    Returns:
        (m, O, I) fp32, contiguous.
    """
    out = V.new_empty(V.shape)
    if out.numel() == 0:
        return out
    total: Accumulation | None = None
    with on_device(V):
        for part, grads in formed(delta, act):
            if total is None:
                flat, into = V.flatten(1)[None], out.flatten(1)[None]
                total = Accumulation(flat, lam, into, part.stop, len(delta))
            total.add(grads.flatten(1)[None])
    return out


@sherman_morrison_factored.register_fake
def _(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    return V.new_empty(V.shape)

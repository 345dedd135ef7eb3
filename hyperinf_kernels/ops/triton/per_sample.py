"""Dots with queries and squared norms of per-sample gradients that are never written.

A program forms a few rows of one sample's gradient g = delta^T act a tile of columns at a time and
contracts the tile with a few queries on tensor cores: with W's rows (query, row) on one side and
g's rows on the other, the wanted entries are those whose rows agree. For more queries it costs less
to leave g in L2 for a product of its own (`grad.formed`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import FUSED_QUERIES, MULTIPROCESSORS, arch_of, on_device, precision_here, products_of
from .tile import dot, gradient_tile


@triton.jit
def _per_sample_kernel(
    DELTA, ACT, W, DOTS, NORMS,
    samples, tokens, rows, columns, queries, row_blocks, splits, per_split,
    stride_db, stride_dt, stride_ab, stride_at, stride_wq, stride_wo,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """DOTS (splits, row_blocks, samples, queries) and NORMS (splits, row_blocks, samples)."""
    pid = tl.program_id(0)
    b = (pid // (row_blocks * splits)).to(tl.int64)
    part = pid % (row_blocks * splits)
    row_block = part % row_blocks
    split = part // row_blocks
    o = row_block * ROWS + tl.arange(0, ROWS)
    # row w of the query tile is row w % ROWS of query w // ROWS
    w = tl.arange(0, QUERIES * ROWS)
    q = w // ROWS
    w_row = row_block * ROWS + w % ROWS
    w_at = W + q.to(tl.int64) * stride_wq + w_row.to(tl.int64) * stride_wo
    squares = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    agree = tl.zeros((QUERIES * ROWS, ROWS), dtype=tl.float32)
    end = tl.minimum(columns, (split + 1) * per_split)
    for first in range(split * per_split, end, COLUMNS):
        i = first + tl.arange(0, COLUMNS)
        g = gradient_tile(
            DELTA + b * stride_db, ACT + b * stride_ab, tokens, stride_dt, stride_at, o, i, rows,
            end, ROWS, COLUMNS, TOKENS, PRECISION,
        )  # fmt: skip
        squares += g * g
        if queries > 0:
            query = tl.load(w_at[:, None] + i[None, :],
                            mask=((q < queries) & (w_row < rows))[:, None] & (i < end)[None, :],
                            other=0.0)  # fmt: skip
            agree = dot(query, tl.trans(g), agree, EXACT)
    place = part.to(tl.int64) * samples + b
    tl.store(NORMS + place, tl.sum(squares))
    same = (w % ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
    per_row = tl.sum(tl.where(same, agree, 0.0), axis=1)
    total = tl.sum(tl.reshape(per_row, (QUERIES, ROWS)), axis=1)
    q = tl.arange(0, QUERIES)
    tl.store(DOTS + place * queries + q, total, mask=q < queries)


@torch.library.custom_op("hyperinf_triton::per_sample", mutates_args=())
def per_sample(delta: Tensor, act: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """`einsum("boi,qoi->bq", g, W)` and `g.square().sum((1, 2))` for `g = delta.mT @ act`.

    Args:
        delta: (B, T, O). act: (B, T, I), the same dtype. W: (m, O, I) fp32, m at most
            `FUSED_QUERIES`, or m = 0 for norms alone. All with unit column stride.

    Returns:
        (B, m) dots and (B,) squared norms, fp32.
    """
    samples, tokens, rows = delta.shape
    columns, queries = act.shape[2], len(W)
    if queries > FUSED_QUERIES:
        raise ValueError(f"takes up to {FUSED_QUERIES} queries at once, got {queries}")
    if samples == 0 or rows == 0 or columns == 0:
        return W.new_zeros(samples, queries), W.new_zeros(samples)
    arch = arch_of(delta)
    precision = products_of([delta.dtype])
    config = choose("per_sample", arch, precision, rows)
    row_blocks = triton.cdiv(rows, config.blocks["ROWS"])
    tile = config.blocks["COLUMNS"]
    programs = samples * row_blocks
    splits = max(
        1, min(triton.cdiv(2 * MULTIPROCESSORS[arch], programs), triton.cdiv(columns, tile))
    )
    per_split = triton.cdiv(triton.cdiv(columns, splits), tile) * tile
    splits = triton.cdiv(columns, per_split)
    dots = W.new_empty(splits * row_blocks, samples, queries)
    norms = W.new_empty(splits * row_blocks, samples)
    with on_device(delta):
        _per_sample_kernel[(programs * splits,)](
            delta, act, W, dots, norms, samples, tokens, rows, columns, queries, row_blocks, splits,
            per_split, delta.stride(0), delta.stride(1), act.stride(0), act.stride(1), W.stride(0),
            W.stride(1), PRECISION=precision_here(precision), EXACT="tf32x3",
            QUERIES=FUSED_QUERIES, **config.options(),
        )  # fmt: skip
    return dots.sum(0), norms.sum(0)


@per_sample.register_fake
def _(delta: Tensor, act: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return W.new_empty(len(delta), len(W)), W.new_empty(len(delta))

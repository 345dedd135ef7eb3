"""C += alpha * L^T R over a long sum, cut along the sum where the output alone cannot fill the GPU.

Serves GFIM (L = R = stacked gradients, rows are summed over) and Gram matrices (L = G1^T). Cut sums
go to partial buffers that a second launch adds in order: no atomics, the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import MULTIPROCESSORS, arch_of, on_device, precision_here
from .raster import raster
from .tile import dot

WAVES = 2  # programs per multiprocessor below which the sum is cut
LEAST_DEPTH = 512  # terms of the sum that one program takes at least
PARTIAL_NUMBERS = 1 << 26  # 256 MB of partial sums at most


@triton.jit
def _add_tile(
    C, i, j, rows, cols, stride_cm, stride_cn, value, mirror, SYMMETRIC: tl.constexpr
):  # fmt: skip
    """Add a tile to C and, where `mirror`, its transpose to the mirrored place."""
    i = i[:, None].to(tl.int64)
    j = j[None, :].to(tl.int64)
    inside = (i < rows) & (j < cols)
    at = C + i * stride_cm + j * stride_cn
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)
    if SYMMETRIC:
        if mirror:
            at = C + j * stride_cm + i * stride_cn
            tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def _accumulate_kernel(
    C, L, R, PARTIAL, ORDER,
    rows, cols, depth, tiles, splits, per_split, alpha,
    stride_cb, stride_cm, stride_cn, stride_lb, stride_lk, stride_lm, stride_rb, stride_rk,
    stride_rn, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // (tiles * splits)).to(tl.int64)
    split = (pid // tiles) % splits
    tile = pid % tiles
    row_tile = tl.load(ORDER + 2 * tile)
    col_tile = tl.load(ORDER + 2 * tile + 1)
    i = row_tile * BLOCK + tl.arange(0, BLOCK)
    j = col_tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    start = split.to(tl.int64) * per_split
    length = tl.minimum(per_split, depth - start)
    # a row of a Gram matrix alone can be longer than 32 bits count
    l_row = L + b * stride_lb + i[:, None].to(tl.int64) * stride_lm
    r_col = R + b * stride_rb + j[None, :].to(tl.int64) * stride_rn
    l_at = l_row + (start + k)[None, :] * stride_lk
    r_at = r_col + (start + k)[:, None] * stride_rk
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(0, length, BLOCK_K):
        left = tl.load(l_at, mask=(i < rows)[:, None] & (k < length - first)[None, :], other=0.0)
        right = tl.load(r_at, mask=(k < length - first)[:, None] & (j < cols)[None, :], other=0.0)
        acc = dot(left, right, acc, PRECISION)
        # rows of a whole model's gradients are 2^26 numbers apart and more
        l_at += tl.cast(BLOCK_K, tl.int64) * stride_lk
        r_at += tl.cast(BLOCK_K, tl.int64) * stride_rk
    if SYMMETRIC:
        if row_tile == col_tile:
            acc = 0.5 * (acc + tl.trans(acc))
    if splits == 1:
        _add_tile(C + b * stride_cb, i, j, rows, cols, stride_cm, stride_cn, alpha * acc,
                  row_tile != col_tile, SYMMETRIC)  # fmt: skip
    else:
        at = PARTIAL + (pid.to(tl.int64) * BLOCK * BLOCK) + tl.arange(0, BLOCK)[:, None] * BLOCK
        tl.store(at + tl.arange(0, BLOCK)[None, :], acc)


@triton.jit
def _reduce_kernel(
    C, PARTIAL, ORDER, rows, cols, tiles, splits, alpha, stride_cb, stride_cm, stride_cn,
    BLOCK: tl.constexpr, STRIP: tl.constexpr, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of one strip of one tile to C, first split first."""
    pid = tl.program_id(0)
    strips: tl.constexpr = BLOCK // STRIP
    b = (pid // (tiles * strips)).to(tl.int64)
    tile = (pid // strips) % tiles
    within = (pid % strips) * STRIP + tl.arange(0, STRIP)
    row_tile = tl.load(ORDER + 2 * tile)
    col_tile = tl.load(ORDER + 2 * tile + 1)
    j = tl.arange(0, BLOCK)
    at = (
        PARTIAL + (b * splits * tiles + tile) * BLOCK * BLOCK + within[:, None] * BLOCK + j[None, :]
    )
    total = tl.zeros((STRIP, BLOCK), dtype=tl.float32)
    for _ in range(splits):
        total += tl.load(at)
        at += tiles * (BLOCK * BLOCK)
    _add_tile(C + b * stride_cb, row_tile * BLOCK + within, col_tile * BLOCK + j, rows, cols,
              stride_cm, stride_cn, alpha * total, row_tile != col_tile, SYMMETRIC)  # fmt: skip


def splits_of(depth: int, tiles: int, arch: int, block: int) -> int:
    """Parts of the sum: enough programs for the GPU, none shorter than LEAST_DEPTH terms."""
    wanted = triton.cdiv(WAVES * MULTIPROCESSORS[arch], tiles)
    room = PARTIAL_NUMBERS // (tiles * block * block)
    return max(1, min(wanted, depth // LEAST_DEPTH, room))


@torch.library.custom_op("hyperinf_triton::accumulate_", mutates_args={"C"})
def accumulate_(
    C: Tensor, L: Tensor, R: Tensor, alpha: float, precision: str, symmetric: bool
) -> None:
    """`C += alpha * L.mT @ R` in place.

    Args:
        C: (B, rows, cols) fp32. L: (B, depth, rows), R: (B, depth, cols), fp32, fp16 or bf16, any
            strides.
        precision: of the products; "bf16" is exact for bf16 inputs, "tf32" for both halves.
        symmetric: L is R, so only tiles on and above the diagonal are computed and mirrored.
    """
    batch, rows, cols = C.shape
    depth = L.shape[1]
    if C.numel() == 0 or depth == 0:
        return
    arch = arch_of(C)
    config = choose("accumulate", arch, precision, max(rows, cols))
    block = config.blocks["BLOCK"]
    order = raster(triton.cdiv(rows, block), triton.cdiv(cols, block), symmetric, C.device)
    tiles = len(order)
    splits = splits_of(depth, batch * tiles, arch, block)
    per_split = triton.cdiv(depth, splits)
    splits = triton.cdiv(depth, per_split)
    partial = C.new_empty(batch * splits * tiles * block * block) if splits > 1 else C
    with on_device(C):
        _accumulate_kernel[(batch * splits * tiles,)](
            C, L, R, partial, order, rows, cols, depth, tiles, splits, per_split, alpha,
            *C.stride(), *L.stride(), *R.stride(), SYMMETRIC=symmetric,
            PRECISION=precision_here(precision), **config.options(),
        )  # fmt: skip
        if splits > 1:
            reduction = choose("reduce", arch, "ieee", block)
            strips = block // reduction.blocks["STRIP"]
            _reduce_kernel[(batch * tiles * strips,)](
                C, partial, order, rows, cols, tiles, splits, alpha, *C.stride(),
                BLOCK=block, SYMMETRIC=symmetric, **reduction.options(),
            )  # fmt: skip


@accumulate_.register_fake
def _(C: Tensor, L: Tensor, R: Tensor, alpha: float, precision: str, symmetric: bool) -> None:
    return None

"""Batched d x d products whose epilogue evaluates a polynomial step, for matrices of any size.

One launch computes, for every matrix of the batch,

    acc  = L @ M
    out1 = w[0, 0] I + w[0, 1] acc + w[0, 2] C1 + w[0, 3] C2 + w[0, 4] C3
    out2 = w[1, 0] I + w[1, 1] acc + ...

and the squared Frobenius norm of out1 per tile, so every Schulz step of degree q is exactly its
`schedule.PRODUCTS[q]` launches and no elementwise pass over a matrix exists beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import arch_of, on_device, precision_here, uploaded
from .raster import raster
from .tile import dot

MOST_TERMS = 3
WEIGHTS = 2 + MOST_TERMS


@triton.jit
def _finish(
    acc, i, j, C1, C2, C3, OUT1, OUT2, w, matrix, d, terms, outputs, mirror,
    SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Combine, store and, where `mirror`, store transposed too; the sum of squares of out1."""
    at = matrix + i[:, None] * d + j[None, :]
    inside = (i < d)[:, None] & (j < d)[None, :]
    eye = tl.where(i[:, None] == j[None, :], 1.0, 0.0)
    out = tl.load(w) * eye + tl.load(w + 1) * acc
    second = acc
    if outputs > 1:
        second = tl.load(w + 5) * eye + tl.load(w + 6) * acc
    if terms > 0:
        c = tl.load(C1 + at, mask=inside, other=0.0)
        out += tl.load(w + 2) * c
        if outputs > 1:
            second += tl.load(w + 7) * c
    if terms > 1:
        c = tl.load(C2 + at, mask=inside, other=0.0)
        out += tl.load(w + 3) * c
        if outputs > 1:
            second += tl.load(w + 8) * c
    if terms > 2:
        c = tl.load(C3 + at, mask=inside, other=0.0)
        out += tl.load(w + 4) * c
        if outputs > 1:
            second += tl.load(w + 9) * c
    tl.store(OUT1 + at, out, mask=inside)
    if outputs > 1:
        tl.store(OUT2 + at, second, mask=inside)
    norm = tl.sum(tl.where(inside, out * out, 0.0))
    if SYMMETRIC:
        if mirror:
            norm *= 2
            at = matrix + j[None, :] * d + i[:, None]
            tl.store(OUT1 + at, out, mask=inside)
            if outputs > 1:
                tl.store(OUT2 + at, second, mask=inside)
    return norm


@triton.jit
def _product_kernel(
    L, M, C1, C2, C3, OUT1, OUT2, WEIGHT, NORMS, ORDER,
    d, tiles, terms, outputs, stride_lb, stride_lm,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    row_tile = tl.load(ORDER + 2 * tile)
    col_tile = tl.load(ORDER + 2 * tile + 1)
    i = row_tile * BLOCK + tl.arange(0, BLOCK)
    j = col_tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    matrix = b * d * d
    l_at = L + b * stride_lb + i[:, None].to(tl.int64) * stride_lm + k[None, :]
    m_at = M + matrix + k[:, None] * d + j[None, :]
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for first in range(0, d, BLOCK_K):
        left = tl.load(l_at, mask=(i < d)[:, None] & (k < d - first)[None, :], other=0.0)
        right = tl.load(m_at, mask=(k < d - first)[:, None] & (j < d)[None, :], other=0.0)
        acc = dot(left, right, acc, PRECISION)
        l_at += BLOCK_K
        m_at += BLOCK_K * d
    if SYMMETRIC:
        if row_tile == col_tile:
            # tensor cores do not round (i, j) and (j, i) alike
            acc = 0.5 * (acc + tl.trans(acc))
    w = WEIGHT + b * (2 * 5)
    mirror = row_tile != col_tile
    if BLOCK > 64:
        # half a tile at a time: the epilogue of a whole one spills registers
        half: tl.constexpr = BLOCK // 2
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK, 2, half)), (0, 2, 1)))
        j = col_tile * BLOCK + tl.arange(0, half)
        norm = _finish(low, i, j, C1, C2, C3, OUT1, OUT2, w, matrix, d, terms, outputs, mirror,
                       SYMMETRIC)  # fmt: skip
        norm += _finish(high, i, j + half, C1, C2, C3, OUT1, OUT2, w, matrix, d, terms, outputs,
                        mirror, SYMMETRIC)  # fmt: skip
    else:
        norm = _finish(acc, i, j, C1, C2, C3, OUT1, OUT2, w, matrix, d, terms, outputs, mirror,
                       SYMMETRIC)  # fmt: skip
    tl.store(NORMS + pid, norm)


def product(
    left: Tensor,
    right: Tensor,
    weights: Sequence[Sequence[Tensor | float]],
    terms: Sequence[Tensor] = (),
    *,
    precision: str,
    symmetric: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """One launch: `len(weights)` (1 or 2) combinations of I, left @ right and the `terms`.

    Args:
        left: (B, d, d) fp32 with unit column stride. right, terms: (B, d, d) fp32, contiguous.
        weights: per output the factors of I, the product and each term; numbers or (B,) tensors.
        precision: "ieee", "tf32x3", "tf32" or "bf16".
        symmetric: compute only tiles on and above the diagonal and mirror them. Right only for
            outputs that are symmetric, and safe only while unit roundoff x condition^2 << 1.

    Returns:
        The outputs, and ||out1||_F^2 per matrix, summed over tiles in a fixed order.
    """
    batch, d, _ = left.shape
    arch = arch_of(left)
    config = choose("product", arch, precision, d)
    side = triton.cdiv(d, config.blocks["BLOCK"])
    order = raster(side, side, symmetric, left.device)
    tiles = len(order)
    outs = [torch.empty_like(right) for _ in weights]
    norms = left.new_empty(batch, tiles)
    padded = [*terms, *[right] * (MOST_TERMS - len(terms))]
    with on_device(left):
        _product_kernel[(batch * tiles,)](
            left, right, *padded, outs[0], outs[-1], _packed(weights, batch, left.device), norms,
            order, d, tiles, len(terms), len(outs), left.stride(0), left.stride(1),
            SYMMETRIC=symmetric, PRECISION=precision_here(precision), **config.options(),
        )  # fmt: skip
    return outs, norms.sum(1)


def _packed(
    weights: Sequence[Sequence[Tensor | float]], batch: int, device: torch.device
) -> Tensor:
    """(B, 2 * WEIGHTS), zeros where an output has fewer terms."""
    padded = [w for row in weights for w in (*row, *[0.0] * (WEIGHTS - len(row)))]
    padded += [0.0] * (2 * WEIGHTS - len(padded))
    columns = [w if isinstance(w, Tensor) else _constant(w, device).expand(batch) for w in padded]
    return torch.stack(columns, 1)


@uploaded
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)

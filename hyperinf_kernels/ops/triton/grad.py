"""Per-sample gradients g = delta^T act, a tile of one sample per program, and walks over them.

What is only reduced afterwards is formed a slice at a time in one buffer that stays in L2: delta
and act are read from memory once, and the next kernel finds the gradients in cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import arch_of, on_device, precision_here, products_of, slice_samples
from .tile import gradient_tile


@triton.jit
def _grad_kernel(
    DELTA, ACT, OUT, tokens, rows, columns, row_blocks, column_blocks,
    stride_db, stride_dt, stride_ab, stride_at, stride_ob, stride_oo,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT[b, o, i] = sum_t DELTA[b, t, o] ACT[b, t, i]."""
    pid = tl.program_id(0)
    b = (pid // (row_blocks * column_blocks)).to(tl.int64)
    o = (pid // column_blocks) % row_blocks * ROWS + tl.arange(0, ROWS)
    i = (pid % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    g = gradient_tile(
        DELTA + b * stride_db, ACT + b * stride_ab, tokens, stride_dt, stride_at, o, i, rows,
        columns, ROWS, COLUMNS, TOKENS, PRECISION,
    )  # fmt: skip
    at = OUT + b * stride_ob + o[:, None].to(tl.int64) * stride_oo + i[None, :]
    tl.store(at, g, mask=(o < rows)[:, None] & (i < columns)[None, :])


@torch.library.custom_op("hyperinf_triton::per_sample_grad_", mutates_args={"out"})
def per_sample_grad_(out: Tensor, delta: Tensor, act: Tensor) -> None:
    """`out.copy_(delta.mT @ act)`.

    Args:
        out: (B, O, I) fp32. delta: (B, T, O). act: (B, T, I), the same dtype: fp32, fp16 or bf16.
            All with unit column stride.
    """
    samples, rows, columns = out.shape
    if out.numel() == 0:
        return
    precision = products_of([delta.dtype])
    config = choose("grad", arch_of(out), precision, rows)
    row_blocks = triton.cdiv(rows, config.blocks["ROWS"])
    column_blocks = triton.cdiv(columns, config.blocks["COLUMNS"])
    with on_device(out):
        _grad_kernel[(samples * row_blocks * column_blocks,)](
            delta, act, out, delta.shape[1], rows, columns, row_blocks, column_blocks,
            delta.stride(0), delta.stride(1), act.stride(0), act.stride(1), out.stride(0),
            out.stride(1), PRECISION=precision_here(precision), **config.options(),
        )  # fmt: skip


@per_sample_grad_.register_fake
def _(out: Tensor, delta: Tensor, act: Tensor) -> None:
    return None


def formed(delta: Tensor, act: Tensor, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """(samples, their gradients (b, O, I) in fp32), all in one buffer that the next slice reuses.

    Args:
        delta: (B, T, O). act: (B, T, I); as `per_sample_grad_` takes them.
        most: samples in the buffer. None: as many as stay in L2 (`slice_samples`).
    """
    samples, tokens, rows = delta.shape
    columns = act.shape[2]
    if most is None:
        most = slice_samples(tokens, rows, columns, delta.element_size(), arch_of(delta))
    step = max(1, min(samples, most))
    held = delta.new_empty(step, rows, columns, dtype=torch.float32)
    for first in range(0, samples, step):
        part = slice(first, min(first + step, samples))
        grads = held[: part.stop - first]
        per_sample_grad_(grads, delta[part], act[part])
        yield part, grads

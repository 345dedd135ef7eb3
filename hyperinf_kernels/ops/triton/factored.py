"""The DataInf operator on g_i = delta_i^T act_i, without forming any gradient.

Norms and dots come from `per_sample`; the weighted sum of all gradients is one product over samples
and tokens, sum_i c_i g_i = (c delta)^T act, with c applied while delta is loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import choose
from .launch import arch_of, on_device, precision_here
from .per_sample import per_sample
from .tile import dot


@triton.jit
def _weighted_sum_kernel(
    DELTA, ACT, WEIGHT, OUT, samples, tokens, rows, columns, queries, column_blocks,
    stride_db, stride_dt, stride_ab, stride_at,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT[q, o, i] = sum_{b, t} WEIGHT[b, q] DELTA[b, t, o] ACT[b, t, i]; tile rows are (q, o)."""
    pid = tl.program_id(0)
    r = (pid // column_blocks) * ROWS + tl.arange(0, ROWS)
    i = (pid % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.arange(0, TOKENS)
    q = r // rows
    o = r % rows
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for _ in range(samples):
        weight = tl.load(WEIGHT + q, mask=q < queries, other=0.0)
        for start in range(0, tokens, TOKENS):
            tt = start + t
            seen = tt < tokens
            delta = tl.load(DELTA + tt[None, :].to(tl.int64) * stride_dt + o[:, None],
                            mask=seen[None, :] & (q < queries)[:, None], other=0.0)  # fmt: skip
            act = tl.load(ACT + tt[:, None].to(tl.int64) * stride_at + i[None, :],
                          mask=seen[:, None] & (i < columns)[None, :], other=0.0)  # fmt: skip
            total = dot(delta.to(tl.float32) * weight[:, None], act, total, PRECISION)
        WEIGHT += queries
        DELTA += stride_db
        ACT += stride_ab
    at = OUT + r.to(tl.int64)[:, None] * columns + i[None, :]
    tl.store(at, total, mask=(q < queries)[:, None] & (i < columns)[None, :])


@torch.library.custom_op("hyperinf_triton::weighted_sum", mutates_args=())
def weighted_sum(delta: Tensor, act: Tensor, weights: Tensor) -> Tensor:
    """`einsum("bq,bto,bti->qoi", weights, delta, act)`, (m, O, I) fp32.

    Args:
        delta: (B, T, O). act: (B, T, I); both with unit column stride. weights: (B, m) fp32.
    """
    samples, tokens, rows = delta.shape
    columns, queries = act.shape[2], weights.shape[1]
    out = weights.new_empty(queries, rows, columns)
    if out.numel() == 0 or samples == 0:
        return out.zero_()
    config = choose("weighted_sum", arch_of(delta), "tf32x3", queries * rows)
    column_blocks = triton.cdiv(columns, config.blocks["COLUMNS"])
    row_blocks = triton.cdiv(queries * rows, config.blocks["ROWS"])
    with on_device(delta):
        _weighted_sum_kernel[(row_blocks * column_blocks,)](
            delta, act, weights.contiguous(), out, samples, tokens, rows, columns, queries,
            column_blocks, delta.stride(0), delta.stride(1), act.stride(0), act.stride(1),
            PRECISION=precision_here("tf32x3"), **config.options(),
        )  # fmt: skip
    return out


@weighted_sum.register_fake
def _(delta: Tensor, act: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[1], delta.shape[2], act.shape[2])


def sherman_morrison_factored(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    """`sherman_morrison(V.flatten(1), (delta.mT @ act).flatten(1), lam)`, unflattened again.

    Args:
        V: (m, O, I) fp32. delta: (n, T, O). act: (n, T, I). lam: scalar tensor, fp32.

    Returns:
        (m, O, I) fp32. Two launches read delta and act twice; no gradient is ever written.
    """
    dots, norms = per_sample(delta, act, V)
    weights = dots / (lam + norms)[:, None]
    return (V - weighted_sum(delta, act, weights) / len(delta)) / lam

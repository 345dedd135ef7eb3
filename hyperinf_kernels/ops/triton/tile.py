"""The one matrix product of every kernel here, and the gradient tile made of it.

"ieee" is fp32 multiply-add, "tf32x3" three tensor-core passes that recover fp32's digits, "tf32"
and "bf16" one pass on operands rounded to 10 and 7 bits. "bf16_widened" rounds to bf16 and
multiplies in fp32: the same products, for Triton's interpreter, which cannot multiply bf16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32."""
    if PRECISION == "bf16":
        acc = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), acc, input_precision="ieee")
    elif PRECISION == "bf16_widened":
        a = a.to(tl.bfloat16).to(tl.float32)
        b = b.to(tl.bfloat16).to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit
def gradient_tile(
    DELTA, ACT, tokens, stride_dt, stride_at, o, i, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_t DELTA[t, o] ACT[t, i] of one sample, (ROWS, COLUMNS) in fp32; zero beyond the ends."""
    t = tl.arange(0, TOKENS)
    g = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        tt = start + t
        seen = tt < tokens
        tt = tt.to(tl.int64)
        delta = tl.load(DELTA + tt[None, :] * stride_dt + o[:, None],
                        mask=seen[None, :] & (o < rows)[:, None], other=0.0)  # fmt: skip
        act = tl.load(ACT + tt[:, None] * stride_at + i[None, :],
                      mask=seen[:, None] & (i < columns)[None, :], other=0.0)  # fmt: skip
        g = dot(delta, act, g, PRECISION)
    return g

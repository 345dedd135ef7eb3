"""The one matrix product of every kernel here, with its arithmetic stated.

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

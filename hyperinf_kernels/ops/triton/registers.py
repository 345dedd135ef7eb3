"""The whole Schulz chain of one matrix in the registers of one program, for d up to 32.

fp32 throughout: at these sizes launches cost more than products. Larger matrices spill registers
here and run in `resident`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import dot


@triton.jit
def _schulz_registers_kernel(
    A, START, COEFFICIENTS, DEGREES, X_OUT, RESIDUAL, STEPS_DONE,
    d, steps, batch, tol, stride_ab, stride_am,
    D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b = pid.to(tl.int64)
    i = tl.arange(0, D)
    inside = (i < d)[:, None] & (i < d)[None, :]
    eye = tl.where((i[:, None] == i[None, :]) & inside, 1.0, 0.0)
    a = tl.load(A + b * stride_ab + i[:, None] * stride_am + i[None, :], mask=inside, other=0.0)
    start = tl.load(START + b)
    zero = tl.zeros((D, D), dtype=tl.float32)
    x = start * eye
    r = eye - start * a
    residual = tl.sqrt(tl.sum(r * r) / d)
    k = 0
    # NaN goes on, so that it reaches the result
    while (k < steps) & ~(residual <= tol):
        c = COEFFICIENTS + (k * batch + b) * 8
        degree = tl.load(DEGREES + k)
        c0 = tl.load(c)
        c1 = tl.load(c + 1)
        if degree == 2:
            z = c0 * eye + c1 * r
        else:
            r2 = dot(r, r, zero, "ieee")
            if degree == 3:
                z = eye + c0 * (r + r2)
            elif degree == 5:
                z = dot(c0 * eye + c1 * r2, r + r2, eye, "ieee")
            else:
                c2 = tl.load(c + 2)
                c3 = tl.load(c + 3)
                c4 = tl.load(c + 4)
                c5 = tl.load(c + 5)
                c6 = tl.load(c + 6)
                c7 = tl.load(c + 7)
                y = dot(r2, c0 * r2 + c1 * r, zero, "ieee")
                z = dot(y + c3 * r2 + c2 * r, y + c4 * r2, eye + c5 * y + c7 * r2 + c6 * r, "ieee")
        if k == 0:
            x = start * z
        else:
            x = dot(x, z, zero, "ieee")
        r = eye - dot(a, x, zero, "ieee")
        residual = tl.sqrt(tl.sum(r * r) / d)
        k += 1
    out = X_OUT + b * d * d + i[:, None] * d + i[None, :]
    tl.store(out, x, mask=inside)
    tl.store(RESIDUAL + b, residual)
    tl.store(STEPS_DONE + b, k)

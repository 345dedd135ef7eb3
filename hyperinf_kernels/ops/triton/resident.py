"""The whole Schulz chain of one matrix by one program, its operands in L2, for d up to 128.

A program keeps six d x d tiles in its own scratch and walks the batch with the grid's stride, so
the scratch of all programs together stays in L2 whatever the batch is. Products are formed a panel
of columns at a time: a whole output tile would spill registers from d = 64 on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tile import dot

SLOTS = tl.constexpr(6)


@triton.jit
def _multiply(
    P, Q, first_column, d, stride_p,
    D: tl.constexpr, PANEL: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PANEL columns of P @ Q for D x D matrices in memory; P counts as zero beyond d."""
    i = tl.arange(0, D)
    j = first_column + tl.arange(0, PANEL)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((D, PANEL), dtype=tl.float32)
    for first in range(0, D, BLOCK_K):
        kk = first + k
        p = tl.load(P + i[:, None] * stride_p + kk[None, :],
                    mask=(i < d)[:, None] & (kk < d)[None, :], other=0.0)  # fmt: skip
        q = tl.load(Q + kk[:, None] * D + j[None, :])
        acc = dot(p, q, acc, PRECISION)
    return acc


@triton.jit
def _schulz_resident_kernel(
    A, START, COEFFICIENTS, DEGREES, X_OUT, RESIDUAL, STEPS_DONE, SCRATCH,
    d, steps, batch, tol, stride_ab, stride_am,
    D: tl.constexpr, PANEL: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    i = tl.arange(0, D)[:, None]
    panel = tl.arange(0, PANEL)[None, :]
    X = SCRATCH + pid.to(tl.int64) * (SLOTS * D * D)
    P = X + D * D
    Q = X + 2 * D * D
    R = X + 3 * D * D
    S = X + 4 * D * D
    T = X + 5 * D * D
    b = pid.to(tl.int64)
    for _ in range(pid, batch, tl.num_programs(0)):
        start = tl.load(START + b)
        total = 0.0
        for first in range(0, D, PANEL):
            j = first + panel
            at = i * D + j
            eye = tl.where((i == j) & (i < d), 1.0, 0.0)
            a = tl.load(A + b * stride_ab + i * stride_am + j, mask=(i < d) & (j < d), other=0.0)
            r = eye - start * a
            tl.store(R + at, r)
            tl.store(X + at, start * eye)
            total += tl.sum(r * r)
        residual = tl.sqrt(total / d)
        tl.debug_barrier()
        k = 0
        # NaN goes on, so that it reaches the result
        while (k < steps) & ~(residual <= tol):
            c = COEFFICIENTS + (k * batch + b) * 8
            degree = tl.load(DEGREES + k)
            c0 = tl.load(c)
            c1 = tl.load(c + 1)
            c2 = tl.load(c + 2)
            c3 = tl.load(c + 3)
            c4 = tl.load(c + 4)
            c5 = tl.load(c + 5)
            c6 = tl.load(c + 6)
            c7 = tl.load(c + 7)
            # Q = Z, the factor of this step
            for first in range(0, D, PANEL):
                j = first + panel
                at = i * D + j
                if degree == 2:
                    z = tl.where((i == j) & (i < d), c0, 0.0) + c1 * tl.load(R + at)
                    tl.store(Q + at, z)
                else:
                    r2 = _multiply(R, R, first, D, D, D, PANEL, BLOCK_K, PRECISION)
                    r = tl.load(R + at)
                    eye = tl.where((i == j) & (i < d), 1.0, 0.0)
                    if degree == 3:
                        tl.store(Q + at, eye + c0 * (r + r2))
                    elif degree == 5:
                        tl.store(S + at, c0 * eye + c1 * r2)
                        tl.store(T + at, r + r2)
                    else:
                        tl.store(P + at, r2)
                        tl.store(Q + at, c0 * r2 + c1 * r)
            tl.debug_barrier()
            if degree == 9:
                for first in range(0, D, PANEL):
                    at = i * D + first + panel
                    y = _multiply(P, Q, first, D, D, D, PANEL, BLOCK_K, PRECISION)
                    r2 = tl.load(P + at)
                    tl.store(S + at, y + c3 * r2 + c2 * tl.load(R + at))
                    tl.store(T + at, y + c4 * r2)
                tl.debug_barrier()
            if degree >= 5:
                for first in range(0, D, PANEL):
                    j = first + panel
                    at = i * D + j
                    z = _multiply(S, T, first, D, D, D, PANEL, BLOCK_K, PRECISION)
                    z += tl.where((i == j) & (i < d), 1.0, 0.0)
                    if degree == 9:
                        z += c5 * tl.load(T + at) + (c7 - c5 * c4) * tl.load(P + at)
                        z += c6 * tl.load(R + at)
                    tl.store(Q + at, z)
                tl.debug_barrier()
            for first in range(0, D, PANEL):
                at = i * D + first + panel
                if k == 0:
                    x = start * tl.load(Q + at)
                else:
                    x = _multiply(X, Q, first, D, D, D, PANEL, BLOCK_K, PRECISION)
                tl.store(P + at, x)
            tl.debug_barrier()
            X, P = P, X
            total = 0.0
            for first in range(0, D, PANEL):
                j = first + panel
                ax = _multiply(
                    A + b * stride_ab, X, first, d, stride_am, D, PANEL, BLOCK_K, PRECISION
                )
                r = tl.where((i == j) & (i < d), 1.0, 0.0) - ax
                tl.store(R + i * D + j, r)
                total += tl.sum(r * r)
            tl.debug_barrier()
            residual = tl.sqrt(total / d)
            k += 1
        for first in range(0, D, PANEL):
            j = first + panel
            tl.store(X_OUT + b * d * d + i * d + j, tl.load(X + i * D + j),
                     mask=(i < d) & (j < d))  # fmt: skip
        tl.store(RESIDUAL + b, residual)
        tl.store(STEPS_DONE + b, k)
        b += tl.num_programs(0)
        tl.debug_barrier()

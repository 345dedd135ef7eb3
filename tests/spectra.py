"""Thousands of spectra, each inverted and solved in every precision and judged in wider arithmetic.

    python -m tests.spectra [COUNT]        10,000 by default

Each at every level of `check`. What is checked of every result: a residual that was measured is
within a factor of 2 of the one that numpy finds in 80-bit arithmetic, up to the rounding of an fp64
evaluation (which near condition 1e12 is as large as the residual itself); the true one is no larger
than a bound and no more than 10 times an estimate, up to that rounding; and either what is asked is
met, or the info says that it is not and that the matrix was replaced by the direct result. With
"off" nothing may be claimed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops.solve import BOUND, CHECKS, ESTIMATE, MEASURED, OF_ESTIMATE

Array = np.ndarray[Any, Any]

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
SIZES = (3, 8, 16, 31, 48)
TOLS = (None, 1e-3, 1e-6)
EPS64 = float(np.finfo(np.float64).eps)


def spectrum(kind: int, d: int, draw: np.random.Generator) -> Array:
    """Eigenvalues with their largest near 1 and a condition number up to 1e12."""
    kappa = 10.0 ** draw.uniform(0, 12)
    if kind == 0:  # log-uniform
        return np.exp(-np.log(kappa) * draw.random(d))
    if kind == 1:  # clusters
        centres = np.exp(-np.log(kappa) * draw.random(draw.integers(2, 5)))
        return draw.choice(centres, d) * (1 + 1e-3 * draw.random(d))
    if kind == 2:  # rank deficient plus damping
        mu = np.zeros(d)
        rank = int(draw.integers(1, d))
        mu[:rank] = draw.standard_normal(rank) ** 2
        return mu / mu.max() + 1 / kappa
    if kind == 3:  # all equal
        return np.ones(d)
    if kind == 4:  # 75 % at the damping
        mu = np.full(d, 1 / kappa)
        top = max(1, d // 4)
        mu[:top] = np.exp(-np.log(kappa) * draw.random(top))
        return mu
    # one strong direction over a flat floor
    mu = 1 / kappa * (1 + draw.random(d))
    mu[0] = 1
    return mu


def matrices(count: int, seed: int) -> Iterator[Array]:
    """Batches (B, d, d) of `count` matrices in all, fp64, of scales 1e-12 to 1e12."""
    draw = np.random.default_rng(seed)
    for size, d in enumerate(SIZES):
        share = count // len(SIZES) + (size < count % len(SIZES))
        mu = np.stack([spectrum(i % 6, d, draw) for i in range(share)])
        mu *= 10.0 ** draw.uniform(-12, 12, (share, 1))
        basis = np.linalg.qr(draw.standard_normal((share, d, d)))[0]
        A = (basis * mu[:, None, :]) @ basis.swapaxes(-1, -2)
        yield (A + A.swapaxes(-1, -2)) / 2


def definite(A: Array) -> Array:
    """Which matrices are positive definite beyond the rounding of this very question."""
    mu = np.linalg.eigvalsh(A)
    return mu[:, 0] > 8 * A.shape[-1] * EPS64 * mu[:, -1]


def judge(A: Array, V: Array, X: Array, info: Any, tol: float | None) -> Counter[str]:
    """Count what held; V (B, m, d) is the identity for an inverse."""
    wide_A, wide_V, wide_X = (M.astype(np.longdouble) for M in (A, V, X))
    size = np.linalg.norm(V, axis=(-2, -1))
    gap = (wide_V - wide_X @ wide_A).astype(np.float64)
    true = np.linalg.norm(gap, axis=(-2, -1)) / size
    # an inverse is judged by I - A X, here I - X A of a matrix that rounding made asymmetric
    if V.shape[-2] == V.shape[-1]:
        gap = (wide_V - wide_A @ wide_X).astype(np.float64)
        true = np.linalg.norm(gap, axis=(-2, -1)) / size
    rounding = np.linalg.norm(np.abs(X) @ np.abs(A), axis=(-2, -1)) / size
    noise = EPS64 * np.sqrt(A.shape[-1]) * rounding
    if info.residual is None:
        claims = int(info.converged is not None or info.known is not None)
        return Counter(results=len(A), lies=claims * len(A), replaced=int(info.replaced.sum()))
    reported = info.residual.numpy()
    known = np.full(len(A), MEASURED) if info.known is None else info.known.numpy()
    converged, replaced = info.converged.numpy(), info.replaced.numpy()
    bounded, guessed = known == BOUND, known == ESTIMATE
    above = np.select([bounded, guessed], [1.0, OF_ESTIMATE], 2.0) * reported
    below = np.where(bounded, 0.0, reported / 2)
    plain = (below <= true) & (true <= above)
    honest = (below <= true + noise) & (true <= above + noise)
    judged = np.where(guessed, OF_ESTIMATE, 1) * reported
    met = np.ones_like(converged) if tol is None else judged <= tol
    return Counter(
        results=len(A),
        lies=int((~honest).sum() + (~np.isfinite(reported)).sum()),
        within_rounding_only=int((honest & ~plain).sum()),
        false_claims=int((converged & ~met).sum()),
        unflagged=int((~converged & ~replaced).sum()),
        converged=int(converged.sum()),
        replaced=int(replaced.sum()),
        bounded=int(bounded.sum()),
        estimated=int(guessed.sum()),
        lowered=int(info.lowered.sum()),
    )


def examine(A: Array, precision: str, tol: float | None, check: str, seed: int) -> Counter[str]:
    """Inverses and a solve of one batch in fp64, and of its definite part in fp32."""
    draw = np.random.default_rng(seed)
    found: Counter[str] = Counter()
    d = A.shape[-1]
    for dtype in (np.float64, np.float32):
        rounded = A.astype(dtype)
        B = rounded[definite(rounded.astype(np.float64))]
        if not len(B):
            continue
        V = draw.standard_normal((len(B), 2, d)).astype(dtype)
        eye = np.broadcast_to(np.eye(d), B.shape)
        tensors = torch.from_numpy(B), torch.from_numpy(V)
        asked: dict[str, Any] = {"precision": precision, "tol": tol, "check": check,
                                 "return_info": True}  # fmt: skip
        X, info = hk.schulz_inverse(tensors[0], **asked)
        wide = B.astype(np.float64)
        found += judge(wide, eye, X.double().numpy(), info, tol)
        W, info = hk.schulz_solve(*tensors, **asked)
        found += judge(wide, V.astype(np.float64), W.double().numpy(), info, tol)
        X, info = hk.spd_inverse(tensors[0], method="direct", check=check, return_info=True)
        direct = judge(wide, eye, X.double().numpy(), info, None)
        # it is the direct result
        found += Counter({k: direct[k] for k in ("results", "lies", "bounded", "estimated")})
    return found


def run(count: int, seed: int = 0) -> dict[str, Counter[str]]:
    """{precision: counts} over `count` spectra; tolerances and levels of check go round."""
    totals: dict[str, Counter[str]] = {}
    for p, precision in enumerate(PRECISIONS):
        total: Counter[str] = Counter()
        for i, A in enumerate(matrices(count, seed)):
            for j, part in enumerate(np.array_split(A, len(TOLS))):
                for check in CHECKS if len(part) else ():
                    tol = TOLS[(i + j + p) % len(TOLS)]
                    total += examine(part, precision, tol, check, seed + i)
        totals[precision] = total
    return totals


def main() -> None:
    """Print the counts; exit code 1 if anything was not as promised."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    totals = run(count)
    for precision, total in totals.items():
        print(f"{precision:7}", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in total.items()))
    bad = sum(t[k] for t in totals.values() for k in ("lies", "false_claims", "unflagged"))
    print(f"{count} spectra:", "all as promised" if not bad else f"{bad} broken promises")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

"""Thousands of random settings of every method, each score held against 60-digit arithmetic.

    python -m tests.settings [COUNT] [--seed SEED]        10,000 by default

A setting is a kind of rows, sizes, a damping from 0.1 to 1e-12 of the mean square, a method with
its options and a door. What must hold of each: no score that is certified is off by more than the
tolerance in its report, for any query and block; nor is the sum over blocks. What may happen: the
certificate says no, or one clear error. Both are counted, so that a certificate that always says no
is seen. The oracle works in balls (python-flint), from the definitions, and shares no code with the
package; only EK-FAC's eigenvectors are taken from the solver, since repeated eigenvalues leave them
free.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import flint
import numpy as np
import torch
from torch import Tensor

import hyperinf_kernels as hk

DIGITS = 60
SHAPES = ((1, 8), (2, 16), (3, 7), (4, 32), (8, 16), (1, 64), (16, 8), (8, 96), (2, 200), (8, 1))
KINDS = (
    "gauss", "decay", "copies", "repeated", "positive", "rank one", "outlier", "columns", "sparse",
    "low rank", "zeros",
)  # fmt: skip
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("hyperinf", {}), ("hyperinf", {"inverse": "direct"}), ("hyperinf", {"inverse": "schulz"}),
    ("hyperinf", {"inverse": "dual"}), ("hyperinf", {"inverse": "cg"}),
    ("hyperinf", {"side": "rows"}), ("hyperinf", {"side": "both"}), ("datainf", {}),
    ("exact", {}), ("cg", {}), ("lissa", {}), ("kfac", {}), ("ekfac", {}), ("grad_dot", {}),
)  # fmt: skip
ENGINE = ("datainf", "exact", "cg", "lissa")


@dataclass(frozen=True)
class Setting:
    """One call; `scale` multiplies all gradients, `door` is "influence" or "GramEngine"."""

    seed: int
    kind: str
    n: int
    queries: int
    shapes: tuple[tuple[int, int], ...]
    damping: float
    scale: float
    dtype: torch.dtype
    method: str
    options: dict[str, Any] = field(hash=False)
    door: str = "influence"


def settings(count: int, seed: int) -> Iterator[Setting]:
    """`count` settings drawn from `seed`."""
    draw = np.random.default_rng(seed)
    for i in range(count):
        method, options = METHODS[draw.integers(len(METHODS))]
        shapes = tuple(SHAPES[j] for j in draw.integers(len(SHAPES), size=draw.choice([1, 1, 2])))
        n = int(np.exp(draw.uniform(0, math.log(300))).round())
        if method == "kfac":  # its oracle solves a system of all numbers of a block
            shapes = tuple((r, d) if r * d <= 128 else (4, 32) for r, d in shapes)
        engine = method in ENGINE and draw.random() < 0.25
        yield Setting(
            seed=seed * 1_000_003 + i,
            kind=str(draw.choice(KINDS)),
            n=n,
            queries=int(draw.choice([1, 2, 4, 9])),
            shapes=shapes,
            damping=0.1 if draw.random() < 0.35 else float(10 ** draw.uniform(-12, -1)),
            scale=float(10 ** draw.uniform(-30, 17.5)) if draw.random() < 0.15 else 1.0,
            dtype=(torch.float32, torch.float64, torch.bfloat16)[draw.choice(3, p=(0.8, 0.1, 0.1))],
            method=method,
            options={} if engine else dict(options),
            door="GramEngine" if engine else "influence",
        )


def gradients(s: Setting) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and query gradients by block; queries: rows, near copies, the mean, fresh ones."""
    draw = torch.Generator().manual_seed(s.seed)
    train, query = {}, {}
    for b, (r, d) in enumerate(s.shapes):
        P = _rows(s.kind, s.n, r * d, draw)
        fresh = _rows(s.kind, max(1, s.queries), r * d, draw)
        pick = torch.randint(s.n, (s.queries,), generator=draw)
        Q = torch.stack([
            (P[j], P[j] + 1e-3 * fresh[q], P.mean(0), fresh[q])[q % 4 if s.queries > 1 else b % 4]
            for q, j in enumerate(pick.tolist())
        ])  # fmt: skip
        train[f"b{b}"] = (P * s.scale).view(-1, r, d).to(s.dtype)
        query[f"b{b}"] = (Q * s.scale).view(-1, r, d).to(s.dtype)
    return train, query


def _rows(kind: str, n: int, width: int, draw: torch.Generator) -> Tensor:
    normal = lambda *size: torch.randn(*size, generator=draw, dtype=torch.float64)
    uniform = lambda *size: torch.rand(*size, generator=draw, dtype=torch.float64)
    P = normal(n, width)
    match kind:
        case "decay":
            return P * torch.logspace(0, -4, width, dtype=torch.float64)
        case "copies":
            return P[:1] + 1e-3 * P
        case "repeated":
            return P[torch.randint(max(1, min(n, 4)), (n,), generator=draw)]
        case "positive":
            return 1 + 1e-2 * P
        case "rank one":
            return normal(n, 1) * P[:1] + 1e-6 * P
        case "outlier":
            P[0] *= 1e4
            return P
        case "columns":
            return (
                P
                * torch.logspace(0, -8, width, dtype=torch.float64)[
                    torch.randperm(width, generator=draw)
                ]
            )
        case "sparse":
            return P * (uniform(n, width) < 0.05)
        case "low rank":
            return normal(n, 3) @ normal(3, width)
        case "zeros":
            return P * (uniform(n, 1) < 0.5)
    return P


# --- the oracle -----------------------------------------------------------------------------------


def truth(s: Setting, P: Tensor, Q: Tensor, basis: Any = None) -> np.ndarray[Any, Any]:
    """influence (m, n) of one block by its definition, rounded to fp64 at the very end."""
    with flint.ctx.workdps(DIGITS):
        n, r, d = P.shape
        p, q = _ball(P.reshape(n, -1)), _ball(Q.reshape(len(Q), -1))
        square = sum((x * x for x in p.entries()), flint.arb(0))
        lam = flint.arb(s.damping) * square / (n * r * d)
        if s.method == "grad_dot":
            return _floats(-1 * (q * p.transpose()))
        if s.method == "datainf":
            K, L = p * p.transpose(), q * p.transpose()
            weighted = _columns(L, [1 / (n * (lam + K[i, i])) for i in range(n)])
            return _floats((weighted * K - L) * (1 / lam))
        if s.method in ("exact", "cg", "lissa"):
            if n <= r * d:
                K = p * p.transpose()
                return _floats(_right_solve(q * p.transpose(), K, n * lam) * (-n))
            return _floats(-1 * (_right_solve(q, p.transpose() * p * _inverse(n), lam)
                                 * p.transpose()))  # fmt: skip
        if s.method == "hyperinf" and s.options.get("side") != "both":
            turned = s.options.get("side") == "rows"
            return _gfim_scores(*((t.mT if turned else t) for t in (P, Q)), lam)
        return _kronecker_scores(s, P, Q, lam, square / n, basis)


def _gfim_scores(P: Tensor, Q: Tensor, lam: Any) -> np.ndarray[Any, Any]:
    """-<V (mean g^T g + lam)^-1, g>, in the space of the rows where that is the smaller."""
    n, r, d = P.shape
    Y, V = _ball(P.reshape(n * r, d)), _ball(Q.reshape(-1, d))
    if n * r < d:
        cross = _right_solve(V * Y.transpose(), Y * Y.transpose(), n * lam) * n
    else:
        cross = _right_solve(V, Y.transpose() * Y * _inverse(n), lam) * Y.transpose()
    return _contracted(cross, len(Q), n, r)


def _kronecker_scores(
    s: Setting, P: Tensor, Q: Tensor, lam: Any, trace: Any, basis: Any
) -> np.ndarray[Any, Any]:
    n, r, d = P.shape
    Yc, Yr = _ball(P.reshape(n * r, d)), _ball(P.transpose(0, 1).reshape(r, n * d))
    C, R = Yc.transpose() * Yc * _inverse(n), Yr * Yr.transpose() * _inverse(n)
    flat = _ball(P.reshape(n, -1))
    if s.method == "hyperinf":
        root = trace.sqrt()
        left = _shifted(R * (1 / root), (lam * d / r).sqrt())
        right = _shifted(C * (1 / root), (lam * r / d).sqrt())
        W = [right.solve(left.solve(_ball(v)).transpose()).transpose().entries() for v in Q]
        return _floats(-1 * (flint.arb_mat(W) * flat.transpose()))
    if s.method == "kfac":
        size = r * d
        F = flint.arb_mat(size, size, [
            R[i // d, j // d] * C[i % d, j % d] / trace for i in range(size) for j in range(size)
        ])  # fmt: skip
        return _floats(-1 * (_right_solve(_ball(Q.reshape(len(Q), -1)), F, lam)
                             * flat.transpose()))  # fmt: skip
    left, right = _ball(basis.rows), _ball(basis.cols)
    turn = lambda g: left.transpose() * _ball(g) * right
    rotated = [turn(g).entries() for g in P]
    E = [sum((row[i] * row[i] for row in rotated), flint.arb(0)) / n for i in range(r * d)]
    W = []
    for v in Q:
        scaled = [x / (e + lam) for x, e in zip(turn(v).entries(), E, strict=True)]
        W.append((left * flint.arb_mat(r, d, scaled) * right.transpose()).entries())
    return _floats(-1 * (flint.arb_mat(W) * flat.transpose()))


def _ball(t: Tensor) -> Any:
    return flint.arb_mat(t.double().tolist())


def _inverse(n: int) -> Any:
    return 1 / flint.arb(n)


def _shifted(A: Any, lam: Any) -> Any:
    A = flint.arb_mat(A)
    for i in range(A.nrows()):
        A[i, i] = A[i, i] + lam
    return A


def _right_solve(B: Any, A: Any, lam: Any) -> Any:
    """B (A + lam I)^-1 for symmetric A."""
    return _shifted(A, lam).solve(B.transpose()).transpose()


def _columns(M: Any, scales: list[Any]) -> Any:
    return flint.arb_mat([
        [M[i, j] * scales[j] for j in range(M.ncols())] for i in range(M.nrows())
    ])  # fmt: skip


def _contracted(cross: Any, m: int, n: int, r: int) -> np.ndarray[Any, Any]:
    """-(sum over rho of cross[q rho, k rho])."""
    return np.array([
        [-float(sum((cross[q * r + i, k * r + i] for i in range(r)), flint.arb(0)).mid())
         for k in range(n)] for q in range(m)
    ])  # fmt: skip


def _floats(M: Any) -> np.ndarray[Any, Any]:
    return np.array([[float(x.mid()) for x in row] for row in M.table()])


# --- the judgement --------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened to one method's settings."""

    certified: int = 0
    refused: int = 0
    denied: int = 0
    needlessly: int = 0  # the certificate said no to scores within a hundredth of the tolerance
    worst: float = 0.0  # largest true error of what was certified
    untrue: list[str] = field(default_factory=list)


def judge(s: Setting, tally: Tally) -> None:
    """Run one setting and count what came of it."""
    train, query = gradients(s)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values, split, report, certified, bases = _run(s, train, query)
    except hk.InputError:
        tally.refused += 1
        return
    total = np.zeros((s.queries, s.n))
    claims = []
    for b, entry in enumerate(report or [None] * len(train)):
        name = f"b{b}"
        expected = truth(s, train[name], query[name], bases.get(name))
        total += expected
        if split is None or entry is None:
            continue
        error = off(split[name], expected)
        claims.append(entry.converged)
        if entry.converged and not error <= entry.tolerance:
            tally.untrue.append(f"block {name} off by {error:.1e}: {entry}\n    {s}")
        if not entry.converged and error <= entry.tolerance / 100:
            tally.needlessly += 1
    if split is not None and report and not all(claims):
        tally.denied += 1
        return
    tolerance = max((entry.tolerance for entry in report), default=1e-3)
    error = off(values, total)
    if not certified and report and s.method != "grad_dot":
        tally.denied += 1
        return
    tally.certified += 1
    tally.worst = max(tally.worst, error)
    if not error <= tolerance:
        tally.untrue.append(f"sum of blocks off by {error:.1e}\n    {s}")


def _run(
    s: Setting, train: dict[str, Tensor], query: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor] | None, list[Any], bool, dict[str, Any]]:
    damping = hk.DataInfDamping(s.damping)
    if s.door == "GramEngine":
        engine = hk.GramEngine()
        engine.update(train)
        (found,) = engine.scores(query, s.method, damping)
        certified = all(entry.converged for entry in found.report)
        return found.values, None, found.report, certified, {}
    solver = hk.solvers.make_solver(s.method, damping, **s.options)
    scores = hk.influence(train, query, solver, per_block=True)
    bases = {name: solver.basis(name) for name in train} if s.method == "ekfac" else {}  # type: ignore[attr-defined]
    return (
        scores.values, scores.per_block, scores.report,
        scores.certificate()["certified"] is not False, bases,
    )  # fmt: skip


def off(found: Tensor, expected: np.ndarray[Any, Any]) -> float:
    """The worst query's relative error; infinite where a zero query has scores."""
    gap = found.double().numpy() - expected
    scale = np.abs(expected).max(1, keepdims=True)
    scale[scale == 0] = 1.0
    error, size = (np.linalg.norm(x / scale, axis=1) for x in (gap, expected))
    ratios = np.where(size > 0, error / np.where(size > 0, size, 1), np.where(error > 0, np.inf, 0))
    return float(np.nan_to_num(ratios, nan=np.inf).max())


def run(count: int, seed: int, progress: bool = False) -> dict[str, Tally]:
    """{method: what happened} of `count` settings."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for i, s in enumerate(settings(count, seed)):
        words = ", ".join(f"{k}={v}" for k, v in s.options.items())
        judge(s, tallies[f"{s.method} {words}".strip()])
        if progress and (i + 1) % 200 == 0:
            print(f"{i + 1} of {count}", flush=True)
    return tallies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tallies = run(options.count, options.seed, progress=True)
    print(f"{'method':28} certified  said no (needlessly)  refused  worst certified error")
    for name, t in sorted(tallies.items()):
        print(f"{name:28} {t.certified:9} {t.denied:8} ({t.needlessly:10}) {t.refused:9}"
              f"  {t.worst:.1e}")  # fmt: skip
    untrue = [line for t in tallies.values() for line in t.untrue]
    print(f"{options.count} settings, {len(untrue)} untrue certificates")
    if untrue:
        print("\n".join(untrue[:20]))
        raise SystemExit(1)


if __name__ == "__main__":
    main()

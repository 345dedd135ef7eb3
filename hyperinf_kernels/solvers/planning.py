"""What each block would cost by each route, in seconds and in memory, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..ops.costs import Rates
from ..ops.schedule import chain_products
from ..ops.solve import COARSE
from .damping import Damping
from .options import at_least_one

ROUTES = ("direct", "schulz", "dual", "cg")
THIN_STEPS = 8  # refinements behind a Schulz chain that stops at a residual of 0.1
CG_TOL = 1e-7
CALL = 1e-5  # seconds of one small operation, which is what steps on small matrices consist of
CG_CALLS, SCHULZ_CALLS, THIN_CALLS = 12, 4, 6  # of them per step
GRAM_PAYS = 4  # DataInf: n^2 D for K against 4 m n D for two more products with P


@dataclass(frozen=True)
class Work:
    """Flop of one route, by the operation whose rate they run at, with its matrix size.

    `kept` counts the bytes that a solver holds of the block between its steps, `calls` the
    operations of its steps, each of which waits for the one before.
    """

    parts: tuple[tuple[str, float, float], ...]
    kept: float
    calls: float = 0.0

    @property
    def flops(self) -> float:
        return sum(flop for _, flop, _ in self.parts)

    def seconds(self, rates: Rates) -> float:
        busy = sum(rates.seconds(name, flop, size) for name, flop, size in self.parts)
        return busy + CALL * self.calls


def route_work(
    n: int,
    r: int,
    d: int,
    queries: int,
    condition: float | None,
    *,
    held_rows: bool,
    runs: bool = False,
) -> dict[str, Work]:
    """Work per route for W = V (C + lambda I)^-1 with V of queries * r rows.

    Args:
        n: samples of shape (r, d), or (d, r) seen from the other side.
        condition: of C + lambda I. None: there is no damping, which leaves only `direct`.
        held_rows: whether the n r rows behind C are kept, so that `dual` can run.
        runs: whether C is summed in fp32 runs, not in fp64.
    """
    rows, thin = n * r, 2.0 * queries * r * d**2
    curvature = ("gram" if runs else "gfim", 2.0 * rows * d**2, d)
    kept = 8.0 * d**2
    found = {
        "direct": Work((curvature, ("factor_fp64", d**3 / 3, d), ("thin_fp64", 2 * thin, d)), kept)
    }
    if condition is None:
        return found
    products, steps = chain_products(condition, COARSE), cg_steps(condition, d, CG_TOL)
    found["schulz"] = Work(
        (
            curvature,
            ("gemm_fp32", products * 2.0 * d**3, d),
            ("thin_fp64", THIN_STEPS * 2 * thin, d),
        ),
        kept,
        SCHULZ_CALLS * products + THIN_CALLS * THIN_STEPS,
    )
    found["cg"] = Work((curvature, ("thin_fp64", (steps + 1) * thin, d)), kept, CG_CALLS * steps)
    if held_rows:
        apply = 2.0 * queries * r * rows * (2 * d + rows)
        found["dual"] = Work(
            (
                ("gfim", 2.0 * rows**2 * d, rows),
                ("factor_fp64", rows**3 / 3, rows),
                ("thin_fp64", 4 * apply, rows),
            ),
            4.0 * rows * d,
        )
    return found


def both_work(n: int, r: int, d: int, queries: int) -> dict[str, Work]:
    """Work of the Kronecker product of both sides, an r x r and a d x d factor.

    Of each query the r x r one solves d columns, the d x d one r rows, and both check the result.
    """
    parts: list[tuple[str, float, float]] = []
    for size, other in ((r, d), (d, r)):
        parts += [
            ("gfim", 2.0 * n * other * size**2, size),
            ("factor_fp64", size**3 / 3, size),
            ("thin_fp64", 4.0 * queries * other * size**2, size),
        ]
    return {"direct": Work(tuple(parts), 8.0 * (r**2 + d**2))}


def cg_steps(condition: float, size: int, tol: float) -> float:
    """The Chebyshev bound of conjugate gradients, which never take more steps than the size."""
    return min(float(size), math.sqrt(condition) / 2 * math.log(2 / tol))


def flat_work(method: str, n: int, width: int, queries: int, steps: float = 0.0) -> dict[str, Work]:
    """Work of a method on flattened gradients, rows (n, width), with the scores of these rows.

    `gram` is Gram space, `primal` the width x width side, `rows` products with the rows alone;
    only the one that would run is listed. `steps`: of an iterative method, per query.
    """
    held = 4.0 * n * width
    dots = ("gemm_fp32", 2.0 * queries * n * width, float(min(n, width)))
    if method == "grad_dot":
        return {"rows": Work((dots,), held)}
    if method == "datainf" and (n >= width or n >= GRAM_PAYS * queries):
        return {"rows": Work((dots, dots, dots), held)}
    gram = n < width
    side = float(min(n, width))
    curvature = ("gram", 2.0 * n**2 * width, side) if gram else ("gfim", 2.0 * n * width**2, side)
    thin = 2.0 * queries * side**2
    solve: tuple[tuple[str, float, float], ...] = (("thin_fp64", max(1.0, steps) * thin, side),)
    if method == "exact":
        solve = (("factor_fp64", side**3 / 3, side), ("thin_fp64", 2 * thin, side))
    kept = held + (4 if gram else 8) * side**2 + (8 * side**2 if method == "exact" else 0)
    return {"gram" if gram else "primal": Work((curvature, *solve, dots), kept)}


def scored(works: Mapping[str, Work], n: int, r: int, d: int, queries: int) -> dict[str, Work]:
    """The same routes with the dot products of W and n training gradients behind them."""
    dots = ("gemm_fp32", 2.0 * queries * n * r * d, float(min(n, r * d)))
    return {route: replace(work, parts=(*work.parts, dots)) for route, work in works.items()}


def chosen(works: Mapping[str, Work], rates: Rates, wanted: str) -> str:
    """The `wanted` route where there is one, else that of least predicted seconds."""
    return wanted if wanted in works else min(works, key=lambda name: works[name].seconds(rates))


def condition_bound(damping: Damping, r: int, d: int, size: int) -> float:
    """1 + trace / lambda from the rule alone: lambda is at least each of its relative parts.

    An absolute damping says nothing before the gradients are seen; then 1e4 is assumed, which may
    be too much or too little.
    """
    share = damping.data_inf / (r * d) + damping.trace / size
    return 1 + 1 / share if share else 1e4


@dataclass(frozen=True)
class BlockPlan:
    """The route of one block, with what it and the others are predicted to take."""

    block: str
    shape: tuple[int, int]
    route: str
    seconds: float
    flops: float
    kept: float
    candidates: Mapping[str, float]


@dataclass(frozen=True)
class SolvePlan:
    """Every block's route; `str(plan)` is a table. Seconds and bytes are predictions."""

    n: int
    queries: int
    source: str
    blocks: tuple[BlockPlan, ...]

    @property
    def seconds(self) -> float:
        return sum(block.seconds for block in self.blocks)

    @property
    def flops(self) -> float:
        return sum(block.flops for block in self.blocks)

    @property
    def kept(self) -> float:
        """Bytes held between the steps."""
        return sum(block.kept for block in self.blocks)

    def groups(self) -> list[list[BlockPlan]]:
        """Blocks of equal shape and route."""
        found: dict[tuple[tuple[int, int], str], list[BlockPlan]] = {}
        for block in self.blocks:
            found.setdefault((block.shape, block.route), []).append(block)
        return list(found.values())

    def __str__(self) -> str:
        lines = [
            f"{self.n} training samples, {self.queries} queries; rates {self.source}",
            f"{'blocks':>6} {'shape':>14} {'route':>7} {'seconds':>9} {'Gflop':>9} {'MiB':>9}"
            "  all routes",
        ]
        for members in self.groups():
            first, count = members[0], len(members)
            others = ", ".join(f"{k} {v:.2g} s" for k, v in first.candidates.items())
            size = f"{first.shape[0]} x {first.shape[1]}"
            lines.append(
                f"{count:6} {size:>14} {first.route:>7} {count * first.seconds:9.3g} "
                f"{count * first.flops / 1e9:9.4g} {count * first.kept / 2**20:9.4g}  {others} each"
            )
        total = f"{self.seconds:9.3g} {self.flops / 1e9:9.4g} {self.kept / 2**20:9.4g}"
        lines.append(f"{'in all':>29} {total}")
        return "\n".join(lines)


def plan(
    shapes: Mapping[str, tuple[int, int]], n: int, queries: int, rates: Rates,
    works_of: Callable[[int, int], Mapping[str, Work]], route: str = "auto",
) -> SolvePlan:  # fmt: skip
    """The given route of every block, or its cheapest, from the works of a shape (r, d).

    Raises:
        InputError: a size, n or queries that is not a whole number from 1.
    """
    at_least_one(n=n, queries=queries)
    blocks = []
    for name, (r, d) in shapes.items():
        at_least_one(**{f"block {name}: r": r, f"block {name}: d": d})
        works = works_of(r, d)
        seconds = {route: work.seconds(rates) for route, work in works.items()}
        taken = chosen(works, rates, route)
        work = works[taken]
        blocks.append(
            BlockPlan(name, (r, d), taken, seconds[taken], work.flops, work.kept, seconds)
        )
    return SolvePlan(n, queries, rates.source, tuple(blocks))

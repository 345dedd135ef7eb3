"""What solving each block would cost by each route, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..ops.costs import Rates
from ..ops.schedule import chain_products
from ..ops.solve import COARSE
from .damping import Damping

ROUTES = ("direct", "schulz", "dual", "cg")
THIN_STEPS = 8  # refinements behind a Schulz chain that stops at a residual of 0.1
CG_TOL = 1e-7


@dataclass(frozen=True)
class Work:
    """Flop of one route, by the operation whose rate they run at, with its matrix size."""

    parts: tuple[tuple[str, float, float], ...]

    @property
    def flops(self) -> float:
        return sum(flop for _, flop, _ in self.parts)

    def seconds(self, rates: Rates) -> float:
        return sum(rates.seconds(name, flop, size) for name, flop, size in self.parts)


def route_work(
    n: int, r: int, d: int, queries: int, condition: float, *, held_rows: bool = True
) -> dict[str, Work]:
    """Work per route for W = V (C + lambda I)^-1 with V of queries * r rows.

    n samples of shape (r, d), or (d, r) seen from the other side. `dual` is listed where the n r
    rows behind C are fewer than d and still `held_rows`.
    """
    rows, thin = n * r, 2.0 * queries * r * d**2
    curvature = ("gfim", 2.0 * rows * d**2, d)
    chain = chain_products(condition, COARSE) * 2.0 * d**3
    # the Chebyshev bound of conjugate gradients, which never take more than d steps
    steps = min(float(d), math.sqrt(condition) / 2 * math.log(2 / CG_TOL))
    found = {
        "direct": Work((curvature, ("factor_fp64", d**3 / 3, d), ("thin_fp64", 2 * thin, d))),
        "schulz": Work(
            (curvature, ("gemm_fp32", chain, d), ("thin_fp64", THIN_STEPS * 2 * thin, d))
        ),
        "cg": Work((curvature, ("thin_fp64", (steps + 1) * thin, d))),
    }
    if held_rows and rows < d:
        apply = 2.0 * queries * r * rows * (2 * d + rows)
        found["dual"] = Work(
            (
                ("gfim", 2.0 * rows**2 * d, rows),
                ("factor_fp64", rows**3 / 3, rows),
                ("thin_fp64", 4 * apply, rows),
            )
        )
    return found


def cheapest(works: Mapping[str, Work], rates: Rates) -> str:
    """The route of least predicted seconds."""
    return min(works, key=lambda route: works[route].seconds(rates))


def condition_bound(damping: Damping, r: int, d: int, size: int) -> float:
    """1 + trace / lambda from the rule alone: lambda is at least each of its relative parts.

    An absolute damping says nothing before the gradients are seen; then 1e4 is assumed.
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
    candidates: Mapping[str, float]


@dataclass(frozen=True)
class SolvePlan:
    """Every block's route; `str(plan)` is a table."""

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

    def __str__(self) -> str:
        lines = [
            f"{self.n} training samples, {self.queries} queries; rates {self.source}",
            f"{'blocks':>6} {'shape':>14} {'route':>7} {'seconds':>9} {'Gflop':>9}  all routes",
        ]
        groups: dict[tuple[tuple[int, int], str], list[BlockPlan]] = {}
        for block in self.blocks:
            groups.setdefault((block.shape, block.route), []).append(block)
        for (shape, route), members in groups.items():
            others = ", ".join(f"{k} {v:.2g} s" for k, v in members[0].candidates.items())
            total = sum(block.seconds for block in members)
            flops = sum(block.flops for block in members) / 1e9
            size = f"{shape[0]} x {shape[1]}"
            lines.append(
                f"{len(members):6} {size:>14} {route:>7} {total:9.3g} {flops:9.4g}  {others} each"
            )
        lines.append(f"{'in all':>29} {self.seconds:9.3g} {self.flops / 1e9:9.4g}")
        return "\n".join(lines)


def plan(
    shapes: Mapping[str, tuple[int, int]], n: int, queries: int, rates: Rates, damping: Damping,
    *, side: str = "cols", inverse: str = "auto",
) -> SolvePlan:  # fmt: skip
    """Every block's route as `HyperINF` with these options would choose it.

    The condition of each block is bounded by the damping rule alone, so that the choice made once
    the gradients are known can only be a cheaper one.
    """
    blocks = []
    for name, (r, d) in shapes.items():
        thin, size = (d, r) if side == "rows" else (r, d)
        condition = condition_bound(damping, r, d, size)
        rows = side == "cols" and inverse in ("auto", "dual")
        works = route_work(n, thin, size, queries, condition, held_rows=rows)
        seconds = {route: work.seconds(rates) for route, work in works.items()}
        route = inverse if inverse in works else cheapest(works, rates)
        route = "direct" if side == "both" else route
        blocks.append(BlockPlan(name, (r, d), route, seconds[route], works[route].flops, seconds))
    return SolvePlan(n, queries, rates.source, tuple(blocks))

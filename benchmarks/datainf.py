"""DataInf for many queries at the size of a large language model, beside the published loop.

100 queries, 900 training rows, 80 LoRA blocks of 8 x 5,120, the geometry of the sentence and math
tasks on Llama-2-13B. Blocks are made from a seed one after the other, which is not timed. Ours is
update, fit and scores with their certificate. The published loop runs on a few queries and blocks;
its row says how many, and its time is theirs scaled up, because each pair costs the same.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hyperinf_kernels as hk

from . import published
from .registry import Measurement, benchmark

LOOP_PAIRS = 9  # pairs of query and block that the published loop is timed on
ALL_BLOCKS = 80
GRID_BLOCKS = 3


@benchmark("datainf")
def datainf(quick: bool) -> Iterator[Measurement]:
    """DataInf and exact from one Gram matrix per block, and the published loop."""
    queries, rows, shape = (20, 200, (8, 1024)) if quick else (100, 900, (8, 5120))
    blocks = 3 if quick else 9
    ours: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "gradient dot, as rows and dot products": _grad_dot,
        "DataInf": lambda P, Q: hk.influence({"b": P}, {"b": Q}, "datainf").values,
        "exact": lambda P, Q: hk.influence({"b": P}, {"b": Q}, "exact").values,
        "DataInf and exact together": _together,
        "DataInf and exact at 20 dampings": _grid,
    }
    times: dict[str, list[float]] = {name: [] for name in ours}
    loop: list[float] = []
    errors: dict[str, float] = {}
    for block in range(blocks):
        P, Q = _block(block, queries, rows, shape)
        for name, call in ours.items():
            if call is _grid and block > GRID_BLOCKS:
                continue
            start = time.perf_counter()
            values = call(P, Q)
            times[name].append(time.perf_counter() - start)
            if block == 0 and name in ("DataInf", "exact"):
                errors[name] = _error(values, P, Q, name)
        if len(loop) < LOOP_PAIRS:
            start = time.perf_counter()
            _published(P, Q[block % queries])
            loop.append(time.perf_counter() - start)
    work = ALL_BLOCKS * queries
    reference = statistics.median(loop) * work
    case = f"{queries} queries x {rows} rows x {ALL_BLOCKS} blocks of {shape[0]} x {shape[1]}"
    low, high = min(loop) * work, max(loop) * work
    yield Measurement(
        case, "published loop", reference, low, high, len(loop), 1.0,
        note=f"{len(loop)} of {work} pairs of query and block timed, scaled",
    )  # fmt: skip
    for name, values in times.items():
        # the first block also loads code
        rest = sorted(values[1:])
        middle, scale = statistics.median(rest), ALL_BLOCKS
        yield Measurement(
            case, name, middle * scale, rest[0] * scale, rest[-1] * scale, len(rest),
            reference / (middle * scale), errors.get(name),
            note=f"{len(rest)} of {ALL_BLOCKS} blocks timed, scaled",
        )  # fmt: skip


def _block(seed: int, queries: int, rows: int, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows with a common direction, as gradients of one task have."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    P = torch.randn(rows, *shape, generator=generator)
    P.add_(common, alpha=0.3)
    return P, torch.randn(queries, *shape, generator=generator) + 0.3 * common


def _published(P: Tensor, query: Tensor) -> Tensor:
    train = [{"b": g} for g in P]
    return published.scores(train, published.datainf_products(train, {"b": query}))


def _grad_dot(P: Tensor, Q: Tensor) -> Tensor:
    return hk.influence({"b": P}, {"b": Q}, "grad_dot").values


def _together(P: Tensor, Q: Tensor) -> Tensor:
    return _engine(P, Q, [hk.DataInfDamping(0.1)])


def _grid(P: Tensor, Q: Tensor) -> Tensor:
    return _engine(P, Q, [hk.DataInfDamping(10.0**x) for x in torch.linspace(-3, 1, 20).tolist()])


def _engine(P: Tensor, Q: Tensor, dampings: list[hk.Damping]) -> Tensor:
    engine = hk.GramEngine()
    engine.update({"b": P}, copy=False)
    return engine.scores({"b": Q}, ("datainf", "exact"), dampings)[0].values


def _error(values: Tensor, P: Tensor, Q: Tensor, method: str) -> float:
    """Against the dense formula in fp64."""
    n = len(P)
    p, q = P.flatten(1).double(), Q.flatten(1).double()
    lam = 0.1 * float(p.square().mean())
    K, L = p @ p.mT, q @ p.mT
    if method == "exact":
        want = -n * torch.linalg.solve(K + n * lam * torch.eye(n, dtype=K.dtype), L, left=False)
    else:
        want = (L / (n * (lam + K.diagonal())) @ K - L) / lam
    return float((values.double() - want).norm() / want.norm())

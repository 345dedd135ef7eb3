"""IFEngine and IFEngineGeneration against the released loops, restated in `published`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from hyperinf_kernels.integrations.datainf import IFEngineGeneration
from hyperinf_kernels.integrations.hyperinf import IFEngine

from .. import published
from ..registry import Measurement, measurements

Rows = list[dict[str, torch.Tensor]]


def measure(quick: bool) -> Iterator[Measurement]:
    """The mislabelled-data notebook's size, then 100 queries x 900 rows."""
    n, r, d, blocks = (60, 4, 64, 2) if quick else (1000, 16, 1024, 4)
    train, query = _rows(n, r, d, blocks), _rows(10, r, d, blocks)
    case = f"IFEngine, n={n}, r={r}, d={d}, {blocks} blocks"
    mean = published.mean_sample(query)
    for method, key, products, repeats in (
        ("DataInf", "datainf", published.datainf_products, 7),
        ("HyperINF, influence.py", "iterative", published.hyperinf_products_numpy, 3),
        ("HyperINF, influence_optimized.py", "iterative", published.hyperinf_products, 3),
    ):
        stock = _interleaved(
            repeats,
            {
                "stock": lambda p=products: _stock(train, mean, p),
                "drop-in": lambda k=key: _engine(train, query, k),
            },
        )
        for stage in ("H^-1 v", "H^-1 v and scores", "all, with the stacking"):
            times = {name: [run[0][stage] for run in runs] for name, runs in stock.items()}
            gap = _error(stock["drop-in"][0][1], stock["stock"][0][1])
            yield from measurements(f"{case}: {method}, {stage}", times, "stock",
                                    {"drop-in": gap})  # fmt: skip
    n, m, r, d, blocks = (30, 4, 2, 16, 2) if quick else (900, 100, 8, 576, 2)
    train, query = _rows(n, r, d, blocks), _rows(m, r, d, blocks)
    case = f"IFEngineGeneration, {m} x {n}, r={r}, d={d}, {blocks} blocks: DataInf"
    runs = _interleaved(
        1, {"stock": lambda: _stock_generation(train, query),
            "drop-in": lambda: _generation(train, query)},
    )  # fmt: skip
    # the loops take minutes, so they run once; ours is repeated beside them
    runs["drop-in"] += [_generation(train, query) for _ in range(4)]
    gap = _error(runs["drop-in"][0][1], runs["stock"][0][1])
    times = {name: [seconds for seconds, _ in found] for name, found in runs.items()}
    yield from measurements(f"{case}, all", times, "stock", {"drop-in": gap})


def _rows(n: int, r: int, d: int, blocks: int) -> Rows:
    # columns of unequal size, as gradients have, so that the GFIM is not nearly the identity
    scale = torch.logspace(0, -2, d)
    return [{f"w{b}": 0.1 * torch.randn(r, d) * scale for b in range(blocks)} for _ in range(n)]


def _interleaved(repeats: int, calls: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(call())
    return found


def _stock(train: Rows, mean: Any, products: Callable[..., Any]) -> tuple[dict[str, float], Any]:
    start = time.perf_counter()
    hvp = products(train, mean)
    middle = time.perf_counter()
    scores = published.scores(train, hvp)
    end = time.perf_counter()
    return {
        "H^-1 v": middle - start, "H^-1 v and scores": end - start,
        "all, with the stacking": end - start,
    }, scores  # fmt: skip


def _engine(train: Rows, query: Rows, key: str) -> tuple[dict[str, float], Any]:
    start = time.perf_counter()
    engine = IFEngine()
    engine.preprocess_gradients(dict(enumerate(train)), dict(enumerate(query)))
    stacked = time.perf_counter()
    getattr(engine, f"compute_hvp_{key}")()
    middle = time.perf_counter()
    engine.compute_IF()
    end = time.perf_counter()
    return {
        "H^-1 v": middle - stacked, "H^-1 v and scores": end - stacked,
        "all, with the stacking": end - start,
    }, engine.IF_dict[key]  # fmt: skip


def _stock_generation(train: Rows, query: Rows) -> tuple[float, Any]:
    start = time.perf_counter()
    scores = [published.scores(train, published.datainf_products(train, q)) for q in query]
    return time.perf_counter() - start, torch.stack(scores)


def _generation(train: Rows, query: Rows) -> tuple[float, Any]:
    start = time.perf_counter()
    engine = IFEngineGeneration()
    engine.preprocess_gradients(dict(enumerate(train)), dict(enumerate(query)))
    engine.compute_hvp_proposed()
    engine.compute_IF()
    return time.perf_counter() - start, engine.IF_dict["proposed"].to_numpy()


def _error(ours: Any, stock: Any) -> float:
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(stock, dtype=np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())

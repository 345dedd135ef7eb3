"""The whole job side by side with the published procedure, on the same model and rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.runs.scoring import Data, gradients
from hyperinf_kernels.solvers import make_solver

from . import published, setting
from .registry import Measurement, benchmark, measurements

Grads = dict[str, Tensor]


@benchmark("job")
def job(quick: bool) -> Iterator[Measurement]:
    """Gradients, curvature, scoring and total, ours against the published procedure."""
    loaded = setting.lora_model()
    model = loaded.model
    name, train_rows, query_rows = setting.sentence_rows(40 if quick else 300, 4 if quick else 20)
    train, query = (setting.batches(rows, loaded, 16) for rows in (train_rows, query_rows))
    loss = hk.CausalLM("answer")
    case = f"{name}, {len(train_rows)} x {len(query_rows)}"

    start = time.perf_counter()
    loop_train = published.gradients(model, setting.singles(train), loss)
    loop_query = published.gradients(model, setting.singles(query), loss)
    loop_seconds = time.perf_counter() - start
    start = time.perf_counter()
    data = Data(model, train, query, loss)
    (train_ids, ours_train), (query_ids, ours_query) = gradients(data)
    ours_seconds = time.perf_counter() - start
    ours_train = _ordered(ours_train, train_ids, data.train_ids)
    ours_query = _ordered(ours_query, query_ids, data.query_ids)
    worst = max(_error(ours_train[b], torch.stack([s[b] for s in loop_train])) for b in ours_train)
    yield from _pair(f"{case}: gradients", loop_seconds, ours_seconds, worst)

    mean = published.mean_sample(loop_query)
    mean_query = {b: g.mean(0, keepdim=True) for b, g in ours_query.items()}
    paper = hk.HyperINF(mode="paper")
    stages: list[tuple[str, list[Any], Grads, Any, Callable[..., Any]]] = [
        ("DataInf", loop_query, ours_query, make_solver("datainf"), published.datainf_products),
        ("HyperINF as released", [mean], mean_query, paper, published.hyperinf_products),
        ("HyperINF converged", [mean], mean_query, hk.HyperINF(), published.hyperinf_products),
    ]
    for label, queries, stacked, solver, products in stages:
        start = time.perf_counter()
        solved = [products(loop_train, q) for q in queries]
        middle = time.perf_counter()
        loop_scores = torch.stack([published.scores(loop_train, p) for p in solved])
        loop = (middle - start, time.perf_counter() - middle)
        start = time.perf_counter()
        solver.update(ours_train, copy=False)
        applied = solver.fit().apply(stacked)
        middle = time.perf_counter()
        our_scores = -sum(applied[b].flatten(1) @ g.flatten(1).T for b, g in ours_train.items())
        ours = (middle - start, time.perf_counter() - middle)
        truth = _truth(label, ours_train, stacked)
        errors = (_error(loop_scores, truth), _error(our_scores, truth))
        yield from _pair(f"{case}: {label}, curvature and solve", loop[0], ours[0])
        yield from _pair(f"{case}: {label}, scoring", loop[1], ours[1], *errors[::-1])
        total = (loop_seconds + sum(loop), ours_seconds + sum(ours))
        yield from _pair(f"{case}: {label}, total", *total)


def _pair(
    case: str, loop: float, ours: float, our_error: float | None = None,
    loop_error: float | None = None,
) -> Iterator[Measurement]:  # fmt: skip
    times = {"published procedure": [loop], "hyperinf_kernels": [ours]}
    errors = {
        k: v for k, v in (("published procedure", loop_error), ("hyperinf_kernels", our_error))
        if v is not None
    }  # fmt: skip
    return measurements(case, times, "published procedure", errors)


def _ordered(grads: Any, ids: list[str], wanted: list[str]) -> Grads:
    place = {identity: i for i, identity in enumerate(ids)}
    order = [place[identity] for identity in wanted]
    return {name: grad[order] for name, grad in grads.items()}


def _truth(label: str, train: Grads, query: Grads) -> Tensor:
    """The method's scores in fp64, from its definition."""
    total: Any = 0
    for name, grad in train.items():
        G, V = grad.double(), query[name].double()
        P, Q = G.flatten(1), V.flatten(1)
        lam = 0.1 * float(P.square().mean())
        if label == "DataInf":
            K, L = P @ P.T, Q @ P.T
            W = (Q - (L / (lam + K.diagonal())) @ P / len(P)) / lam
        else:
            stack = G.flatten(0, 1)
            A = stack.T @ stack / len(G)
            A.diagonal().add_(lam + (1e-3 if label == "HyperINF as released" else 0))
            W = torch.linalg.solve(A, V, left=False).flatten(1)
        total = total - W @ P.T
    assert isinstance(total, Tensor)
    return total


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())

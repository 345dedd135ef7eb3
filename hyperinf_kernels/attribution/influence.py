"""Tensors in, scores out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.ambient import unaffected
from ..solvers import Damping, FlatSolver, Gradients, Solver, make_solver
from ..solvers.inputs import check_shapes
from ..solvers.scorer import row_scores
from .scores import DensePanel, Id, InfluenceScores, TopKPanel


@unaffected
def influence(
    train_grads: Gradients,
    query_grads: Gradients,
    method: str | Solver = "hyperinf",
    damping: Damping | float | None = None,
    *,
    train_ids: Sequence[Id] | None = None,
    query_ids: Sequence[Id] | None = None,
    top_k: int | None = None,
    per_block: bool = False,
    **method_options: Any,
) -> InfluenceScores:
    """Influence of every training gradient on every query: -<V_q A^-1, g_k>, summed over blocks.

    Args:
        train_grads: {block: (n, r, d)} per-sample training gradients.
        query_grads: {block: (m, r, d)}, the same blocks and shapes.
        method: "hyperinf", "datainf", "lissa", "cg", "exact", "kfac", "ekfac", "grad_dot", or a
            solver object, which is reset first.
        damping: a `Damping` or a number; None means `DataInfDamping(0.1)`.
        train_ids, query_ids: names of the rows; None: 0, 1, 2, ...
        top_k: keep only each query's k most helpful and k most harmful examples.
        per_block: keep the split of every score over the blocks.
        **method_options: of the solver, such as `mode="paper"` for "hyperinf".

    Returns:
        `InfluenceScores` with values (m, n). Negative helps.

    Raises:
        InputError: shapes, names or values that do not fit; a singular block.
        ValueError: unknown method or option.
    """
    if per_block and top_k is not None:
        raise ValueError("per_block needs the dense matrix; leave top_k out")
    check_shapes(query_grads, {}, "query")
    solver = make_solver(method, damping, **method_options)
    solver.reset()
    start = time.perf_counter()
    solver.foresee(query_grads)
    solver.update(train_grads, copy=False)
    if solver.second_pass:
        solver.revisit(train_grads)
    solver.fit()
    fitted = time.perf_counter()
    queries = len(next(iter(query_grads.values())))
    ids = _ids(train_ids, solver.n, "train")
    panel = DensePanel(queries) if top_k is None else TopKPanel(queries, top_k)
    rows = {name: [grads] for name, grads in train_grads.items()}
    split = fitted_scores(solver, query_grads, rows, per_block)
    solver.foresee(None)
    panel.add(ids, sum_blocks(split))
    return InfluenceScores(
        **panel.finish(),
        query_ids=_ids(query_ids, queries, "query"),
        report=solver.report(),
        per_block=split if per_block else None,
        meta={
            "method": solver.method,
            "damping": str(solver.damping),
            "seconds": {"fit": fitted - start, "score": time.perf_counter() - fitted},
        },
    )


def fitted_scores(
    solver: Solver, queries: Gradients, rows: Mapping[str, Sequence[Tensor]], per_block: bool
) -> dict[str, Tensor]:
    """Certified scores (m, n) of the fitted rows, by block or as their sum under one name.

    Args:
        rows: {block: batches (B, r, d)} of all fitted rows, for a solver that does not keep them.
    """
    parts: Iterator[tuple[str, Tensor]]
    if isinstance(solver, FlatSolver):
        parts = solver.scores_by_block(queries)
    else:
        parts = row_scores(solver, queries, rows)
    if per_block:
        return dict(parts)
    total: Tensor | None = None
    for _, S in parts:
        total = S if total is None else total + S
    assert total is not None
    return {"all blocks": total}


def sum_blocks(split: Mapping[str, Tensor]) -> Tensor:
    """The blocks' scores added up in fp32 (fp64 if any block is fp64), in block order.

    Raises:
        InputError: NaN or inf, naming the first such block.
    """
    parts = iter(split.values())
    total = next(parts).clone()
    for part in parts:
        total = total + part
    if not bool(torch.isfinite(total).all()):
        bad = [name for name, part in split.items() if not bool(torch.isfinite(part).all())]
        where = f"block {bad[0]}: its scores hold" if bad else "the sum of the blocks' scores holds"
        raise InputError(f"{where} NaN or inf; rescale the loss")
    return total


def _ids(given: Sequence[Id] | None, count: int, role: str) -> list[Id]:
    if given is None:
        return list(range(count))
    if len(given) != count:
        raise ValueError(f"{role}_ids has {len(given)} entries for {count} rows")
    return list(given)

"""The whole job on sentences of our own, some with a wrong answer."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..experiments import sentences
from ..experiments.identification import check_groups, corrupted_rows
from ..experiments.mislabeled import baselines, training_losses
from ..workloads.prompted import Prompted
from .identify import identified
from .preparation import check, prepare
from .request import Request
from .results import finish
from .score import TITLE, all_methods, shown


def run(r: Request) -> dict[str, Any]:
    check(r)
    for option, count in (("--rows", r.rows), ("--queries", r.queries)):
        if count < 1:
            raise InputError(f"{option} must be at least 1, got {count}")
    train, query = sentences.generate(r.rows, r.queries, corrupt=r.corrupt, seed=r.seed)
    check_groups(train, query)
    prepared = prepare(r, Prompted(), train, query)
    results = all_methods(r, prepared)
    measured = identified(prepared, results)
    context: dict[str, Any] = {}
    corrupted = np.array([bool(row.corrupted) for row in train])
    if 0 < corrupted.sum() < len(train):
        for label, scores in results.items():
            metrics, curves = measured[label]
            harm = scores.values.double().mean(0).numpy()
            metrics["corrupted"], curve = corrupted_rows(harm, corrupted)
            curves.append(curve)
        observed = [prepared.workload.observed(row) for row in train]
        context["baselines"] = baselines(train, observed, training_losses(prepared.data))
    queries = shown(prepared, results)
    return finish(r, prepared, "demo", TITLE, results, measured, queries=queries, **context)

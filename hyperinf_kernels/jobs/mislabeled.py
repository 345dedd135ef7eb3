"""Training rows ranked by the harm they do to the queries on average."""

from __future__ import annotations

from typing import Any

from ..experiments.mislabeled import (
    baselines,
    flip_labels,
    harm_scores,
    summary,
    suspects,
    training_losses,
)
from .preparation import clock, methods_of, prepare, read
from .request import Request
from .results import Measured, finish

TITLE = "Training examples whose label looks wrong"


def run(r: Request) -> dict[str, Any]:
    workload, train, query = read(r)
    if r.flip:
        train = flip_labels(train, r.flip, r.seed)
    known = {bool(row.corrupted) for row in train if row.corrupted is not None}
    prepared = prepare(r, workload, train, query)
    with clock(prepared.seconds, "methods"):
        scored = harm_scores(prepared.data, methods_of(r), r.progress)
    prepared.seconds.update(prepared.data.seconds)
    measured: dict[str, Measured] = {}
    context: dict[str, Any] = {}
    if known == {True, False}:
        for label, (metrics, curve) in summary(train, scored).items():
            measured[label] = ({"corrupted": metrics}, [curve])
        observed = [workload.observed(row) for row in train]
        context["baselines"] = baselines(train, observed, training_losses(prepared.data))
    first = next(iter(scored.values()))
    context["suspects"] = suspects(train, workload.show, first.values[0].double().numpy())
    return finish(r, prepared, "mislabeled", TITLE, scored, measured, **context)

"""Influence of every training row on itself: what the model had to memorise."""

from __future__ import annotations

from typing import Any

from ..attribution import Attributor, InfluenceScores
from ..experiments.mislabeled import suspects
from .preparation import methods_of, prepare, read
from .request import Request
from .results import finish

TITLE = "Training examples the model had to memorise"


def run(r: Request) -> dict[str, Any]:
    r.single("tokens")
    workload, train, _ = read(r, queries=False)
    prepared = prepare(r, workload, train)
    data, results = prepared.data, {}
    for method in methods_of(r):
        attributor = Attributor(
            data.model, loss=data.loss, blocks=r.blocks, method=method.solver(), progress=r.progress
        ).fit(data.train)
        values = attributor.self_influence(data.train)
        prepared.seconds.update(attributor.seconds)
        scores = InfluenceScores(
            values[None], attributor.train_ids, ["itself"], attributor.report(),
            meta={"method": method.name, "damping": str(method.damping)},
        )  # fmt: skip
        results[method.label] = scores.aligned(data.train_ids, ["itself"])
    # the report ranks from large to small, and self-influence is never positive
    strength = -next(iter(results.values())).values[0].double().numpy()
    found = suspects(train, workload.show, strength)
    return finish(r, prepared, "self-influence", TITLE, results, suspects=found)

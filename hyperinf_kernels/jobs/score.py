"""Influence of every training row on every query."""

from __future__ import annotations

from typing import Any

from ..attribution import Attributor, InfluenceScores
from ..report.document import query_entries
from ..runs.methods import LABELS
from ..runs.scoring import score_methods, with_loss
from .preparation import Prepared, methods_of, prepare, read
from .request import Request
from .results import finish

TITLE = "Which training examples shaped these answers"


def run(r: Request) -> dict[str, Any]:
    prepared = prepare(r, *read(r))
    results = all_methods(r, prepared) if r.fitted is None else _by_fitted(r, prepared)
    return finish(r, prepared, "score", TITLE, results, queries=shown(prepared, results))


def shown(p: Prepared, results: dict[str, InfluenceScores]) -> list[dict[str, Any]]:
    """Every query with the rows that helped and harmed it most."""
    return query_entries(results, p.train, p.query, p.workload.show)


def all_methods(r: Request, p: Prepared) -> dict[str, InfluenceScores]:
    """Every method under every choice of tokens."""
    results: dict[str, InfluenceScores] = {}
    losses = p.workload.losses(r.tokens, r.reduction)
    for tokens, loss in losses.items():
        note = f"{tokens} tokens" if len(losses) > 1 else ""
        data = with_loss(p.data, loss)
        results |= score_methods(
            data, methods_of(r, note), top_k=r.top_k, per_block=r.per_block, progress=r.progress
        )
        for stage, value in data.seconds.items():
            p.seconds[stage] = p.seconds.get(stage, 0.0) + value
    return results


def _by_fitted(r: Request, p: Prepared) -> dict[str, InfluenceScores]:
    """The rows scored by a saved curvature, whose method and damping stand."""
    r.single("tokens")
    data = p.data
    attributor = Attributor.load(r.fitted or "", data.model, loss=data.loss, progress=r.progress)
    scores = attributor.score(data.query, data.train, top_k=r.top_k, per_block=r.per_block)
    p.seconds.update(attributor.seconds)
    return {LABELS[attributor.solver.method]: scores.aligned(data.train_ids, data.query_ids)}

"""Does influence find the training rows of each query's class?"""

from __future__ import annotations

from typing import Any

from ..attribution import InfluenceScores
from ..experiments.identification import check_groups, same_class
from .preparation import Prepared, prepare, read
from .request import Request
from .results import Measured, finish
from .score import all_methods, shown

TITLE = "Do queries find the training examples of their own class?"


def run(r: Request) -> dict[str, Any]:
    workload, train, query = read(r)
    check_groups(train, query)
    prepared = prepare(r, workload, train, query)
    results = all_methods(r, prepared)
    measured = identified(prepared, results)
    queries = shown(prepared, results)
    return finish(r, prepared, "identify", TITLE, results, measured, queries=queries)


def identified(p: Prepared, results: dict[str, InfluenceScores]) -> dict[str, Measured]:
    """Metrics and curve of every method."""
    found = {}
    for label, scores in results.items():
        metrics, curve = same_class(scores, p.train, p.query)
        found[label] = ({"same class": metrics}, [curve])
    return found

"""The training rows that help the queries most, as a smaller training set."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..experiments.mislabeled import harm_scores
from ..experiments.selection import most_helpful
from ..report.document import query_entries
from ..workloads.rows import Row
from .preparation import clock, methods_of, prepare, read
from .request import Request
from .results import finish, named

TITLE = "Training examples that help these queries most"


def run(r: Request) -> dict[str, Any]:
    if not 0 < r.share <= 1:
        raise InputError(f"--share must be over 0 and at most 1, got {r.share:g}")
    r.single("tokens")
    workload, train, query = read(r)
    prepared = prepare(r, workload, train, query)
    with clock(prepared.seconds, "methods"):
        scored = harm_scores(prepared.data, methods_of(r), r.progress)
    prepared.seconds.update(prepared.data.seconds)
    chosen = {label: most_helpful(scores, train, r.share) for label, scores in scored.items()}
    files = {
        named("selected", number, label, ".jsonl"): rows
        for number, (label, rows) in enumerate(chosen.items())
    }
    mean = Row("mean query", {})

    def show(row: Row) -> dict[str, str | None]:
        if row is not mean:
            return workload.show(row)
        text = f"the mean gradient of {len(query)} queries"
        return {"prompt": text, "answer": None, "class": None}

    return finish(
        r, prepared, "select", TITLE, scored, rows=files,
        queries=query_entries(scored, train, [mean], show),
        selected=[
            {"method": label, "rows": len(rows), "share": r.share, "ids": [row.id for row in rows]}
            for label, rows in chosen.items()
        ],
    )  # fmt: skip

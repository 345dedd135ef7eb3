"""What each method would do with every block; rows and model are read, nothing is computed."""

from __future__ import annotations

from typing import Any

from ..gradients import find_blocks
from ..report.document import plan_document
from ..runs.scoring import size_of
from .preparation import methods_of, prepare, read
from .request import Request


def run(r: Request) -> dict[str, Any]:
    workload, train, query = read(r)
    data = prepare(r, workload, train, query).data
    shapes = {block.name: block.shape for block in find_blocks(data.model, r.blocks)}
    plans = {
        method.label: method.solver().plan(shapes, len(train), len(query), r.device)
        for method in methods_of(r)
    }
    model = {"name": r.model, "adapter": r.adapter, **size_of(data)}
    return plan_document(plans, model, len(train), len(query))

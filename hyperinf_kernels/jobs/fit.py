"""The curvature of training rows, saved for `score --fitted`."""

from __future__ import annotations

from typing import Any

from ..attribution import Attributor
from ..attribution.saved import check_new
from ..runs.scoring import size_of
from .preparation import methods_of, prepare, read
from .request import Request


def run(r: Request) -> dict[str, Any]:
    check_new(r.output)
    r.single("method", "damping", "tokens")
    workload, train, _ = read(r, queries=False)
    prepared = prepare(r, workload, train)
    (method,) = methods_of(r)
    data = prepared.data
    attributor = Attributor(
        data.model, loss=data.loss, blocks=r.blocks, method=method.solver(), progress=r.progress
    ).fit(data.train)
    attributor.save(r.output)
    return {
        "format": 1,
        "command": "fit",
        "method": method.label,
        "loss": str(data.loss),
        "model": {"name": r.model, "adapter": r.adapter, **size_of(data)},
        "train": {"source": ", ".join(r.train), "rows": len(train)},
        "seconds": prepared.seconds | attributor.seconds,
        "output": str(r.output),
    }

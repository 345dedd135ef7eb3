"""Rows as the model sees them: their tokens, and which of them carry loss; needs no weights."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..workloads import models
from .preparation import read_kind
from .request import Request


def run(r: Request) -> dict[str, Any]:
    r.check_numbers()
    r.single("tokens")
    workload, rows = read_kind(r, r.train)
    missing = sorted(set(r.row) - {row.id for row in rows})
    if missing:
        raise InputError(f"--row {missing[0]}: {', '.join(r.train)} has no row of this id")
    (loss,) = workload.losses(r.tokens, r.reduction).values()
    workload = workload.settled(rows)
    chosen = [row for row in rows if row.id in r.row] if r.row else rows[: r.limit]
    tokenizer = models.load_tokenizer(r.model, workload, adapter=r.adapter)
    examples = workload.encode(chosen, tokenizer, max_length=r.max_length)
    entries = [workload.seen(example, tokenizer, loss) for example in examples]
    return {"format": 1, "command": "show", "rows": entries}

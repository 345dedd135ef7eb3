"""What every job does first: check what was asked, read rows, load a model, tune it if asked to."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..attribution.saved import read_document
from ..attribution.stream import Progress
from ..errors import InputError
from ..runs.methods import Method, parse_damping, parse_method
from ..runs.scoring import Data, size_of
from ..workloads import Workload, models
from ..workloads.batches import Batches
from ..workloads.files import same_source
from ..workloads.finetune import fine_tune
from ..workloads.reading import RowSet, parse_kind, read_rows
from ..workloads.rows import Row
from .output import check_output
from .request import Request


@dataclass
class Prepared:
    """A tuned model with its rows as batches."""

    workload: Workload
    data: Data
    train: list[Row]
    query: list[Row]
    tuned: Any
    skill: dict[str, Any] | None
    seconds: dict[str, float] = field(default_factory=dict)


def check(r: Request) -> None:
    """Refuse what can be seen wrong without the data and the model."""
    r.check()
    if r.fitted is not None:
        read_document(Path(r.fitted))
    methods_of(r)
    check_output(r.output)


def read(r: Request, *, queries: bool = True) -> tuple[Workload, list[Row], list[Row]]:
    """The kind of the rows, and all rows or as many as the limits say, drawn by the seed."""
    check(r)
    train = read_kind(r, r.train)
    query = RowSet(train.workload, [])
    if queries:
        # a pipe gives its rows once
        once = len(r.train) == len(r.query) and all(map(same_source, r.train, r.query))
        query = train if once else read_kind(r, r.query)
    train_source, query_source = ", ".join(r.train), ", ".join(r.query)
    if train.workload != query.workload:
        raise InputError(
            f"{train_source} holds {train.workload.name} rows, {query_source} holds "
            f"{query.workload.name} rows"
        )
    train.workload.losses(r.tokens, r.reduction)
    # by all rows: a draw that misses a label must not move the others
    workload = train.workload.settled(train.rows)
    drawn = _sample(query.rows, r.query_limit, r.seed)
    try:
        workload.check(drawn)
    except InputError as error:
        raise InputError(f"{query_source}, {error}") from None
    return workload, _sample(train.rows, r.limit, r.seed), drawn


def read_kind(r: Request, sources: Sequence[str]) -> RowSet:
    """The rows of these files, of the kind that was asked for or is found in them."""
    kind = None if r.kind is None else parse_kind(r.kind)
    return read_rows(*sources, fields=r.fields, kind=kind)


def _sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def methods_of(r: Request, note: str = "") -> list[Method]:
    """Every method with every damping; `note` is added to the labels."""
    found = []
    for text in r.method:
        plain = parse_method(text, parse_damping(r.damping[0]))
        for damping in r.damping if plain.solver().needs_damping else r.damping[:1]:
            notes = [note, f"damping {damping}" if len(r.damping) > 1 else ""]
            found.append(parse_method(text, parse_damping(damping), ", ".join(filter(None, notes))))
    labels = [method.label for method in found]
    if len(set(labels)) < len(labels):
        raise InputError(f"a method is asked for twice: {', '.join(labels)}")
    return found


def prepare(
    r: Request, workload: Workload, train: list[Row], query: Sequence[Row] = ()
) -> Prepared:
    """The model, tuned if asked to, with the rows as batches."""
    set_seed(r.seed)
    seconds: dict[str, float] = {}
    with clock(seconds, "load model"):
        loaded = models.load(r.model, workload, adapter=r.adapter, device=r.device)
    pad = loaded.tokenizer.pad_token_id

    def batched(rows: Sequence[Row]) -> Batches:
        examples = workload.encode(
            rows, loaded.tokenizer, model=loaded.model, max_length=r.max_length
        )
        return Batches(examples, lambda chosen: workload.collate(chosen, pad), r.batch_size)

    batches, query_batches = batched(train), batched(query)
    model, skill = loaded.model, None
    if r.tuning is not None and r.adapter is None:
        with clock(seconds, "skill before"):
            before = workload.skill(model, query_batches)
        with clock(seconds, "fine-tune"):
            model = fine_tune(
                model, batches.dataset, pad, workload, r.tuning, seed=r.seed,
                progress=_as_steps(r.progress),
            )  # fmt: skip
        with clock(seconds, "skill after"):
            after = workload.skill(model, query_batches)
        skill = {"base": before, "tuned": after, "unit": workload.unit}
    loss = next(iter(workload.losses(r.tokens, r.reduction).values()))
    data = Data(model, batches, query_batches, loss, r.blocks)
    size_of(data)
    return Prepared(workload, data, train, list(query), model, skill, seconds)


def _as_steps(progress: Progress | None) -> Any:
    if progress is None:
        return None
    return lambda done, total: progress("fine-tune", done, total)


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def set_seed(seed: int) -> None:
    """Everything random that the jobs do not seed themselves."""
    torch.manual_seed(seed)
    random.seed(seed)

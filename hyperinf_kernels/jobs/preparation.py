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
from ..gradients import CausalLM, Loss, SequenceClassification
from ..runs.methods import Method, parse_damping, parse_method
from ..runs.scoring import Data, size_of
from ..workloads import models
from ..workloads.encoding import Encoder, warn_of_difference
from ..workloads.finetune import LoraTraining, accuracy, fine_tune
from ..workloads.rows import Fields, Row, read_rows, same_source
from ..workloads.text import Batches, check_labels, encode
from .output import check_output


@dataclass(frozen=True)
class Settings:
    """What a person asked for; see the command line's help for each."""

    model: str
    train: str = ""
    query: str = ""
    adapter: str | None = None
    output: Path = Path("hyperinf-output")
    methods: tuple[str, ...] = ("hyperinf",)
    dampings: tuple[str, ...] = ("0.1",)
    tokens: tuple[str, ...] = ("answer",)
    reduction: str = "sum"
    blocks: str = "lora"
    batch_size: int = 16
    max_length: int | None = None
    limit: int | None = None
    query_limit: int | None = None
    top_k: int | None = None
    per_block: bool = False
    flip: float = 0.0
    fitted: str | None = None
    tuning: LoraTraining | None = None
    device: str = "cpu"
    seed: int = 0
    fields: Fields = field(default_factory=Fields)
    progress: Progress | None = None


@dataclass
class Prepared:
    """A tuned model with its rows as batches."""

    data: Data
    train: list[Row]
    query: list[Row]
    tuned: Any
    skill: dict[str, Any] | None
    seconds: dict[str, float]


def check(s: Settings) -> None:
    """Refuse what can be seen wrong without the data and the model."""
    for option, value in (
        ("--batch-size", s.batch_size), ("--max-length", s.max_length), ("--limit", s.limit),
        ("--query-limit", s.query_limit), ("--top-k", s.top_k),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise InputError(f"{option} must be at least 1, got {value}")
    if not 0 <= s.seed < 2**32:
        raise InputError(f"--seed must be at least 0 and below 2^32, got {s.seed}")
    if s.per_block and s.top_k is not None:
        raise InputError("--per-block needs every score; leave --top-k out")
    if s.fitted is not None and (s.methods, s.dampings, s.blocks) != (
        Settings.methods, Settings.dampings, Settings.blocks
    ):  # fmt: skip
        raise InputError(
            "--fitted brings its method, damping and blocks; leave --method, --damping and "
            "--blocks out"
        )
    tuned = s.adapter or s.tuning or (Path(s.model) / "adapter_config.json").exists()
    if s.blocks == "lora" and not tuned:
        raise InputError(
            "there is no LoRA adapter to attribute; give one with --adapter, let identify or "
            "mislabeled tune one with --epochs, or choose parameters of the model with --blocks"
        )
    if s.fitted is not None:
        read_document(Path(s.fitted))
    methods_of(s)
    losses_of(s, "generation")
    check_output(s.output)


def read(s: Settings) -> tuple[list[Row], list[Row], list[int | str]]:
    """All rows, or as many as the limits say, drawn by the seed; and the labels of all."""
    check(s)
    train = read_rows(s.train, fields=s.fields)
    # a pipe gives its rows once
    same = same_source(s.train, s.query)
    query = list(train) if same else read_rows(s.query, fields=s.fields)
    if train[0].kind != query[0].kind:
        raise InputError(
            f"{s.train} holds {train[0].kind} rows, {s.query} holds {query[0].kind} rows"
        )
    # of all rows: a draw that misses a label must not move the others
    classes = models.label_names([row.label for row in train if row.answer is None])
    train, query = _sample(train, s.limit, s.seed), _sample(query, s.query_limit, s.seed)
    try:
        check_labels(query, classes)
    except InputError as error:
        raise InputError(f"{s.query}, {error}") from None
    return train, query, classes


def _sample(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return [rows[i] for i in chosen]


def methods_of(s: Settings, note: str = "") -> list[Method]:
    """Every method with every damping; `note` is added to the labels."""
    found = []
    for text in s.methods:
        plain = parse_method(text, parse_damping(s.dampings[0]))
        for damping in s.dampings if plain.solver().needs_damping else s.dampings[:1]:
            notes = [note, f"damping {damping}" if len(s.dampings) > 1 else ""]
            found.append(parse_method(text, parse_damping(damping), ", ".join(filter(None, notes))))
    labels = [method.label for method in found]
    if len(set(labels)) < len(labels):
        raise InputError(f"a method is asked for twice: {', '.join(labels)}")
    return found


def losses_of(s: Settings, kind: str) -> dict[str, Loss]:
    """The loss of each choice of tokens."""
    if kind == "classification":
        return {"": SequenceClassification()}
    try:
        return {t: CausalLM(t, s.reduction) for t in s.tokens}  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"--{error}") from None


def prepare(
    s: Settings, train: list[Row], query: list[Row], classes: Sequence[int | str] = ()
) -> Prepared:
    set_seed(s.seed)
    seconds: dict[str, float] = {}
    kind = train[0].kind
    with clock(seconds, "load model"):
        loaded = models.load(
            s.model, kind=kind, labels=len(classes) or 2, adapter=s.adapter, device=s.device
        )
    classes = models.class_order(loaded.model, classes)
    encoded = [
        encode(rows, loaded.tokenizer, classes=classes, max_length=s.max_length,
               limit=models.position_limit(loaded.model),
               vocabulary=models.vocabulary_size(loaded.model))
        for rows in (train, query)
    ]  # fmt: skip
    tokenizer, first = loaded.tokenizer, train[: s.batch_size]
    warn_of_difference(
        Encoder(tokenizer, tokenizer.eos_token_id),
        [(row.id, row.prompt, row.answer) for row in first],
        [row.input_ids for row in encoded[0][: len(first)]],
    )
    pad = tokenizer.pad_token_id
    batches, query_batches = (Batches(e, pad, s.batch_size) for e in encoded)
    model, skill = loaded.model, None
    if s.tuning is not None and s.adapter is None:
        with clock(seconds, "skill before"):
            before = accuracy(model, query_batches)
        with clock(seconds, "fine-tune"):
            model = fine_tune(
                model, encoded[0], pad, kind, s.tuning, seed=s.seed,
                progress=_as_steps(s.progress),
            )  # fmt: skip
        with clock(seconds, "skill after"):
            after = accuracy(model, query_batches)
        skill = {"base": before, "tuned": after, "unit": "accuracy on the queries"}
    loss = next(iter(losses_of(s, kind).values()))
    data = Data(model, batches, query_batches, loss, s.blocks)
    size_of(data)
    return Prepared(data, train, query, model, skill, seconds)


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

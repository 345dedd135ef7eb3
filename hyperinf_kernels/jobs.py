"""The jobs behind the command line: read, check, load, tune, score, write."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .attribution import Attributor, InfluenceScores
from .attribution.stream import Progress
from .document import environment, method_entry, query_entries, run_document
from .errors import InputError
from .files import write_json
from .gradients import CausalLM, Loss, SequenceClassification
from .report import render_html
from .tasks import models, sentences
from .tasks.finetune import LoraTraining, accuracy, fine_tune
from .tasks.identification import check_groups, corrupted_rows, same_class
from .tasks.methods import Method, parse_damping, parse_method
from .tasks.mislabeled import baselines, harm_scores, summary, suspects, training_losses
from .tasks.rows import Fields, Row, flip_labels, read_rows, write_rows
from .tasks.scoring import Data, score_methods, size_of, with_loss
from .tasks.text import Batches, check_labels, encode
from .tasks.workspace import check_output, output_folder


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


def score(s: Settings) -> dict[str, Any]:
    """Influence of every training row on every query."""
    prepared = _prepare(s, *_read(s))
    results = _all_methods(s, prepared)
    context = {"queries": query_entries(results, prepared.train, prepared.query)}
    return _finish(s, prepared, "score", results, {}, context)


def identify(s: Settings) -> dict[str, Any]:
    """Does influence find the training rows of each query's class?"""
    train, query, classes = _read(s)
    check_groups(train, query)
    prepared = _prepare(s, train, query, classes)
    results = _all_methods(s, prepared)
    measured = {label: _identified(scores, train, query) for label, scores in results.items()}
    context = {"queries": query_entries(results, train, query)}
    return _finish(s, prepared, "identify", results, measured, context)


def demo(s: Settings, rows: int, queries: int, corrupt: float) -> dict[str, Any]:
    """The whole job on sentences of our own, some with a wrong answer."""
    _check(s)
    for option, count in (("--rows", rows), ("--queries", queries)):
        if count < 1:
            raise InputError(f"{option} must be at least 1, got {count}")
    train, query = sentences.generate(rows, queries, corrupt=corrupt, seed=s.seed)
    check_groups(train, query)
    prepared = _prepare(s, train, query)
    results = _all_methods(s, prepared)
    measured = {}
    context: dict[str, Any] = {"queries": query_entries(results, train, query)}
    corrupted = np.array([bool(row.corrupted) for row in train])
    some = 0 < corrupted.sum() < len(train)
    for label, scores in results.items():
        metrics, curves = _identified(scores, train, query)
        if some:
            harm = scores.values.double().mean(0).numpy()
            metrics["corrupted"], curve = corrupted_rows(harm, corrupted)
            curves.append(curve)
        measured[label] = (metrics, curves)
    if some:
        context["baselines"] = baselines(train, training_losses(prepared.data))
    return _finish(s, prepared, "demo", results, measured, context)


def mislabeled(s: Settings) -> dict[str, Any]:
    """Rank training rows by the harm they do to the queries on average."""
    train, query, classes = _read(s)
    if s.flip:
        train = flip_labels(train, s.flip, s.seed)
    known = {bool(row.corrupted) for row in train if row.corrupted is not None}
    prepared = _prepare(s, train, query, classes)
    methods = _methods(s)
    with _clock(prepared.seconds, "methods"):
        scored = harm_scores(prepared.data, methods, s.progress)
    prepared.seconds.update(prepared.data.seconds)
    measured: dict[str, tuple[dict[str, Any], list[Any]]] = {}
    context: dict[str, Any] = {}
    if known == {True, False}:
        for label, (metrics, curve) in summary(train, scored).items():
            measured[label] = ({"corrupted": metrics}, [curve])
        context["baselines"] = baselines(train, training_losses(prepared.data))
    first = next(iter(scored.values()))
    context["suspects"] = suspects(train, first.values[0].double().numpy())
    return _finish(s, prepared, "mislabeled", scored, measured, context)


def self_influence(s: Settings) -> dict[str, Any]:
    """Influence of every training row on itself: what the model had to memorise."""
    train, _, classes = _read(replace(s, query=s.train))
    prepared = _prepare(s, train, [], classes)
    results, order = {}, prepared.data.train_ids
    for method in _methods(s):
        attributor = Attributor(
            prepared.data.model, loss=prepared.data.loss, blocks=s.blocks,
            method=method.solver(), progress=s.progress,
        )  # fmt: skip
        attributor.fit(prepared.data.train)
        values = attributor.self_influence(prepared.data.train)
        prepared.seconds.update(attributor.seconds)
        scores = InfluenceScores(
            values[None], attributor.train_ids, ["itself"], attributor.report(),
            meta={"method": method.name, "damping": str(method.damping)},
        )  # fmt: skip
        results[method.label] = scores.aligned(order, ["itself"])
    # the report ranks from large to small, and self-influence is never positive
    strength = -next(iter(results.values())).values[0].double().numpy()
    context = {"suspects": suspects(train, strength)}
    return _finish(s, prepared, "self-influence", results, {}, context)


def _identified(
    scores: InfluenceScores, train: Sequence[Row], query: Sequence[Row]
) -> tuple[dict[str, Any], list[Any]]:
    metrics, curve = same_class(scores, train, query)
    return {"same class": metrics}, [curve]


def _check(s: Settings) -> None:
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
    tuned = s.adapter or s.tuning or (Path(s.model) / "adapter_config.json").exists()
    if s.blocks == "lora" and not tuned:
        raise InputError(
            "there is no LoRA adapter to attribute; give one with --adapter, let identify or "
            "mislabeled tune one with --epochs, or choose parameters of the model with --blocks"
        )
    _methods(s)
    _losses(s, "generation")
    check_output(s.output)


def _read(s: Settings) -> tuple[list[Row], list[Row], list[int | str]]:
    """All rows, or as many as the limits say, drawn by the seed; and the labels of all."""
    _check(s)
    train, query = (read_rows(path, fields=s.fields) for path in (s.train, s.query))
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


def _methods(s: Settings, note: str = "") -> list[Method]:
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


def _losses(s: Settings, kind: str) -> dict[str, Loss]:
    if kind == "classification":
        return {"": SequenceClassification()}
    try:
        return {t: CausalLM(t, s.reduction) for t in s.tokens}  # type: ignore[arg-type]
    except ValueError as error:
        raise InputError(f"--{error}") from None


def _prepare(
    s: Settings, train: list[Row], query: list[Row], classes: Sequence[int | str] = ()
) -> Prepared:
    set_seed(s.seed)
    seconds: dict[str, float] = {}
    kind = train[0].kind
    with _clock(seconds, "load model"):
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
    pad = loaded.tokenizer.pad_token_id
    batches, query_batches = (Batches(e, pad, s.batch_size) for e in encoded)
    model, skill = loaded.model, None
    if s.tuning is not None and s.adapter is None:
        with _clock(seconds, "skill before"):
            before = accuracy(model, query_batches)
        with _clock(seconds, "fine-tune"):
            model = fine_tune(
                model, encoded[0], pad, kind, s.tuning, seed=s.seed,
                progress=_as_steps(s.progress),
            )  # fmt: skip
        with _clock(seconds, "skill after"):
            after = accuracy(model, query_batches)
        skill = {"base": before, "tuned": after, "unit": "accuracy on the queries"}
    loss = next(iter(_losses(s, kind).values()))
    data = Data(model, batches, query_batches, loss, s.blocks)
    size_of(data)
    return Prepared(data, train, query, model, skill, seconds)


def _as_steps(progress: Progress | None) -> Any:
    if progress is None:
        return None
    return lambda done, total: progress("fine-tune", done, total)


def _all_methods(s: Settings, p: Prepared) -> dict[str, InfluenceScores]:
    """Every method under every choice of tokens."""
    results: dict[str, InfluenceScores] = {}
    losses = _losses(s, p.train[0].kind)
    for tokens, loss in losses.items():
        note = f"{tokens} tokens" if len(losses) > 1 else ""
        data = with_loss(p.data, loss)
        results |= score_methods(
            data, _methods(s, note), top_k=s.top_k, per_block=s.per_block, progress=s.progress
        )
        for stage, value in data.seconds.items():
            p.seconds[stage] = p.seconds.get(stage, 0.0) + value
    return results


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _finish(
    s: Settings,
    p: Prepared,
    command: str,
    results: Mapping[str, InfluenceScores],
    measured: Mapping[str, tuple[Mapping[str, Any], Sequence[Any]]],
    context: Mapping[str, Any],
) -> dict[str, Any]:
    """Write everything at once: scores, report.json, report.html, and the adapter if tuned here."""
    entries = []
    for label, scores in results.items():
        metrics, curves = measured.get(label, ({}, []))
        entries.append(method_entry(scores, label, metrics, curves))
    document = run_document(
        entries,
        command=command,
        title=TITLES[command],
        environment=environment(s.device),
        seed=s.seed,
        model={
            "name": s.model,
            "adapter": s.adapter,
            **size_of(p.data),
            "loss": ", ".join(map(str, _losses(s, p.train[0].kind).values())),
            "skill": p.skill,
        },
        data={
            role: {"source": source or "generated sentences", "rows": len(rows)}
            for role, source, rows in (("train", s.train, p.train), ("query", s.query, p.query))
            if rows
        },
        seconds=p.seconds,
        **context,
    )
    page = render_html(document)
    with output_folder(s.output) as folder:
        for number, (label, scores) in enumerate(results.items()):
            name = "scores.parquet" if number == 0 else f"scores-{_slug(label)}.parquet"
            scores.to_parquet(folder / name)
        write_json(folder / "report.json", document)
        (folder / "report.html").write_text(page, encoding="utf-8")
        if p.skill is not None:
            # "auto" would ask the network whether the vocabulary has grown
            p.tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
            write_rows(p.train, folder / "train.jsonl")
            write_rows(p.query, folder / "query.jsonl")
    return document


TITLES = {
    "score": "Which training examples shaped these answers",
    "identify": "Do queries find the training examples of their own class?",
    "mislabeled": "Training examples whose label looks wrong",
    "self-influence": "Training examples the model had to memorise",
    "demo": "Which training examples shaped these answers",
}


def _slug(label: str) -> str:
    words = "".join(c if c.isalnum() or c in ".=+-" else " " for c in label.lower()).split()
    return "-".join(words)


def set_seed(seed: int) -> None:
    """Everything random that the jobs do not seed themselves."""
    torch.manual_seed(seed)
    random.seed(seed)

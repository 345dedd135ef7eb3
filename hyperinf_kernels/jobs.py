"""The jobs behind the command line: read, check, load, tune, score, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .attribution import Attributor, InfluenceScores
from .document import environment, method_entry, query_entries, run_document
from .errors import InputError
from .files import write_json
from .gradients import find_blocks
from .plan_command import plan_document
from .preparation import (
    Prepared,
    Settings,
    check,
    clock,
    losses_of,
    methods_of,
    prepare,
    read,
)
from .report import render_html
from .tasks import sentences
from .tasks.identification import check_groups, corrupted_rows, same_class
from .tasks.mislabeled import baselines, harm_scores, summary, suspects, training_losses
from .tasks.rows import Row, flip_labels, write_rows
from .tasks.scoring import score_methods, size_of, with_loss
from .tasks.workspace import output_folder


def score(s: Settings) -> dict[str, Any]:
    """Influence of every training row on every query."""
    prepared = prepare(s, *read(s))
    results = _all_methods(s, prepared)
    context = {"queries": query_entries(results, prepared.train, prepared.query)}
    return _finish(s, prepared, "score", results, {}, context)


def identify(s: Settings) -> dict[str, Any]:
    """Does influence find the training rows of each query's class?"""
    train, query, classes = read(s)
    check_groups(train, query)
    prepared = prepare(s, train, query, classes)
    results = _all_methods(s, prepared)
    measured = {label: _identified(scores, train, query) for label, scores in results.items()}
    context = {"queries": query_entries(results, train, query)}
    return _finish(s, prepared, "identify", results, measured, context)


def demo(s: Settings, rows: int, queries: int, corrupt: float) -> dict[str, Any]:
    """The whole job on sentences of our own, some with a wrong answer."""
    check(s)
    for option, count in (("--rows", rows), ("--queries", queries)):
        if count < 1:
            raise InputError(f"{option} must be at least 1, got {count}")
    train, query = sentences.generate(rows, queries, corrupt=corrupt, seed=s.seed)
    check_groups(train, query)
    prepared = prepare(s, train, query)
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
    train, query, classes = read(s)
    if s.flip:
        train = flip_labels(train, s.flip, s.seed)
    known = {bool(row.corrupted) for row in train if row.corrupted is not None}
    prepared = prepare(s, train, query, classes)
    methods = methods_of(s)
    with clock(prepared.seconds, "methods"):
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
    train, _, classes = read(replace(s, query=s.train))
    prepared = prepare(s, train, [], classes)
    results, order = {}, prepared.data.train_ids
    for method in methods_of(s):
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


def plan(s: Settings) -> dict[str, Any]:
    """What each method would do with every block; rows and model are read, nothing is computed."""
    train, query, classes = read(s)
    data = prepare(s, train, query, classes).data
    shapes = {block.name: block.shape for block in find_blocks(data.model, s.blocks)}
    plans = {
        method.label: method.solver().plan(shapes, len(train), len(query), s.device)
        for method in methods_of(s)
    }
    model = {"name": s.model, "adapter": s.adapter, **size_of(data)}
    return plan_document(plans, model, len(train), len(query))


def _identified(
    scores: InfluenceScores, train: Sequence[Row], query: Sequence[Row]
) -> tuple[dict[str, Any], list[Any]]:
    metrics, curve = same_class(scores, train, query)
    return {"same class": metrics}, [curve]


def _all_methods(s: Settings, p: Prepared) -> dict[str, InfluenceScores]:
    """Every method under every choice of tokens."""
    results: dict[str, InfluenceScores] = {}
    losses = losses_of(s, p.train[0].kind)
    for tokens, loss in losses.items():
        note = f"{tokens} tokens" if len(losses) > 1 else ""
        data = with_loss(p.data, loss)
        results |= score_methods(
            data, methods_of(s, note), top_k=s.top_k, per_block=s.per_block, progress=s.progress
        )
        for stage, value in data.seconds.items():
            p.seconds[stage] = p.seconds.get(stage, 0.0) + value
    return results


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
            "loss": ", ".join(map(str, losses_of(s, p.train[0].kind).values())),
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

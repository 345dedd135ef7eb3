"""The jobs behind the command line: read, check, load, tune, score, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..attribution import Attributor, InfluenceScores
from ..attribution.saved import check_new
from ..errors import InputError
from ..experiments import sentences
from ..experiments.identification import check_groups, corrupted_rows, same_class
from ..experiments.mislabeled import baselines, harm_scores, summary, suspects, training_losses
from ..experiments.selection import most_helpful
from ..gradients import find_blocks
from ..report.document import (
    environment,
    method_entry,
    plan_document,
    query_entries,
    run_document,
)
from ..report.page import render_html
from ..runs.methods import LABELS
from ..runs.scoring import score_methods, size_of, with_loss
from ..store.files import write_json
from ..workloads.rows import Row, flip_labels, write_rows
from .output import output_folder
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


def score(s: Settings) -> dict[str, Any]:
    """Influence of every training row on every query."""
    prepared = prepare(s, *read(s))
    results = _all_methods(s, prepared) if s.fitted is None else _by_fitted(s, prepared)
    context = {"queries": query_entries(results, prepared.train, prepared.query)}
    return _finish(s, prepared, "score", results, {}, context)


def fit(s: Settings) -> dict[str, Any]:
    """Curvature of the training rows, saved for `score --fitted`."""
    check_new(s.output)
    train, _, classes = read(replace(s, query=s.train))
    prepared = prepare(s, train, [], classes)
    (method,) = methods_of(s)
    data = prepared.data
    attributor = Attributor(
        data.model, loss=data.loss, blocks=s.blocks, method=method.solver(), progress=s.progress
    ).fit(data.train)
    attributor.save(s.output)
    return {
        "format": 1,
        "command": "fit",
        "method": method.label,
        "loss": str(data.loss),
        "model": {"name": s.model, "adapter": s.adapter, **size_of(data)},
        "train": {"source": s.train, "rows": len(train)},
        "seconds": prepared.seconds | attributor.seconds,
        "output": str(s.output),
    }


def select(s: Settings, share: float) -> dict[str, Any]:
    """The training rows that help the queries most, as a smaller training set."""
    if not 0 < share <= 1:
        raise InputError(f"--share must be over 0 and at most 1, got {share:g}")
    train, query, classes = read(s)
    prepared = prepare(s, train, query, classes)
    with clock(prepared.seconds, "methods"):
        scored = harm_scores(prepared.data, methods_of(s), s.progress)
    prepared.seconds.update(prepared.data.seconds)
    chosen = {label: most_helpful(scores, train, share) for label, scores in scored.items()}
    files = {
        _named("selected", number, label, ".jsonl"): rows
        for number, (label, rows) in enumerate(chosen.items())
    }
    mean = [Row(id="mean query", prompt=f"the mean gradient of {len(query)} queries")]
    context = {
        "queries": query_entries(scored, train, mean),
        "selected": [
            {"method": label, "rows": len(rows), "share": share, "ids": [row.id for row in rows]}
            for label, rows in chosen.items()
        ],
    }
    files = {
        _named("selected", n, label, ".jsonl"): r for n, (label, r) in enumerate(chosen.items())
    }
    return _finish(s, prepared, "select", scored, {}, context, files)


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


def _by_fitted(s: Settings, p: Prepared) -> dict[str, InfluenceScores]:
    """The rows scored by a saved curvature, whose method and damping stand."""
    data = p.data
    attributor = Attributor.load(s.fitted or "", data.model, loss=data.loss, progress=s.progress)
    scores = attributor.score(data.query, data.train, top_k=s.top_k, per_block=s.per_block)
    p.seconds.update(attributor.seconds)
    return {LABELS[attributor.solver.method]: scores.aligned(data.train_ids, data.query_ids)}


def _finish(
    s: Settings,
    p: Prepared,
    command: str,
    results: Mapping[str, InfluenceScores],
    measured: Mapping[str, tuple[Mapping[str, Any], Sequence[Any]]],
    context: Mapping[str, Any],
    rows: Mapping[str, Sequence[Row]] | None = None,
) -> dict[str, Any]:
    """Write everything at once: scores, report, files of `rows`, and the adapter if tuned here."""
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
            scores.to_parquet(folder / _named("scores", number, label, ".parquet"))
        for name, chosen in (rows or {}).items():
            write_rows(chosen, folder / name, fields=s.fields)
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
    "select": "Training examples that help these queries most",
    "self-influence": "Training examples the model had to memorise",
    "demo": "Which training examples shaped these answers",
}


def _named(stem: str, number: int, label: str, ending: str) -> str:
    """The first method's file has the plain name."""
    return f"{stem}{ending}" if number == 0 else f"{stem}-{_slug(label)}{ending}"


def _slug(label: str) -> str:
    words = "".join(c if c.isalnum() or c in ".=+-" else " " for c in label.lower()).split()
    return "-".join(words)

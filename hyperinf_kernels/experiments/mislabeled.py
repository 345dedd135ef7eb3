"""Mislabeled-data detection: the training rows that harm the queries most come first.

The experiment of DataInf (section 4.2) and HyperINF: labels of a share of the training rows are
flipped, a LoRA adapter is trained on them, and rows are ranked by their influence on the mean query
gradient. Detectors that need no influence stand beside every method, because a method that does not
beat them has shown nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..attribution import InfluenceScores, influence
from ..attribution.stream import Progress, check_weights
from ..errors import InputError
from ..gradients.capture import move, prepared
from ..runs.methods import Method
from ..runs.scoring import Data, gradients, mean_query
from ..workloads.rows import Row
from .identification import corrupted_rows


def harm_scores(
    data: Data, methods: Sequence[Method], progress: Progress | None = None
) -> dict[str, InfluenceScores]:
    """Influence of every training row on the mean query, (1, n), by method label."""
    check_weights(data.model)
    (train_ids, train), (_, query) = gradients(data, progress)
    mean = mean_query(query)
    scored = {}
    for done, method in enumerate(methods, 1):
        result = influence(
            train, mean, method.solver(), train_ids=train_ids, query_ids=["mean query"]
        )
        scored[method.label] = result.aligned(data.train_ids, ["mean query"])
        if progress is not None:
            progress("methods", done, len(methods))
    return scored


def flip_labels(rows: Sequence[Row], fraction: float, seed: int) -> list[Row]:
    """Give exactly round(fraction * n) rows another label that occurs in the data.

    Rows and labels are drawn uniformly by `random.Random(seed)`; `corrupted` tells what was done.
    Raises InputError for a fraction outside [0, 1], fewer than two labels, or an unfit row.
    """
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"the fraction of labels to flip must be in [0, 1], but is {fraction}")
    for row in rows:
        if row.content.get("label") is None or row.corrupted:
            raise InputError(f"row {row.id} has no label, or a corrupted one: it cannot be flipped")
    present = {row.content["label"] for row in rows}
    labels = sorted(present, key=lambda label: (isinstance(label, str), label))
    count = round(fraction * len(rows))
    if count and len(labels) < 2:
        raise InputError(f"flipping labels needs at least two labels, but there is {len(labels)}")
    rng = random.Random(seed)
    flipped = [replace(row, corrupted=False) for row in rows]
    for i in rng.sample(range(len(rows)), count):
        other = rng.choice([label for label in labels if label != rows[i].content["label"]])
        flipped[i] = replace(rows[i], content={**rows[i].content, "label": other}, corrupted=True)
    return flipped


def training_losses(data: Data) -> np.ndarray:
    """The loss of every training row, (n,), in the order of the data."""
    found: dict[str, float] = {}
    device = next(data.model.parameters()).device
    with prepared(data.model), torch.no_grad():
        for batch in data.train:
            losses = data.loss(data.model, move(batch, device))
            found.update(zip(batch["id"], losses.tolist(), strict=True))
    return np.array([found[i] for i in data.train_ids])


def baselines(
    rows: Sequence[Row], observed: Sequence[int | str | None], losses: np.ndarray
) -> list[dict[str, Any]]:
    """Trivial detectors of corrupted rows: the observed label alone, and the training loss."""
    corrupted = np.array([bool(row.corrupted) for row in rows])
    entries = []
    for name, score in (
        ("observed label alone", _label_rate(observed, corrupted)),
        ("training loss", losses),
    ):
        metrics, curve = corrupted_rows(score, corrupted)
        entries.append({"name": name, "metrics": {"corrupted": metrics}, "curves": [curve]})
    return entries


def _label_rate(labels: Sequence[int | str | None], corrupted: np.ndarray) -> np.ndarray:
    """Each row scored by how often its observed label is corrupted: the best a detector can do
    that sees nothing else (it is even told the rates)."""
    rate = {label: corrupted[[other == label for other in labels]].mean() for label in set(labels)}
    return np.array([rate[label] for label in labels])


def suspects(
    rows: Sequence[Row],
    show: Callable[[Row], Mapping[str, str | None]],
    harm: np.ndarray,
    count: int = 50,
) -> list[dict[str, Any]]:
    """The rows to look at first, most harmful first."""
    order = np.argsort(-harm, kind="stable")[:count]
    return [
        {
            "rank": rank,
            "id": rows[i].id,
            "score": float(harm[i]),
            "prompt": show(rows[i])["prompt"],
            "label": show(rows[i])["answer"],
            "corrupted": rows[i].corrupted,
        }
        for rank, i in enumerate(order.tolist(), 1)
    ]


def summary(
    rows: Sequence[Row], scored: Mapping[str, InfluenceScores]
) -> dict[str, tuple[dict[str, float], dict[str, Any]]]:
    """(metrics, curve) by method label, for rows whose corruption is known."""
    corrupted = np.array([bool(row.corrupted) for row in rows])
    return {
        label: corrupted_rows(scores.values[0].double().numpy(), corrupted)
        for label, scores in scored.items()
    }

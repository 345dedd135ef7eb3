"""Mislabeled-data detection: the training rows that harm the queries most come first.

The experiment of DataInf (section 4.2) and HyperINF: labels of a share of the training rows are
flipped, a LoRA adapter is trained on them, and rows are ranked by their influence on the mean query
gradient. Detectors that need no influence stand beside every method, because a method that does not
beat them has shown nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..attribution import InfluenceScores, influence
from ..attribution.stream import Progress, check_weights
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


def training_losses(data: Data) -> np.ndarray:
    """The loss of every training row, (n,), in the order of the data."""
    found: dict[str, float] = {}
    device = next(data.model.parameters()).device
    with prepared(data.model), torch.no_grad():
        for batch in data.train:
            losses = data.loss(data.model, move(batch, device))
            found.update(zip(batch["id"], losses.tolist(), strict=True))
    return np.array([found[i] for i in data.train_ids])


def baselines(rows: Sequence[Row], losses: np.ndarray) -> list[dict[str, Any]]:
    """Trivial detectors of corrupted rows: the observed label alone, and the training loss."""
    corrupted = np.array([bool(row.corrupted) for row in rows])
    entries = []
    for name, score in (
        ("observed label alone", _label_rate(rows, corrupted)),
        ("training loss", losses),
    ):
        metrics, curve = corrupted_rows(score, corrupted)
        entries.append({"name": name, "metrics": {"corrupted": metrics}, "curves": [curve]})
    return entries


def _label_rate(rows: Sequence[Row], corrupted: np.ndarray) -> np.ndarray:
    """Each row scored by how often its observed label is corrupted: the best a detector can do
    that sees nothing else (it is even told the rates)."""
    labels = [row.label if row.answer is None else row.group for row in rows]
    rate = {label: corrupted[[other == label for other in labels]].mean() for label in set(labels)}
    return np.array([rate[label] for label in labels])


def suspects(rows: Sequence[Row], harm: np.ndarray, count: int = 50) -> list[dict[str, Any]]:
    """The rows to look at first, most harmful first."""
    order = np.argsort(-harm, kind="stable")[:count]
    return [
        {
            "rank": rank,
            "id": rows[i].id,
            "score": float(harm[i]),
            "prompt": rows[i].prompt,
            "label": str(rows[i].label if rows[i].answer is None else rows[i].answer),
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

"""Influential-data identification: does a query find the training rows of its own class?

The experiment of DataInf, section 4.3: a training row is relevant to a query when both belong to
the same class; the score is minus the influence, since negative helps. AUC and recall are computed
per query and reported as mean and deviation over the queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..attribution import InfluenceScores
from ..errors import InputError
from ..workloads.rows import Row
from .detection import mean_sd, recall_rows, roc_auc, roc_auc_rows, roc_curve

GRID = np.linspace(0, 1, 101)


def check_groups(train: Sequence[Row], queries: Sequence[Row]) -> None:
    """Every row has a class, and every query's class has training rows, but not all of them."""
    for role, rows in (("train", train), ("query", queries)):
        for row in rows:
            if row.group is None:
                raise InputError(
                    f"{role} row {row.id} has no class; name its field with --group-field"
                )
    known = {row.group for row in train}
    if len(known) < 2:
        raise InputError("all training rows have one class; there is nothing to identify")
    for row in queries:
        if row.group not in known:
            raise InputError(f"query row {row.id}: no training row has its class {row.group!r}")


def same_class(
    scores: InfluenceScores, train: Sequence[Row], queries: Sequence[Row]
) -> tuple[dict[str, float], dict[str, Any]]:
    """AUC and recall over the queries, and the mean ROC curve, of dense scores."""
    relevant = np.array([[t.group == q.group for t in train] for q in queries])
    helpful = -scores.values.double().numpy()
    auc, auc_sd = mean_sd(roc_auc_rows(helpful, relevant))
    recall, recall_sd = mean_sd(recall_rows(helpful, relevant))
    tpr = np.zeros_like(GRID)
    for row, mask in zip(helpful, relevant, strict=True):
        x, y = roc_curve(row, mask)
        tpr += np.interp(GRID, x, y) / len(helpful)
    metrics = {"auc_mean": auc, "auc_sd": auc_sd, "recall_mean": recall, "recall_sd": recall_sd}
    curve = {
        "name": "same class (mean ROC)",
        "x": GRID.tolist(),
        "y": tpr.tolist(),
        "x_label": "share of other classes' rows accepted",
        "y_label": "share of same-class rows found",
    }
    return metrics, curve


def corrupted_rows(
    harm: np.ndarray, corrupted: np.ndarray
) -> tuple[dict[str, float], dict[str, Any]]:
    """AUC and recall of finding corrupted rows by their harm (n,), and the detection curve."""
    from .detection import detection_curve, recall_at

    inspected, found = detection_curve(harm, corrupted)
    metrics = {
        "auc": roc_auc(harm, corrupted),
        "recall": recall_at(harm, corrupted, int(corrupted.sum())),
    }
    curve = {
        "name": "corrupted rows (detection)",
        "x": inspected.tolist(),
        "y": found.tolist(),
        "x_label": "share of training rows inspected",
        "y_label": "share of corrupted rows found",
    }
    return metrics, curve

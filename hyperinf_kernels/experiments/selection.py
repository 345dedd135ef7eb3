"""Data selection: the training rows that help a set of queries most, as a smaller training set.

HyperINF's selection experiments rank a pool by its influence on the mean gradient of a validation
set and tune the model on the best share of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attribution import InfluenceScores
from ..workloads.rows import Row


def most_helpful(scores: InfluenceScores, rows: Sequence[Row], share: float) -> list[Row]:
    """The given share of the rows, at least one, most helpful first; ties in the rows' order.

    Args:
        scores: (1, n) of the mean query, columns in the order of `rows`.
        share: over 0, at most 1.
    """
    count = max(1, round(share * len(rows)))
    order = torch.argsort(scores.values[0].double(), stable=True)[:count]
    return [rows[i] for i in order.tolist()]

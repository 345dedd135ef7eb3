"""How well a score separates wanted rows from the rest: ROC, inspection curve and recall.

One convention everywhere: **the higher the score, the earlier a row is inspected**. An influence
is positive when a row harms, so mislabelled rows are scored by the influence itself and rows of
the query's own class by its negative. `scores` is any real array (float64 inside), `positive` a
boolean array of the same shape. The functions named `*_rows` work on (m, n), one curve per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "detection_curve",
    "mean_sd",
    "recall_at",
    "recall_rows",
    "roc_auc",
    "roc_auc_rows",
    "roc_curve",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


def roc_auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """Area under the ROC curve of n rows: the Mann-Whitney statistic, ties counted as one half.

    AUC = (R - P (P + 1) / 2) / (P N), with P positive rows, N others, and R the sum of the
    positive rows' ranks (ascending from 1, equal scores share their mean rank). It equals
    (1 / (P N)) sum over pairs of [s_pos > s_neg] + 0.5 [s_pos = s_neg].

    Raises ValueError for NaN scores, unequal shapes, or when only one class is present.
    """
    s, p = _checked(scores, positive, ndim=1)
    return float(roc_auc_rows(s[None], p[None])[0])


def roc_auc_rows(scores: ArrayLike, positive: ArrayLike) -> Floats:
    """`roc_auc` of every row of (m, n) arrays, as float64 (m,)."""
    s, p = _checked(scores, positive, ndim=2)
    n = s.shape[1]
    n_pos = p.sum(axis=1, dtype=np.int64)
    _need_both_classes(n_pos, n)
    order = np.argsort(s, axis=1, kind="stable")
    ranked = np.take_along_axis(s, order, axis=1)
    index = np.broadcast_to(np.arange(n), s.shape)
    new = np.ones(s.shape, dtype=bool)
    new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    last = np.ones(s.shape, dtype=bool)
    last[:, :-1] = new[:, 1:]
    lowest = np.maximum.accumulate(np.where(new, index, 0), axis=1)
    highest = np.minimum.accumulate(np.where(last, index, n - 1)[:, ::-1], axis=1)[:, ::-1]
    # Half-integers, so the sum is exact in float64 up to about 1e8 rows.
    midrank = 0.5 * (lowest + highest) + 1.0
    rank_sum = (midrank * np.take_along_axis(p, order, axis=1)).sum(axis=1)
    auc: Floats = (rank_sum - 0.5 * n_pos * (n_pos + 1)) / (n_pos * (n - n_pos))
    return auc


def roc_curve(scores: ArrayLike, positive: ArrayLike, points: int = 200) -> tuple[Floats, Floats]:
    """Operating points (fpr, tpr) of the rule "score >= t", from (0, 0) to (1, 1).

    fpr(t) = #{negative, s >= t} / N and tpr(t) = #{positive, s >= t} / P. There is one vertex per
    distinct score, so that tied rows give a slanted segment and the trapezoid area is `roc_auc`.
    Beyond `points` vertices a subset is kept, evenly spaced along fpr + tpr; both ends stay.

    Raises ValueError as `roc_auc` does, and for points < 2.
    """
    s, p = _checked(scores, positive, ndim=1)
    _need_points(points)
    n_pos = int(p.sum())
    _need_both_classes(np.array([n_pos]), p.size)
    order = np.argsort(-s, kind="stable")
    ranked, hit = s[order], p[order]
    end = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    found = np.concatenate(([0], np.cumsum(hit)[end]))
    inspected = np.concatenate(([0], end + 1))
    fpr = (inspected - found) / (p.size - n_pos)
    tpr = found / n_pos
    if fpr.size > points:
        keep = np.unique(np.searchsorted(fpr + tpr, np.linspace(0.0, 2.0, points)))
        fpr, tpr = fpr[keep], tpr[keep]
    return fpr, tpr


def detection_curve(
    scores: ArrayLike, positive: ArrayLike, points: int = 200
) -> tuple[Floats, Floats]:
    """Fraction of rows inspected against the fraction of positive rows found, best score first.

    At k rows: x = k / n, y = `recall_at(scores, positive, k)`, for at most `points` evenly spaced
    k including 0 and n. Without ties, and with every k kept, its trapezoid area is
    p / 2 + (1 - p) AUC, where p is the positive fraction: 0.1 + 0.8 AUC with a fifth positive.

    Raises ValueError for NaN scores, unequal shapes, no positive row, or points < 2.
    """
    s, p = _checked(scores, positive, ndim=1)
    _need_points(points)
    _need_positive(np.array([p.sum()]))
    found = np.concatenate(([0], np.cumsum(p[np.argsort(-s, kind="stable")])))
    k = np.unique(np.rint(np.linspace(0, s.size, points)).astype(np.int64))
    return k / s.size, found[k] / found[-1]


def recall_at(scores: ArrayLike, positive: ArrayLike, k: int) -> float:
    """Share of the positive rows that are among the k highest scores: #(top k and positive) / P.

    Equal scores are taken in index order. Raises ValueError for NaN scores, unequal shapes, no
    positive row, or k outside 0..n.
    """
    s, p = _checked(scores, positive, ndim=1)
    return float(recall_rows(s[None], p[None], k=k)[0])


def recall_rows(scores: ArrayLike, positive: ArrayLike, k: int | None = None) -> Floats:
    """`recall_at` of every row of (m, n) arrays, as float64 (m,).

    k = None takes each row's own number of positives, where recall and precision coincide: the
    recall that the identification experiments report.
    """
    s, p = _checked(scores, positive, ndim=2)
    n_pos = p.sum(axis=1, dtype=np.int64)
    _need_positive(n_pos)
    if k is not None and not 0 <= k <= s.shape[1]:
        raise ValueError(f"k must be between 0 and the {s.shape[1]} rows, but is {k}")
    depth = n_pos if k is None else np.full_like(n_pos, k)
    order = np.argsort(-s, axis=1, kind="stable")
    hit = np.take_along_axis(p, order, axis=1) & (np.arange(s.shape[1]) < depth[:, None])
    recall: Floats = hit.sum(axis=1) / n_pos
    return recall


def mean_sd(values: ArrayLike) -> tuple[float, float]:
    """Mean and standard deviation of a non-empty list of finite numbers.

    mean = sum v / n and sd = sqrt(sum (v - mean)^2 / n): the spread over these very queries
    (divisor n), as in the published tables, not an estimate for a population. Raises ValueError
    for an empty list or a value that is not finite.
    """
    v = np.asarray(values, dtype=np.float64).ravel()
    if v.size == 0:
        raise ValueError("mean_sd needs at least one value")
    if not np.isfinite(v).all():
        raise ValueError("mean_sd needs finite values")
    return float(v.mean()), float(v.std())


def _checked(scores: ArrayLike, positive: ArrayLike, ndim: int) -> tuple[Floats, Bools]:
    s, p = np.asarray(scores, dtype=np.float64), np.asarray(positive)
    if s.ndim != ndim or p.shape != s.shape:
        want = "(n,)" if ndim == 1 else "(m, n)"
        raise ValueError(f"scores {s.shape} and positive {p.shape} must both have shape {want}")
    if p.dtype != np.bool_:
        raise ValueError(f"positive must be boolean, but is {p.dtype}")
    if np.isnan(s).any():
        raise ValueError("scores contain NaN, which has no rank")
    return s, p


def _need_both_classes(n_pos: Ints, n: int) -> None:
    if ((n_pos == 0) | (n_pos == n)).any():
        raise ValueError("a ROC needs positive and negative rows; only one class is present")


def _need_positive(n_pos: Ints) -> None:
    if (n_pos == 0).any():
        raise ValueError("recall needs at least one positive row")


def _need_points(points: int) -> None:
    if points < 2:
        raise ValueError(f"points must be at least 2, but is {points}")

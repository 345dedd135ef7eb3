"""Detection metrics against brute force over all pairs and all cut-offs."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperinf_kernels.experiments.detection import (
    detection_curve,
    mean_sd,
    recall_at,
    recall_rows,
    roc_auc,
    roc_auc_rows,
    roc_curve,
)


def pairwise_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mann-Whitney over every pair, ties one half."""
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0
        for a in scores[positive]
        for b in scores[~positive]
    ]
    return math.fsum(wins) / len(wins)


def found_by_hand(scores: np.ndarray, positive: np.ndarray, k: int) -> float:
    """Pick k rows one at a time: the highest score left, the lowest index among equals."""
    left = list(range(len(scores)))
    hits = 0
    for _ in range(k):
        best = left[0]
        for i in left:
            if scores[i] > scores[best]:
                best = i
        left.remove(best)
        hits += bool(positive[best])
    return hits / int(positive.sum())


def trapezoid(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(0.5 * (y[1:] + y[:-1]) * np.diff(x)))


def draw(seed: int, n: int, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores with few distinct values (many ties), both classes present."""
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.3
    positive[0], positive[-1] = True, False
    return rng.integers(0, levels, n) * 0.25 - 1.0, positive


CASES = [(0, 2, 2), (1, 7, 2), (2, 30, 4), (3, 60, 1), (4, 61, 1000), (5, 120, 10)]


@pytest.mark.parametrize(("seed", "n", "levels"), CASES)
def test_auc_equals_the_count_over_all_pairs(seed: int, n: int, levels: int) -> None:
    scores, positive = draw(seed, n, levels)
    assert roc_auc(scores, positive) == pytest.approx(pairwise_auc(scores, positive), abs=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(allow_nan=False), st.booleans()), min_size=2, max_size=25).filter(
        lambda rows: len({p for _, p in rows}) == 2
    )
)
def test_auc_holds_for_any_floats_including_infinities(rows: list[tuple[float, bool]]) -> None:
    scores, positive = np.array([s for s, _ in rows]), np.array([p for _, p in rows])
    want = pairwise_auc(scores, positive)
    assert roc_auc(scores, positive) == pytest.approx(want, abs=1e-12)
    assert trapezoid(*roc_curve(scores, positive)) == pytest.approx(want, abs=1e-12)
    for k in range(len(rows) + 1):
        assert recall_at(scores, positive, k) == found_by_hand(scores, positive, k)


def test_auc_known_values() -> None:
    positive = np.array([False, False, True, True])
    assert roc_auc([1, 2, 3, 4], positive) == 1.0
    assert roc_auc([4, 3, 2, 1], positive) == 0.0
    assert roc_auc([1, 3, 2, 4], positive) == 0.75
    assert roc_auc([5, 5, 5, 5], positive) == 0.5
    assert roc_auc([0.0, 1.0, -0.0, 1.0], positive) == 0.5


def test_auc_ignores_scale_and_turns_with_the_sign() -> None:
    scores, positive = draw(9, 50, 8)
    auc = roc_auc(scores, positive)
    assert roc_auc(np.exp(scores), positive) == auc
    assert roc_auc(-scores, positive) == pytest.approx(1.0 - auc, abs=1e-12)
    assert roc_auc(scores.astype(np.float32), positive) == auc


def test_rows_are_scored_apart() -> None:
    rng = np.random.default_rng(3)
    scores = rng.integers(0, 5, (6, 40)) * 1.0
    positive = rng.random((6, 40)) < np.linspace(0.1, 0.8, 6)[:, None]
    auc, recall, own = (
        roc_auc_rows(scores, positive),
        recall_rows(scores, positive, k=7),
        recall_rows(scores, positive),
    )
    assert auc.shape == recall.shape == own.shape == (6,)
    for i in range(6):
        assert auc[i] == pytest.approx(pairwise_auc(scores[i], positive[i]), abs=1e-12)
        assert recall[i] == found_by_hand(scores[i], positive[i], 7)
        assert own[i] == found_by_hand(scores[i], positive[i], int(positive[i].sum()))


@pytest.mark.parametrize(("seed", "n", "levels"), CASES)
def test_roc_curve_has_exactly_the_reachable_points(seed: int, n: int, levels: int) -> None:
    scores, positive = draw(seed, n, levels)
    thresholds = sorted(set(scores.tolist()), reverse=True)
    want = [(0.0, 0.0)] + [
        (float(np.mean(scores[~positive] >= t)), float(np.mean(scores[positive] >= t)))
        for t in thresholds
    ]
    fpr, tpr = roc_curve(scores, positive)
    np.testing.assert_allclose(np.stack([fpr, tpr], axis=1), want, atol=1e-12)
    assert trapezoid(fpr, tpr) == pytest.approx(pairwise_auc(scores, positive), abs=1e-12)


@pytest.mark.parametrize("points", [2, 3, 10, 200])
def test_long_roc_curve_is_thinned_but_keeps_its_ends_and_area(points: int) -> None:
    rng = np.random.default_rng(11)
    positive = rng.random(3000) < 0.2
    scores = rng.normal(size=3000) + 1.5 * positive
    fpr, tpr = roc_curve(scores, positive, points=points)
    full = set(zip(*(a.tolist() for a in roc_curve(scores, positive, points=5000)), strict=True))
    assert len(full) == 3001
    assert points / 2 < fpr.size <= points
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert set(zip(fpr.tolist(), tpr.tolist(), strict=True)) <= full
    # Skipped vertices lie within one step of 2 / (points - 1) along the curve.
    gap = abs(trapezoid(fpr, tpr) - roc_auc(scores, positive))
    assert gap <= 1.0 / (points - 1)


@pytest.mark.parametrize(("seed", "n", "levels"), CASES)
def test_detection_curve_is_the_recall_at_every_depth(seed: int, n: int, levels: int) -> None:
    scores, positive = draw(seed, n, levels)
    x, y = detection_curve(scores, positive, points=500)
    np.testing.assert_allclose(x, np.arange(n + 1) / n, atol=1e-15)
    assert y.tolist() == [found_by_hand(scores, positive, k) for k in range(n + 1)]


def test_detection_area_is_tied_to_the_auc() -> None:
    rng = np.random.default_rng(5)
    positive = rng.permutation(500) < 100
    scores = rng.permutation(500) + 120.5 * positive
    x, y = detection_curve(scores, positive, points=501)
    assert trapezoid(x, y) == pytest.approx(0.1 + 0.8 * roc_auc(scores, positive), abs=1e-12)
    few, found = detection_curve(scores, positive, points=6)
    assert few.tolist() == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert found[1] == recall_at(scores, positive, 100)
    assert found[0] == 0.0
    assert found[-1] == 1.0
    # Depths 10/3 and 20/3 go to the nearest whole row.
    assert detection_curve(scores[:10], np.arange(10) < 4, points=4)[0].tolist() == [0, 0.3, 0.7, 1]


def test_equal_scores_are_taken_in_index_order() -> None:
    positive = np.array([False, True, False, True, True])
    assert [recall_at(np.ones(5), positive, k) for k in range(6)] == [
        0.0, 0.0, 1 / 3, 1 / 3, 2 / 3, 1.0,
    ]  # fmt: skip
    assert recall_at([1.0, 1.0, 2.0, 1.0, 2.0], positive, 2) == 1 / 3


def test_mean_sd_uses_the_divisor_n() -> None:
    mean, sd = mean_sd([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert sd == pytest.approx(math.sqrt(14 / 9))
    assert mean_sd(np.array([0.75])) == (0.75, 0.0)


BOTH = np.array([True, False, True])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: roc_auc([1.0, 2.0, 3.0], np.array([True] * 3)), "only one class"),
        (lambda: roc_auc([1.0, 2.0, 3.0], np.array([False] * 3)), "only one class"),
        (lambda: roc_auc([], np.array([], dtype=bool)), "only one class"),
        (lambda: roc_auc_rows(np.ones((2, 3)), np.array([BOTH, [True] * 3])), "only one class"),
        (lambda: roc_curve([1.0, 2.0, 3.0], np.array([True] * 3)), "only one class"),
        (lambda: roc_auc([1.0, math.nan, 3.0], BOTH), "NaN"),
        (lambda: recall_at([1.0, math.nan, 3.0], BOTH, 1), "NaN"),
        (lambda: detection_curve([1.0, math.nan, 3.0], BOTH), "NaN"),
        (lambda: roc_auc([1.0, 2.0], BOTH), r"\(2,\).*\(3,\)"),
        (lambda: roc_auc(np.ones((1, 3)), BOTH[None]), r"shape \(n,\)"),
        (lambda: roc_auc_rows(np.ones(3), BOTH), r"shape \(m, n\)"),
        (lambda: roc_auc([1.0, 2.0, 3.0], np.array([1, 0, -1])), "boolean"),
        (lambda: recall_at([1.0, 2.0, 3.0], BOTH, 4), "between 0 and the 3 rows, but is 4"),
        (lambda: recall_at([1.0, 2.0, 3.0], BOTH, -1), "between 0 and the 3 rows"),
        (lambda: recall_at([1.0, 2.0, 3.0], ~BOTH & BOTH, 1), "at least one positive"),
        (lambda: detection_curve([1.0, 2.0, 3.0], ~BOTH & BOTH), "at least one positive"),
        (lambda: detection_curve([1.0, 2.0, 3.0], BOTH, points=1), "at least 2"),
        (lambda: roc_curve([1.0, 2.0, 3.0], BOTH, points=1), "at least 2"),
        (lambda: mean_sd([]), "at least one value"),
        (lambda: mean_sd([1.0, math.inf]), "finite"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

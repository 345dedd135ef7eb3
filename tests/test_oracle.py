"""The oracle judged by itself: independent derivations agree, and influence predicts retraining."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests import oracle

RNG_SEED = 20
# fp64 against fp64: the peer of every comparison is the unit roundoff times the condition number.
ROUNDOFF = np.finfo(np.float64).eps


def random(*shape: int, seed: int = RNG_SEED) -> oracle.Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def assert_equal_up_to_roundoff(
    actual: oracle.Array, expected: oracle.Array, condition: float = 1.0
) -> None:
    expected = np.asarray(expected)
    scale = max(np.max(np.abs(expected)), ROUNDOFF)
    assert np.max(np.abs(actual - expected)) <= 100 * ROUNDOFF * condition * scale


# --- per-sample algebra -------------------------------------------------------------------------


def test_gradient_is_the_matrix_product_of_its_factors() -> None:
    delta, act = random(2, 3, 5, 4), random(2, 3, 5, 6)
    assert_equal_up_to_roundoff(
        oracle.per_sample_grad(delta, act), np.swapaxes(delta, -1, -2) @ act
    )


def test_pairwise_dot_agrees_with_the_token_form() -> None:
    factors = random(3, 5, 4), random(3, 5, 6), random(2, 7, 4), random(2, 7, 6)
    assert_equal_up_to_roundoff(
        oracle.pairwise_dot(*factors), oracle.pairwise_dot_by_tokens(*factors)
    )


def test_norms_are_the_diagonal_of_pairwise_dots() -> None:
    delta, act = random(4, 5, 3), random(4, 5, 2)
    pairs = oracle.pairwise_dot(delta, act, delta, act)
    assert_equal_up_to_roundoff(oracle.per_sample_norm_sq(delta, act), np.diag(pairs))


def test_dots_with_the_gradients_themselves_are_pairwise_dots() -> None:
    delta, act = random(4, 5, 3), random(4, 5, 2)
    grads = oracle.per_sample_grad(delta, act)
    pairs = oracle.pairwise_dot(delta, act, delta, act)
    assert_equal_up_to_roundoff(oracle.per_sample_dot(delta, act, grads), pairs)
    assert_equal_up_to_roundoff(oracle.per_sample_dot(delta, act, grads[1]), pairs[:, 1])


# --- curvature and damping ----------------------------------------------------------------------


def test_gfim_of_one_row_samples_is_the_flattened_fisher() -> None:
    grads = random(7, 1, 5)
    assert_equal_up_to_roundoff(oracle.gfim(grads), oracle.fisher(oracle.flatten(grads)))


def test_gfim_sides_are_each_other_on_transposed_gradients() -> None:
    grads = random(7, 3, 5)
    assert_equal_up_to_roundoff(
        oracle.gfim(grads, "rows"), oracle.gfim(np.swapaxes(grads, 1, 2), "cols")
    )


@pytest.mark.parametrize("kind", ["cols", "rows", "flat"])
def test_every_curvature_has_the_mean_squared_norm_as_trace(kind: str) -> None:
    grads = random(7, 3, 5)
    trace = np.trace(oracle.curvature(grads, kind))
    assert_equal_up_to_roundoff(trace, np.sum(grads**2) / 7)


def test_datainf_damping_is_a_tenth_of_the_mean_eigenvalue_of_the_flat_fisher() -> None:
    grads = random(7, 3, 5)
    by_entries = oracle.Damping(datainf=0.1).of(grads, "cols")
    by_trace = oracle.Damping(trace=0.1).of(grads, "flat")
    assert by_entries == pytest.approx(by_trace, rel=100 * ROUNDOFF)


@pytest.mark.parametrize(("kind", "size"), [("cols", 5), ("rows", 3), ("flat", 15)])
def test_damping_rules_add(kind: str, size: int) -> None:
    grads = random(7, 3, 5)
    squares = np.sum(grads**2)
    expected = 0.1 * squares / (7 * 15) + 0.02 + 0.3 * squares / (7 * size)
    combined = oracle.Damping(datainf=0.1, absolute=0.02, trace=0.3).of(grads, kind)
    assert combined == pytest.approx(expected, rel=100 * ROUNDOFF)


# --- methods ------------------------------------------------------------------------------------


def problem(n: int = 8, m: int = 3, r: int = 2, d: int = 4) -> tuple[oracle.Array, oracle.Array]:
    return random(n, r, d, seed=1), random(m, r, d, seed=2)


def test_datainf_loop_is_the_mean_of_explicit_inverses() -> None:
    grads, queries = problem()
    rows, flat = oracle.flatten(grads), oracle.flatten(queries)
    lam = oracle.Damping(datainf=0.1).of(grads, "flat")
    condition = 1 + np.max(np.sum(rows**2, axis=1)) / lam
    assert_equal_up_to_roundoff(
        oracle.datainf(flat, rows, lam), oracle.datainf_by_inverses(flat, rows, lam), condition
    )


@pytest.mark.parametrize("n", [3, 20], ids=["n<D", "n>D"])
def test_exact_scores_agree_with_their_gram_form(n: int) -> None:
    grads, queries = problem(n=n)
    rows, flat = oracle.flatten(grads), oracle.flatten(queries)
    lam = oracle.Damping(datainf=0.1).of(grads, "flat")
    direct = -oracle.exact(flat, rows, lam) @ rows.T
    condition = 1 + np.linalg.norm(oracle.fisher(rows), 2) / lam
    assert_equal_up_to_roundoff(direct, oracle.exact_scores_by_gram(flat, rows, lam), condition)


def test_one_training_row_makes_datainf_exact() -> None:
    grads, queries = problem(n=1)
    rows, flat = oracle.flatten(grads), oracle.flatten(queries)
    assert_equal_up_to_roundoff(
        oracle.datainf(flat, rows, 0.1), oracle.exact(flat, rows, 0.1), 1 + np.sum(rows**2) / 0.1
    )


@pytest.mark.parametrize("steps", [1, 10, 200])
def test_lissa_iteration_agrees_with_its_filter(steps: int) -> None:
    grads, queries = problem()
    rows, flat = oracle.flatten(grads), oracle.flatten(queries)
    scale = 1 / (np.trace(oracle.fisher(rows)) + 0.1)
    iterated = oracle.lissa(flat, rows, 0.1, scale, steps)
    filtered = oracle.lissa_by_filter(flat, rows, 0.1, scale, steps)
    assert_equal_up_to_roundoff(iterated, filtered, condition=steps)


def test_lissa_converges_to_exact() -> None:
    grads, queries = problem()
    rows, flat = oracle.flatten(grads), oracle.flatten(queries)
    lam = 0.5
    scale = 1 / (np.trace(oracle.fisher(rows)) + lam)
    steps = int(40 / (scale * lam))  # (1 - s lam)^steps < exp(-40)
    assert_equal_up_to_roundoff(
        oracle.lissa_by_filter(flat, rows, lam, scale, steps),
        oracle.exact(flat, rows, lam),
        1 / (scale * lam),
    )


@pytest.mark.parametrize("r", [1, 3], ids=["r=1", "r=3"])
def test_hyperinf_on_columns_is_the_exact_method_with_a_block_diagonal_fisher(r: int) -> None:
    grads, queries = problem(r=r)
    lam = 0.1
    matrix = np.kron(np.eye(r), oracle.gfim(grads)) + lam * np.eye(r * 4)
    expected = np.linalg.solve(matrix, oracle.flatten(queries).T).T.reshape(queries.shape)
    condition = 1 + np.trace(oracle.gfim(grads)) / lam
    assert_equal_up_to_roundoff(oracle.hyperinf(queries, grads, lam), expected, condition)


def test_hyperinf_on_rows_is_columns_on_transposed_gradients() -> None:
    grads, queries = problem()
    turned = oracle.hyperinf(np.swapaxes(queries, 1, 2), np.swapaxes(grads, 1, 2), 0.1, "cols")
    condition = 1 + np.trace(oracle.gfim(grads)) / 0.1
    assert_equal_up_to_roundoff(
        oracle.hyperinf(queries, grads, 0.1, "rows"), np.swapaxes(turned, 1, 2), condition
    )


@pytest.mark.parametrize("steps", [0, 1, 5, 15, 30])
@pytest.mark.parametrize("lam", [1e-3, 1.0, 300.0])
def test_published_iteration_agrees_with_its_filter(steps: int, lam: float) -> None:
    matrix = oracle.damped(oracle.gfim(problem()[0]), lam)
    condition = np.linalg.cond(matrix) * max(steps, 1)
    assert_equal_up_to_roundoff(
        oracle.paper_inverse(matrix, steps, 5e-5),
        oracle.paper_inverse_by_filter(matrix, steps, 5e-5),
        condition,
    )


@pytest.mark.parametrize(
    ("mu", "steps", "gain"),
    [
        (1e-6, 15, 1.638),
        (1e-6, 20, 52.4),
        (1e-6, 30, 5.23e4),
        (1e-4, 30, 9.95e3),
        (1e-2, 15, 1.625),
        (1e-2, 20, 40.8),
        (1e-2, 30, 100),
        (0.1, 15, 1.511),
        (0.1, 20, 9.95),
        (1.0, 15, 0.806),
        (1.0, 20, 1.0),
        (0.0, 15, 5e-5 * 2**15),
        (2e4, 1, 1 / 2e4),
        (3e4, 30, 1 / 3e4),
    ],
)
def test_published_gain_has_the_tabulated_value(mu: float, steps: int, gain: float) -> None:
    # The table prints three or four digits; the last rows are the limits mu = 0 and a mu >= 1.
    assert oracle.paper_filter(np.array([mu]), steps, 5e-5)[0] == pytest.approx(gain, rel=2e-3)


def test_published_iteration_diverges_beyond_two_over_start() -> None:
    gains = np.abs(oracle.paper_filter(np.array([3.9e4, 4.1e4]), 30, 5e-5))
    assert gains[0] == pytest.approx(1 / 3.9e4)
    assert not gains[1] < 1e6


# --- signs and what the number means ------------------------------------------------------------


METHODS: dict[str, dict[str, float]] = {
    "grad_dot": {},
    "datainf": {},
    "exact": {},
    "lissa": {"scale": 0.01, "steps": 50},
    "hyperinf": {},
    "hyperinf_paper": {"steps": 30},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_training_point_helps_itself_and_its_negation_harms(method: str) -> None:
    grads, _ = problem()
    query = np.stack([grads[3], -grads[3]])
    options = {"block": METHODS[method]}
    scores = oracle.influence({"block": grads}, {"block": query}, method, options=options)
    assert scores[0, 3] < 0 < scores[1, 3]


@pytest.mark.parametrize("method", ["datainf", "exact", "hyperinf"])
def test_scaling_every_loss_leaves_relatively_damped_scores_alone(method: str) -> None:
    grads, queries = problem()
    one = oracle.influence({"block": grads}, {"block": queries}, method)
    ten = oracle.influence({"block": 10 * grads}, {"block": 10 * queries}, method)
    assert_equal_up_to_roundoff(ten, one, condition=1e3)


def test_block_scores_add() -> None:
    grads, queries = problem()
    wide, wide_queries = problem(d=6)
    one = oracle.influence({"a": grads}, {"a": queries}, "hyperinf")
    other = oracle.influence({"b": wide}, {"b": wide_queries}, "hyperinf")
    both = oracle.influence({"a": grads, "b": wide}, {"a": queries, "b": wide_queries}, "hyperinf")
    assert_equal_up_to_roundoff(both, one + other)


@pytest.mark.parametrize("outputs", [1, 3], ids=["exact", "hyperinf"])
def test_influence_predicts_leave_one_out_retraining(outputs: int) -> None:
    """Ridge regression whose curvature is the GFIM by construction, retrained n times.

    Residuals of unit norm at the optimum make mean(g^T g) equal to the Hessian: exactly for one
    output (the flattened Fisher too), and per output row for several.
    """
    n, d, ridge = 200, 4, 0.3
    x = random(n, d, seed=3)
    residuals = random(n, outputs, seed=4)
    residuals /= np.linalg.norm(residuals, axis=1, keepdims=True)
    theta = -residuals.T @ x / (n * ridge)  # makes the gradient of the full objective zero
    y = x @ theta.T - residuals
    hessian = x.T @ x / n + ridge * np.eye(d)
    normal = y.T @ x / n
    np.testing.assert_allclose(theta, np.linalg.solve(hessian, normal.T).T, rtol=1e-9)

    x_query, y_query = random(5, d, seed=5), random(5, outputs, seed=6)

    def query_losses(parameters: oracle.Array) -> oracle.Array:
        return 0.5 * np.sum((x_query @ parameters.T - y_query) ** 2, axis=1)

    grads = np.stack([np.outer(e, row) for e, row in zip(residuals, x, strict=True)])
    errors = x_query @ theta.T - y_query
    queries = np.stack([np.outer(e, row) for e, row in zip(errors, x_query, strict=True)])
    method = "exact" if outputs == 1 else "hyperinf"
    scores = oracle.influence({"w": grads}, {"w": queries}, method, oracle.Damping(absolute=ridge))

    actual = np.zeros((5, n))
    for k in range(n):
        without = np.linalg.solve(
            hessian - np.outer(x[k], x[k]) / n, (normal - np.outer(y[k], x[k]) / n).T
        ).T
        actual[:, k] = query_losses(without) - query_losses(theta)
    predicted = -scores / n
    slope = np.vdot(predicted, actual) / np.vdot(predicted, predicted)
    assert slope == pytest.approx(1, abs=0.05)  # leverage of one point in 200 is about d / n
    assert np.corrcoef(predicted.ravel(), actual.ravel())[0, 1] > 0.995

    eps = 1e-6  # up-weighting: the derivative that the score is defined as, not only its estimate
    k = 17
    moved = np.linalg.solve(
        hessian + eps * np.outer(x[k], x[k]), (normal + eps * np.outer(y[k], x[k])).T
    ).T
    slope_at_zero = (query_losses(moved) - query_losses(theta)) / eps
    np.testing.assert_allclose(slope_at_zero, scores[:, k], rtol=1e-4)


# --- helpers ------------------------------------------------------------------------------------


def test_spd_has_the_requested_spectrum() -> None:
    spectrum = np.geomspace(1e-2, 1.0, 6)
    np.testing.assert_allclose(np.linalg.eigvalsh(oracle.spd(spectrum, seed=0)), spectrum)


@pytest.mark.parametrize("kappa", [1e2, 1e6, 1e10], ids="kappa={:g}".format)
def test_refined_inverse_is_exact_up_to_the_extended_roundoff(kappa: float) -> None:
    """A reflection with entries of one half and powers of two: A and its inverse are exact."""
    basis = np.eye(4) - 0.5 * np.ones((4, 4))
    mu = np.array([1.0, 0.5, 0.25, 2.0 ** -round(np.log2(kappa))])
    matrix, inverse = basis * mu @ basis, basis * (1 / mu) @ basis
    tolerance = 4 * ROUNDOFF + 4 * float(np.finfo(np.longdouble).eps) * kappa
    np.testing.assert_allclose(oracle.inverse(matrix), inverse, rtol=tolerance)
    v = random(3, 4)
    gap = np.abs(oracle.solve(matrix, v) - v @ inverse)
    assert gap.max() <= tolerance * np.abs(v @ inverse).max()


def test_residuals_of_a_scaled_inverse_are_the_scale_error() -> None:
    matrix = np.stack([oracle.spd(np.geomspace(0.1, 1.0, 4), seed=s) for s in range(3)])
    scales = np.array([1.0, 1.1, 0.5])
    inverse = np.linalg.inv(matrix) * scales[:, None, None]
    expected = np.abs(1 - scales)
    np.testing.assert_allclose(oracle.inverse_residual(matrix, inverse), expected, atol=1e-13)
    v = random(3, 2, 4)
    np.testing.assert_allclose(oracle.solve_residual(matrix, v, v @ inverse), expected, atol=1e-13)


def test_angle_is_exact_for_small_and_right_angles() -> None:
    assert oracle.angle([1, 0], [0, 2]) == pytest.approx(90)
    assert oracle.angle([1, 0], [3, 3e-9]) == pytest.approx(np.degrees(1e-9))


@pytest.mark.parametrize("bad", [1.0 + 1e-5, np.nan], ids=["off", "nan"])
def test_comparison_rejects_what_is_worse_than_the_peer(bad: float) -> None:
    with pytest.raises(AssertionError):
        oracle.assert_as_exact_as([bad], [1.0], [1.0 + 1e-7], k=4, floor=1e-7)


def test_comparison_accepts_what_is_as_good_as_the_peer() -> None:
    oracle.assert_as_exact_as([1.0 + 2e-7], [1.0], [1.0 + 1e-7], k=4, floor=0.0)


@pytest.mark.parametrize(
    ("message", "names"),
    [
        ("act has shape (3, 5)", True),
        ("delta is [2, 4], act is [3, 5]", True),
        ("act must be 3-D", False),
        ("activation has shape (3, 5)", False),
        ("act has shape (3, 5, 1)", False),
    ],
)
def test_naming_asks_for_the_argument_and_its_shape(message: str, names: bool) -> None:
    assert bool(re.search(oracle.naming({"act": (3, 5)}), message)) == names

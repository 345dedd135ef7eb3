"""schulz_inverse, spd_inverse and schulz_solve: accuracy, certificates, bounds and fallbacks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperinf_kernels as hk
from hyperinf_kernels.ops.solve import BOUND, ESTIMATE, OF_ESTIMATE
from tests import oracle

# A Newton-Schulz inverse in plain fp32 ends 2 to 3 times above LAPACK's error (the residual
# floor is about u * condition for both); one more factor of 3 for the worst of few entries.
K = 8.0
# Reported and recomputed residuals are both rounded; they may differ where they are all noise.
RESIDUAL_K = 4.0

Inverse = Callable[..., Any]
INVERSES: list[Any] = [
    pytest.param(lambda a, **o: hk.schulz_inverse(a, **o), id="schulz_inverse"),
    pytest.param(lambda a, **o: hk.spd_inverse(a, **o), id="spd_inverse auto"),
    pytest.param(lambda a, **o: hk.spd_inverse(a, method="direct", **o), id="spd_inverse direct"),
    pytest.param(lambda a, **o: hk.spd_inverse(a, method="schulz", **o), id="spd_inverse schulz"),
]
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float64, torch.float64, id="fp64"),
]
SPECTRA: dict[str, Callable[[float, int], oracle.Array]] = {
    "log-uniform": lambda kappa, d: np.geomspace(1 / kappa, 1, d),
    "low rank plus damping": lambda kappa, d: np.r_[
        np.full(d - d // 4, 1 / kappa), np.ones(d // 4)
    ],
    "one large eigenvalue": lambda kappa, d: np.r_[np.full(d - 1, 1 / kappa), 1.0],
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def spd(
    kappa: float,
    d: int,
    *,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    spectrum: str = "log-uniform",
    seed: int = 0,
) -> torch.Tensor:
    matrix = scale * oracle.spd(SPECTRA[spectrum](kappa, d), seed)
    return torch.from_numpy(matrix).to(dtype)


def stack(kappas: list[float], d: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.stack([spd(kappa, d, dtype=dtype, seed=i) for i, kappa in enumerate(kappas)])


def lapack_peer(a: torch.Tensor, v: torch.Tensor, expected: oracle.Array) -> torch.Tensor:
    """V A^-1 by LU and by Cholesky in the type of `a`: the less exact of the two."""
    by_lu = torch.linalg.solve(a, v, left=False)
    factor, failed = torch.linalg.cholesky_ex(a)
    by_cholesky = torch.cholesky_solve(v.mT, factor).mT
    peers = [by_lu] if failed.any() else [by_lu, by_cholesky]
    return max(peers, key=lambda peer: np.abs(oracle.f64(peer) - expected).max(initial=0))


def assert_inverse_exact(actual: torch.Tensor, a: torch.Tensor, acc: torch.dtype) -> None:
    assert_matches(actual, a, torch.eye(a.shape[-1]).expand_as(a), oracle.inverse(a), acc)


def assert_solve_exact(
    actual: torch.Tensor, a: torch.Tensor, v: torch.Tensor, acc: torch.dtype
) -> None:
    assert_matches(actual, a, v, oracle.solve(a, v), acc)


def assert_matches(
    actual: torch.Tensor,
    a: torch.Tensor,
    v: torch.Tensor,
    expected: oracle.Array,
    acc: torch.dtype,
) -> None:
    assert actual.dtype == acc
    peer = lapack_peer(a.to(acc), v.to(acc), expected)
    oracle.assert_as_exact_as(actual, expected, peer, k=K, floor=8 * torch.finfo(acc).eps)


def assert_residual_honest(info: Any, recomputed: oracle.Array, a: torch.Tensor) -> None:
    """What is measured is what anyone measures, in both directions; a bound is one."""
    reported, known = oracle.f64(info.residual), info.known.numpy()
    noise = 8 * np.finfo(np.float64).eps * np.linalg.cond(oracle.f64(a))
    assert reported.shape == recomputed.shape == known.shape
    k = np.select([known == BOUND, known == ESTIMATE], [1.0, OF_ESTIMATE], RESIDUAL_K)
    assert (recomputed <= k * reported + noise).all()
    assert (reported <= RESIDUAL_K * recomputed + noise)[known != BOUND].all()


def assert_measured(info: Any, recomputed: oracle.Array, a: torch.Tensor) -> None:
    assert info.residual_by == "measured"
    assert_residual_honest(info, recomputed, a)


# --- inverses: values ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6], ids="kappa={:g}".format)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("inverse", INVERSES)
def test_inverse_is_as_exact_as_lapack(
    inverse: Inverse, spectrum: str, kappa: float, dtype: torch.dtype, acc: torch.dtype
) -> None:
    a = spd(kappa, 24, dtype=dtype, spectrum=spectrum)
    assert_inverse_exact(inverse(a), a, acc)


@pytest.mark.parametrize("d", [1, 2, 3, 17, 64], ids="d={}".format)
@pytest.mark.parametrize("inverse", INVERSES)
def test_every_size_is_served(inverse: Inverse, d: int) -> None:
    a = spd(50.0, d)
    assert_inverse_exact(inverse(a), a, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("inverse", INVERSES)
def test_low_precision_matrices_are_inverted_in_fp32(inverse: Inverse, dtype: torch.dtype) -> None:
    a = spd(10.0, 12, dtype=dtype)
    assert_inverse_exact(inverse(a), a, torch.float32)


@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e8], ids="A x {:g}".format)
@pytest.mark.parametrize("inverse", INVERSES)
def test_scale_of_the_matrix_does_not_matter(inverse: Inverse, scale: float) -> None:
    a = spd(100.0, 12, scale=scale)
    assert_inverse_exact(inverse(a), a, torch.float32)


@pytest.mark.parametrize("inverse", INVERSES)
def test_batches_of_unequal_condition_are_inverted_one_by_one(inverse: Inverse) -> None:
    kappas = [1.0, 30.0, 1e3, 1e5, 2.0, 1e2]
    a = stack(kappas, 10).reshape(2, 3, 10, 10)
    actual, info = inverse(a, return_info=True)
    for index in np.ndindex(2, 3):
        assert_inverse_exact(actual[index], a[index], torch.float32)
    assert info.residual.shape == info.converged.shape == (2, 3)
    assert info.converged.dtype == torch.bool
    assert_residual_honest(info, oracle.inverse_residual(a, actual), a)


@pytest.mark.parametrize("inverse", INVERSES)
def test_empty_batch_gives_an_empty_batch(inverse: Inverse) -> None:
    actual, info = inverse(torch.zeros(0, 5, 5), return_info=True)
    assert actual.shape == (0, 5, 5)
    assert info.residual.shape == info.converged.shape == (0,)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.mT, id="transposed"),
        pytest.param(lambda t: t.repeat_interleave(2, dim=-1)[..., ::2], id="strided"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded"),
        pytest.param(lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0), id="batch last"),
    ],
)
@pytest.mark.parametrize("inverse", INVERSES)
def test_memory_layout_does_not_change_values(
    inverse: Inverse, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    a = view(stack([10.0, 100.0, 20.0], 6))
    kept = a.clone()
    assert_inverse_exact(inverse(a), a, torch.float32)
    assert torch.equal(a, kept)


@pytest.mark.parametrize("inverse", INVERSES)
def test_inverses_repeat_bit_for_bit(inverse: Inverse) -> None:
    a = stack([10.0, 1e4], 20)
    assert torch.equal(inverse(a), inverse(a))


@settings(derandomize=True, max_examples=25, deadline=None)
@given(d=st.integers(1, 12), exponent=st.floats(0, 5), seed=st.integers(0, 99))
def test_any_spectrum_is_inverted(d: int, exponent: float, seed: int) -> None:
    spectrum = 10.0 ** (-exponent * np.random.default_rng(seed).random(d))
    a = torch.from_numpy(oracle.spd(spectrum, seed)).float()
    assert_inverse_exact(hk.schulz_inverse(a), a, torch.float32)
    assert_inverse_exact(hk.spd_inverse(a), a, torch.float32)


# --- the certificate ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kappa", [10.0, 1e3, 1e6], ids="kappa={:g}".format)
@pytest.mark.parametrize("inverse", INVERSES)
def test_info_reports_the_residual_that_the_result_has(
    inverse: Inverse, kappa: float, dtype: torch.dtype
) -> None:
    a = spd(kappa, 24, dtype=dtype)
    actual, info = inverse(a, return_info=True)
    assert info.residual.shape == info.converged.shape == ()
    assert_residual_honest(info, oracle.inverse_residual(a, actual), a)
    assert bool(info.converged)
    assert info.fallback is None
    assert info.precision == "ieee"
    assert info.backend


def test_info_names_the_method_that_ran() -> None:
    a = spd(10.0, 8)
    assert hk.schulz_inverse(a, return_info=True)[1].method == "schulz"
    assert hk.spd_inverse(a, method="direct", return_info=True)[1].method == "direct"
    assert hk.spd_inverse(a, method="schulz", return_info=True)[1].method == "schulz"


@pytest.mark.parametrize(
    ("kappa", "published", "target"),
    [
        pytest.param(1e2, 48, 8, id="kappa=1e2"),
        pytest.param(1e4, 62, 13, id="kappa=1e4"),
        pytest.param(1e6, 76, 19, id="kappa=1e6"),
    ],
)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_chebyshev_steps_need_a_fraction_of_the_published_products(
    spectrum: str, kappa: float, published: int, target: int
) -> None:
    """`target`: best chain with a free first step; one more product certifies the result."""
    a = spd(kappa, 32, dtype=torch.float64, spectrum=spectrum)
    actual, info = hk.schulz_inverse(a, bounds=(1 / kappa, 1.0), tol=1e-6, return_info=True)
    assert oracle.inverse_residual(a, actual) <= 1e-6
    assert info.fallback is None
    assert info.products <= target + 1 < published / 3
    assert 0 < info.iterations < info.products


def test_every_tolerance_is_met_and_a_looser_one_costs_less() -> None:
    a = spd(1e3, 24, dtype=torch.float64)
    products = []
    for tol in (1e-2, 1e-6, 1e-11):
        actual, info = hk.schulz_inverse(a, tol=tol, return_info=True)
        assert oracle.inverse_residual(a, actual) <= tol
        assert bool(info.converged)
        products.append(info.products)
    assert products[0] < products[1] < products[2]


def test_fp32_reaches_a_residual_below_its_own_noise_by_refinement() -> None:
    """Plain fp32 steps and fp32 Cholesky both end near 5e-6 at this condition."""
    a = spd(1e2, 48)
    plain = oracle.inverse_residual(a, torch.linalg.inv(a))
    actual, info = hk.schulz_inverse(a, tol=1e-6, return_info=True)
    assert oracle.inverse_residual(a, actual) <= 1e-6 < plain
    assert bool(info.converged)


def test_unreachable_tolerance_is_never_claimed_and_the_attainable_one_is_named() -> None:
    a = torch.stack([spd(3.0, 16), spd(1e6, 16)])
    actual, info = hk.schulz_inverse(a, tol=1e-6, return_info=True)
    recomputed = oracle.inverse_residual(a, actual)
    assert info.converged.tolist() == [True, False]
    assert recomputed[0] <= 1e-6 < recomputed[1]
    assert_residual_honest(info, recomputed, a)
    figures = [float(x) for x in re.findall(r"\d\.\d+e-\d+", info.fallback)]
    assert any(x == pytest.approx(recomputed[1], rel=0.5) for x in figures), info.fallback


def test_tolerance_below_the_roundoff_of_the_type_is_refused_with_that_figure() -> None:
    with pytest.raises(ValueError, match=r"tol.*6\.0e-08"):
        hk.schulz_inverse(spd(10.0, 6), tol=1e-12)


@pytest.mark.parametrize("operation", ["inverse", "solve"])
def test_result_with_and_without_info_is_the_same(operation: str) -> None:
    a, v = spd(1e3, 12), random(2, 12)
    op = hk.schulz_inverse if operation == "inverse" else hk.schulz_solve
    args = (a,) if operation == "inverse" else (a, v)
    assert torch.equal(op(*args), op(*args, return_info=True)[0])


# --- bounds and fallbacks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        pytest.param(1.0, 1.0, id="exact"),
        pytest.param(0.1, 1.0, id="lower 10 x too small"),
        pytest.param(10.0, 1.0, id="lower 10 x too large"),
        pytest.param(1.0, 2.0, id="upper 2 x too large"),
        pytest.param(1e-3, 1e3, id="both loose by 1000"),
    ],
)
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
def test_loose_bounds_cost_products_not_accuracy(
    lower: float, upper: float, dtype: torch.dtype, acc: torch.dtype
) -> None:
    a = spd(1e3, 20, dtype=dtype)
    actual, info = hk.schulz_inverse(a, bounds=(lower * 1e-3, upper), return_info=True)
    assert_inverse_exact(actual, a, acc)
    assert info.fallback is None


@pytest.mark.parametrize("operation", ["inverse", "solve"])
@pytest.mark.parametrize(
    ("share", "must_fall_back"),
    [
        pytest.param(0.99, False, id="1 % short"),  # low-degree steps may still recover
        pytest.param(0.5, True, id="half"),
        pytest.param(0.01, True, id="1 % of it"),
    ],
)
def test_upper_bound_below_the_spectrum_still_gives_the_right_answer(
    share: float, must_fall_back: bool, operation: str
) -> None:
    """Schulz diverges there, so the answer must come from elsewhere and the info must say so."""
    a, v = spd(1e3, 20, spectrum="one large eigenvalue"), random(3, 20)
    bounds = (1e-3, share)
    if operation == "inverse":
        actual, info = hk.schulz_inverse(a, bounds=bounds, return_info=True)
        assert_inverse_exact(actual, a, torch.float32)
    else:
        actual, info = hk.schulz_solve(a, v, bounds=bounds, return_info=True)
        assert_solve_exact(actual, a, v, torch.float32)
    assert bool(info.converged)
    assert info.fallback or not must_fall_back


def test_bounds_may_differ_by_matrix() -> None:
    kappas = [10.0, 1e4]
    a = stack(kappas, 12, torch.float64)
    lower = torch.tensor([1 / kappa for kappa in kappas], dtype=torch.float64)
    upper = torch.ones(2, dtype=torch.float64)
    actual, info = hk.schulz_inverse(a, bounds=(lower, upper), return_info=True)
    assert_inverse_exact(actual[0], a[0], torch.float64)
    assert_inverse_exact(actual[1], a[1], torch.float64)
    assert info.fallback is None


def test_one_bad_matrix_of_a_batch_falls_back_and_leaves_the_others_alone() -> None:
    a = torch.stack([spd(10.0, 8, seed=1), spd(10.0, 8, scale=1e3, seed=2), spd(10.0, 8, seed=3)])
    actual, info = hk.schulz_inverse(a, bounds=(0.1, 1.0), return_info=True)
    for index in range(3):
        assert_inverse_exact(actual[index], a[index], torch.float32)
    assert info.converged.all()
    assert info.fallback


@pytest.mark.parametrize("budget", [2, 6], ids="max_products={}".format)
@pytest.mark.parametrize("operation", ["inverse", "solve"])
def test_product_budget_is_kept_and_the_rest_is_solved_directly(
    budget: int, operation: str
) -> None:
    a, v = spd(1e4, 16), random(3, 16)
    options = {"bounds": (1e-4, 1.0), "max_products": budget, "return_info": True}
    if operation == "inverse":
        actual, info = hk.schulz_inverse(a, **options)
        assert_inverse_exact(actual, a, torch.float32)
    else:
        actual, info = hk.schulz_solve(a, v, **options)
        assert_solve_exact(actual, a, v, torch.float32)
    assert info.products <= budget
    assert info.fallback


# --- solves -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e6], ids="kappa={:g}".format)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_solve_is_as_exact_as_lapack(
    spectrum: str, kappa: float, dtype: torch.dtype, acc: torch.dtype
) -> None:
    a, v = spd(kappa, 24, dtype=dtype, spectrum=spectrum), random(5, 24, dtype=dtype)
    actual, info = hk.schulz_solve(a, v, return_info=True)
    assert_solve_exact(actual, a, v, acc)
    assert info.residual.shape == ()
    assert_residual_honest(info, oracle.solve_residual(a, v, actual), a)
    assert bool(info.converged)


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6], ids="kappa={:g}".format)
def test_thin_refinement_reaches_fp32_accuracy_at_any_condition(kappa: float) -> None:
    """fp32 Cholesky ends near u * condition; refinement against fp64 residuals does not."""
    a, v = spd(kappa, 32), random(2, 32)
    actual = oracle.f64(hk.schulz_solve(a, v))
    expected = oracle.solve(a, v)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert error <= 8 * torch.finfo(torch.float32).eps


def test_solve_spends_fewer_products_than_the_inverse() -> None:
    a, v = spd(1e4, 32, dtype=torch.float64), random(2, 32, dtype=torch.float64)
    bounds = (1e-4, 1.0)
    solve = hk.schulz_solve(a, v, bounds=bounds, return_info=True)[1]
    inverse = hk.schulz_inverse(a, bounds=bounds, return_info=True)[1]
    assert solve.products < inverse.products


@pytest.mark.parametrize("m", [1, 3, 30], ids="m={}".format)
@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=["one", "batch", "nested batch"])
def test_solve_takes_any_number_of_rows_and_leading_dims(lead: tuple[int, ...], m: int) -> None:
    count = math.prod(lead)
    a = stack([10.0, 1e3, 30.0, 100.0][:count], 8).reshape(*lead, 8, 8)
    v = random(*lead, m, 8)
    actual, info = hk.schulz_solve(a, v, return_info=True)
    assert_solve_exact(actual, a, v, torch.float32)
    assert info.residual.shape == info.converged.shape == lead
    assert_residual_honest(info, oracle.solve_residual(a, v, actual), a)


@pytest.mark.parametrize(
    ("lead", "m", "d"),
    [
        pytest.param((), 0, 5, id="no rows"),
        pytest.param((0,), 2, 5, id="no matrices"),
        pytest.param((3,), 0, 5, id="batch without rows"),
    ],
)
def test_solve_for_nothing_is_empty(lead: tuple[int, ...], m: int, d: int) -> None:
    a = torch.eye(d).expand(*lead, d, d)
    actual, info = hk.schulz_solve(a, torch.zeros(*lead, m, d), return_info=True)
    assert actual.shape == (*lead, m, d)
    assert info.residual.shape == info.converged.shape == lead
    assert info.converged.all()


def test_solve_for_a_zero_row_is_zero() -> None:
    a, v = spd(100.0, 8), random(3, 8)
    v[1] = 0
    assert torch.equal(hk.schulz_solve(a, v)[1], torch.zeros(8))
    zero, info = hk.schulz_solve(a, torch.zeros(2, 8), return_info=True)
    assert torch.equal(zero, torch.zeros(2, 8))
    assert bool(info.converged)


@pytest.mark.parametrize(
    ("of_a", "of_v", "acc"),
    [
        pytest.param(torch.float32, torch.bfloat16, torch.float32, id="fp32, bf16"),
        pytest.param(torch.float32, torch.float64, torch.float64, id="fp32, fp64"),
        pytest.param(torch.float64, torch.float32, torch.float64, id="fp64, fp32"),
    ],
)
def test_solve_promotes_mixed_types(of_a: torch.dtype, of_v: torch.dtype, acc: torch.dtype) -> None:
    a, v = spd(10.0, 8, dtype=of_a), random(3, 8, dtype=of_v)
    assert_solve_exact(hk.schulz_solve(a, v), a, v, acc)


def test_solve_takes_strided_rows() -> None:
    a, v = spd(100.0, 8).mT, random(8, 3).mT
    assert_solve_exact(hk.schulz_solve(a, v), a, v, torch.float32)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("inverse", [*INVERSES, pytest.param(None, id="schulz_solve")])
def test_matrix_that_is_not_finite_is_refused_by_its_index(
    inverse: Inverse | None, value: float
) -> None:
    a = stack([10.0] * 4, 3)
    a[2, 0, 0] = value
    with pytest.raises(ValueError, match=r"\bA\b.*\b2\b"):
        hk.schulz_solve(a, torch.ones(4, 1, 3)) if inverse is None else inverse(a)


def test_rows_that_are_not_finite_are_refused_by_their_index() -> None:
    v = torch.ones(4, 1, 3)
    v[2] = math.nan
    with pytest.raises(ValueError, match=r"\bV\b.*\b2\b"):
        hk.schulz_solve(stack([10.0] * 4, 3), v)


@pytest.mark.parametrize(
    "spectrum",
    [
        pytest.param([-1.0, -2.0, -3.0], id="negative definite"),
        pytest.param([1.0, 2.0, -0.5], id="indefinite"),
        pytest.param([0.0, 0.0, 0.0], id="zero"),
    ],
)
@pytest.mark.parametrize("inverse", [*INVERSES, pytest.param(None, id="schulz_solve")])
def test_matrix_that_is_not_positive_definite_is_refused_by_its_index(
    inverse: Inverse | None, spectrum: list[float]
) -> None:
    a = stack([10.0] * 4, 3)
    a[2] = torch.from_numpy(oracle.spd(spectrum, seed=0))
    with pytest.raises(ValueError, match=r"(?=.*positive definite)(?=.*\b2\b)"):
        hk.schulz_solve(a, torch.ones(4, 1, 3)) if inverse is None else inverse(a)


@pytest.mark.parametrize("inverse", INVERSES)
def test_single_matrix_that_is_not_positive_definite_is_refused(inverse: Inverse) -> None:
    with pytest.raises(ValueError, match="positive definite"):
        inverse(-torch.eye(3))


@pytest.mark.parametrize("inverse", INVERSES)
def test_asymmetric_matrix_is_refused(inverse: Inverse) -> None:
    with pytest.raises(ValueError, match="symmetric"):
        inverse(torch.tensor([[2.0, 1.0], [0.0, 2.0]]))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("inverse", INVERSES)
def test_matrix_that_is_not_square_is_refused_by_shape(
    inverse: Inverse, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=oracle.naming({"A": shape})):
        inverse(torch.zeros(shape))


@pytest.mark.parametrize(
    ("a", "v"),
    [
        pytest.param((3, 3), (2, 4), id="d differs"),
        pytest.param((3, 3), (3,), id="V one-dimensional"),
        pytest.param((2, 3, 3), (4, 1, 3), id="batches differ"),
        pytest.param((3, 4), (2, 4), id="A not square"),
    ],
)
def test_solve_refuses_shapes_by_name(a: tuple[int, ...], v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=oracle.naming({"A": a, "V": v})):
        hk.schulz_solve(torch.eye(a[-2], a[-1]).expand(a), torch.ones(v))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: t.long(), id="int64"),
        pytest.param(lambda t: t.to(torch.complex64), id="complex"),
        pytest.param(lambda t: t.tolist(), id="list"),
    ],
)
@pytest.mark.parametrize("inverse", INVERSES)
def test_unsupported_matrix_is_refused_by_name(
    inverse: Inverse, make: Callable[[torch.Tensor], object]
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\bA\b"):
        inverse(make(torch.eye(3)))


def test_operands_on_two_devices_are_refused_by_name() -> None:
    with pytest.raises((TypeError, ValueError), match=r"\bV\b"):
        hk.schulz_solve(torch.eye(3), torch.ones(1, 3, device="meta"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("bounds", (-1.0, 1.0), id="negative lower bound"),
        pytest.param("bounds", (0.0, 1.0), id="zero lower bound"),
        pytest.param("bounds", (2.0, 1.0), id="bounds reversed"),
        pytest.param("bounds", (0.1, math.inf), id="infinite upper bound"),
        pytest.param("bounds", (math.nan, 1.0), id="nan bound"),
        pytest.param("bounds", (torch.ones(5), torch.ones(5)), id="bounds of another batch"),
        pytest.param("tol", -1e-3, id="negative tol"),
        pytest.param("tol", 0.0, id="zero tol"),
        pytest.param("tol", math.nan, id="nan tol"),
        pytest.param("max_products", 0, id="no products"),
        pytest.param("precision", "fp8", id="unknown precision"),
    ],
)
@pytest.mark.parametrize("operation", ["inverse", "solve"])
def test_bad_options_are_refused_by_name(operation: str, name: str, value: object) -> None:
    args = (torch.eye(3),) if operation == "inverse" else (torch.eye(3), torch.ones(2, 3))
    op = hk.schulz_inverse if operation == "inverse" else hk.schulz_solve
    with pytest.raises(ValueError, match=name):
        op(*args, **{name: value})


def test_unknown_inverse_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"(?=.*method)(?=.*magic)"):
        hk.spd_inverse(torch.eye(3), method="magic")

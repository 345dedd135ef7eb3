"""Schulz steps at the optimum: counted products, bounds, precisions, and thousands of spectra."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hyperinf_kernels as hk
from hyperinf_kernels.ops import bounds, reference, rounding, schedule
from hyperinf_kernels.ops.solve import inverse_floor
from tests import oracle, spectra

EPS32 = float(np.finfo(np.float32).eps)
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"}


class Products(TorchDispatchMode):
    """Counts matrix products by the sizes they really had, in units of one d x d x d product."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d, self.counted = d, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in PRODUCTS:
            left, right = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            flops = left.numel() * right.shape[-1]
            if left.shape[-1] == self.d and right.shape[-1] == self.d:
                self.counted += flops / self.d**3
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(d: int) -> Iterator[Products]:
    with Products(d) as products:
        yield products


def spd(kappa: float, d: int, kind: str = "log-uniform", seed: int = 0) -> torch.Tensor:
    mu = {
        "log-uniform": np.geomspace(1 / kappa, 1, d),
        "75 % at the damping": np.r_[np.full(d - d // 4, 1 / kappa), np.geomspace(0.1, 1, d // 4)],
        "both ends": np.r_[np.full(d // 2, 1 / kappa), np.ones(d - d // 2)],
    }[kind]
    return torch.from_numpy(oracle.spd(mu, seed))


# --- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kappa", "most"), [(1e2, 8), (1e4, 13), (1e6, 19)])
@pytest.mark.parametrize("kind", ["log-uniform", "75 % at the damping", "both ends"])
def test_products_to_a_residual_of_1e_6_counted_as_they_run(
    kind: str, kappa: float, most: int
) -> None:
    """The certificate is one product more, and is all that comes on top."""
    d = 96
    a = spd(kappa, d, kind)
    with counting(d) as seen:
        x, info = hk.schulz_inverse(a, bounds=(1 / kappa, 1.0), tol=1e-6, return_info=True)
    assert oracle.inverse_residual(a, x) <= 1e-6
    assert info.products == round(seen.counted) == seen.counted
    assert seen.counted - 1 <= most


def test_thin_queries_need_fewer_dense_products_than_an_inverse() -> None:
    d = 96
    a, v = spd(1e6, d), torch.randn(2, d, dtype=torch.float64)
    with counting(d) as seen:
        w, info = hk.schulz_solve(a, v, bounds=(1e-6, 1.0), tol=1e-9, return_info=True)
    assert oracle.solve_residual(a, v, w) <= 1e-9
    # thin products have 2 rows of 96; the dense ones are what is left
    assert info.products == int(seen.counted) <= 16


def test_coupled_steps_share_a_product_and_restart() -> None:
    """From a start far off, every round of steps spends two products a step and one to certify."""
    d = 64
    a = spd(30.0, d)
    with counting(d) as seen:
        x, info = hk.schulz_inverse(a, bounds=(1 / 30, 1.0), tol=1e-9, return_info=True)
    assert info.products == seen.counted
    # a lower bound that is 200 times too large leaves the tail most of the work
    with counting(d) as loose:
        y, late = hk.schulz_inverse(a, bounds=(0.99, 1.0), tol=1e-9, return_info=True)
    assert late.products == loose.counted > info.products
    assert late.fallback is None
    for inverse in (x, y):
        assert oracle.inverse_residual(a, inverse) <= 1e-9


@pytest.mark.parametrize("degree", range(2, 400, 7))
def test_no_cheaper_chain_exists(degree: int) -> None:
    """Against every chain of up to seven steps."""
    best: dict[int, int] = {1: 0}
    for _ in range(7):
        for total, cost in list(best.items()):
            for q, products in schedule.PRODUCTS.items():
                reach = min(total * q, 400)
                best[reach] = min(best.get(reach, 99), cost + products)
    chain = schedule.cheapest_chain(degree)
    assert np.prod(chain) >= degree
    spent = sum(schedule.PRODUCTS[q] for q in chain)
    assert spent == min(cost for total, cost in best.items() if total >= degree)


# --- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_upper_bounds_are_never_below_the_spectrum(seed: int) -> None:
    for batch in spectra.matrices(150, seed):
        A = torch.from_numpy(batch)
        mu = np.linalg.eigvalsh(batch)
        lower = torch.from_numpy(np.maximum(mu[:, 0], 0) * (1 - 1e-9))
        ritz = bounds.lanczos(A)
        for upper in (
            bounds.upper_bound(A),
            bounds.upper_bound(A, lower),
            bounds.upper_bound(A, ritz=ritz),
            bounds.upper_bound(A, lower, ritz),
        ):
            assert (oracle.f64(upper) >= mu[:, -1]).all()
            assert (oracle.f64(upper) <= batch.trace(axis1=1, axis2=2) * (1 + 1e-9)).all()


def test_lanczos_bounds_are_near_the_top_where_trace_and_norms_are_not() -> None:
    """A damped low-rank matrix of 400 rows: its trace is 21 times its top eigenvalue."""
    draw = np.random.default_rng(0)
    d, rank = 400, 40
    Y = draw.standard_normal((rank, d)) * np.geomspace(1, 0.05, rank)[:, None]
    batch = (Y.T @ Y + 1e-3 * np.eye(d))[None]
    A, top = torch.from_numpy(batch), np.linalg.eigvalsh(batch)[0, -1]
    lower = torch.tensor([1e-3], dtype=torch.float64)
    cheap = float(bounds.upper_bound(A, lower))
    tight = float(bounds.upper_bound(A, lower, bounds.lanczos(A)))
    assert top <= tight <= 1.05 * top < cheap / 1.3


def test_a_flat_top_is_bounded_by_the_probabilistic_margin() -> None:
    """Half the eigenvalues at the top: nothing deflates, so 1.36 x is what k = 32 can promise."""
    d = 600
    A = spd(50.0, d, "both ends")[None]
    tight = float(bounds.upper_bound(A, ritz=bounds.lanczos(A)))
    assert 1 <= tight <= 1.4 < float(bounds.upper_bound(A)) / 2


def damped_low_rank(d: int, damping: float, seed: int) -> torch.Tensor:
    """What a LoRA block's GFIM looks like: a third of the directions seen, the rest damped only."""
    draw = np.random.default_rng(seed)
    mu = np.zeros(d)
    mu[: d // 3] = draw.standard_normal(d // 3) ** 2 * np.geomspace(1, 1e-2, d // 3)
    return torch.from_numpy(oracle.spd(mu / mu.max() + damping, seed))


@pytest.mark.parametrize("damping", [1e-3, 1e-5])
def test_the_damping_is_seen_where_many_directions_have_nothing_else(damping: float) -> None:
    A = torch.stack([damped_low_rank(150, damping, seed) for seed in range(3)])
    found = oracle.f64(bounds.lower_estimate(A))
    assert (found >= damping / 4).all()
    assert (found <= damping).all()
    # so bounds from Lanczos steps are worth nearly as much as the true ones
    V = torch.randn(3, 2, 150, dtype=torch.float64)
    ritz = bounds.lanczos(A)
    seen = (bounds.lower_estimate(A, ritz), bounds.upper_bound(A, ritz=ritz))
    given = hk.schulz_solve(A, V, bounds=(damping, 1 + damping), return_info=True)[1]
    by_lanczos = hk.schulz_solve(A, V, bounds=seen, return_info=True)[1]
    assert by_lanczos.products <= given.products + 2
    # steps chosen one by one need no more than a few more, and no Lanczos steps
    assert hk.schulz_solve(A, V, return_info=True)[1].products <= given.products + 6


@pytest.mark.parametrize("kappa", [1e3, 1e4, 1e5, 1e6], ids="kappa={:g}".format)
@pytest.mark.parametrize("kind", ["log-uniform", "75 % at the damping", "both ends", "low rank"])
def test_fp32_needs_no_direct_result_without_bounds(kind: str, kappa: float) -> None:
    for seed, d in enumerate((48, 120, 190)):
        a = damped_low_rank(d, 1 / kappa, seed) if kind == "low rank" else spd(kappa, d, kind, seed)
        v = torch.randn(1, d, generator=torch.Generator().manual_seed(seed))
        _, info = hk.schulz_inverse(a.float(), return_info=True)
        w, solved = hk.schulz_solve(a.float(), v, return_info=True)
        assert info.fallback is solved.fallback is None
        assert bool(info.converged)
        truth = oracle.solve(a.float(), v)
        assert np.linalg.norm(oracle.f64(w) - truth) <= 8 * EPS32 * np.linalg.norm(truth)


@pytest.mark.parametrize("kappa", [3e10, 3e11])
def test_fp64_solves_need_no_direct_result_either(kappa: float) -> None:
    """One direction far above the rest, on which A X = I + small and X A = I + not small."""
    mu = np.r_[1.0, np.full(15, 1 / kappa) * np.linspace(1, 2, 15)]
    a = torch.from_numpy(np.stack([oracle.spd(mu, seed) for seed in range(6)]))
    v = torch.randn(6, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, info = hk.schulz_solve(a, v, return_info=True)
    assert info.fallback is None
    assert info.converged.all()
    for i in range(6):
        peer = torch.linalg.solve(a[i], v[i], left=False)
        oracle.assert_as_exact_as(w[i], oracle.solve(a[i], v[i]), peer, k=8.0, floor=1e-6)


def test_a_system_at_rest_does_not_stop_the_others_of_its_batch() -> None:
    """Some are as exact as fp64 gets while others still gain by every thin step."""
    a = torch.stack([spd(kappa, 24, seed=i) for i, kappa in enumerate([1, 1.5, 30, 200, 900, 1e4])])
    v = torch.randn(6, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, info = hk.schulz_solve(a, v, precision="tf32", return_info=True)
    assert info.lowered.tolist() == [True] * 5 + [False]
    assert info.fallback is None
    for i in range(6):
        peer = torch.linalg.solve(a[i], v[i], left=False)
        oracle.assert_as_exact_as(w[i], oracle.solve(a[i], v[i]), peer, k=4.0, floor=1e-14)


@pytest.mark.parametrize("given", [(1e-14, 1.0), (1e-8, 1.0), (1e-8, 1e3)])
def test_bounds_as_loose_as_you_like_cost_fp32_products_only(given: tuple[float, float]) -> None:
    """A chain for condition x roundoff over 1 would grow; `iteration.chain` plans none."""
    a, v = spd(1e4, 96).float(), torch.randn(2, 96)
    near = hk.schulz_inverse(a, bounds=(1e-4, 1.0), return_info=True)[1]
    x, info = hk.schulz_inverse(a, bounds=given, return_info=True)
    w, solved = hk.schulz_solve(a, v, bounds=given, return_info=True)
    assert info.fallback is solved.fallback is None
    assert near.products < info.products
    oracle.assert_as_exact_as(x, oracle.inverse(a), torch.linalg.inv(a), k=4.0, floor=1e-6)
    truth = oracle.solve(a, v)
    assert np.linalg.norm(oracle.f64(w) - truth) <= 8 * EPS32 * np.linalg.norm(truth)


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("tf32", 10), ("bf16", 7)])
def test_operands_are_rounded_to_nearest_even_with_the_bits_of_the_format(
    name: str, bits: int
) -> None:
    draw = np.random.default_rng(0)
    x = np.r_[draw.standard_normal(1000) * 10.0 ** draw.uniform(-30, 30, 1000), 0.0, 1.0]
    # halfway cases, to both sides of even
    ulp = 2.0**-bits
    x = np.r_[x, 1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2, 2 - ulp / 2].astype(np.float32)
    mantissa, exponent = np.frexp(x.astype(np.float64))
    expected = np.ldexp(np.rint(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)
    rounded = getattr(rounding, name)(torch.from_numpy(x))
    np.testing.assert_array_equal(oracle.f64(rounded), expected)
    worst = np.abs(expected - x)[x != 0] / np.abs(x)[x != 0]
    assert worst.max() <= rounding.ROUNDOFF[name]


def test_three_passes_of_tf32_are_as_good_as_their_roundoff() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(80, 80, generator=generator) for _ in range(2))
    expected = oracle.f64(a) @ oracle.f64(b)
    scale = np.abs(oracle.f64(a)) @ np.abs(oracle.f64(b))
    errors = {
        name: (np.abs(oracle.f64(product(a, b)) - expected) / scale).max()
        for name, product in rounding.PRODUCT.items()
    }
    for name, error in errors.items():
        assert error <= 2 * rounding.ROUNDOFF[name] + np.finfo(np.float32).eps
    assert errors["tf32x3"] < errors["tf32"] / 100 < errors["bf16"] / 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
def test_a_low_precision_start_ends_as_exact_as_a_plain_one(
    precision: Any, dtype: torch.dtype
) -> None:
    kappa = {"tf32x3": 1e4, "tf32": 800.0, "bf16": 100.0}[precision]
    a = spd(kappa, 80).to(dtype)
    bounds_given = (1 / kappa, 1.0)
    with hk.trace_backends() as log:
        x, info = hk.schulz_inverse(a, bounds=bounds_given, precision=precision, return_info=True)
    assert "rounding.schulz_rounded" in [plan.kernel for plan in log]
    assert info.precision == precision
    assert bool(info.lowered)
    assert info.fallback is None
    plain = hk.schulz_inverse(a, bounds=bounds_given)
    oracle.assert_as_exact_as(
        x, oracle.inverse(a), plain, k=4.0, floor=8 * float(torch.finfo(dtype).eps)
    )


@pytest.mark.parametrize(("precision", "kappa"), [("tf32", 5e3), ("bf16", 600.0)])
def test_where_roundoff_times_condition_reaches_one_the_own_dtype_runs(
    precision: Any, kappa: float
) -> None:
    a = spd(kappa, 40).float()
    with hk.trace_backends() as log:
        _, info = hk.schulz_inverse(
            a, bounds=(1 / kappa, 1.0), precision=precision, return_info=True
        )
    assert len(log) == 1
    assert log[0].kernel.endswith(".schulz")
    assert info.precision == "ieee"
    assert not bool(info.lowered)


def test_the_law_is_kept_matrix_by_matrix() -> None:
    a = torch.stack([spd(20.0, 24), spd(1e5, 24), spd(100.0, 24)]).float()
    lower = torch.tensor([1 / 20, 1e-5, 1e-2], dtype=torch.float64)
    x, info = hk.schulz_inverse(a, bounds=(lower, 1.0), precision="bf16", return_info=True)
    assert info.lowered.tolist() == [True, False, True]
    assert info.converged.all()
    assert not info.replaced.any()
    for i in range(3):
        peer = torch.linalg.inv(a[i])
        oracle.assert_as_exact_as(x[i], oracle.inverse(a[i]), peer, k=8.0, floor=1e-6)


def test_a_low_start_that_grows_is_run_again_in_the_own_dtype() -> None:
    """Bounds that promise condition 100 where it is 1e4, so that bf16 is let in and fails."""
    a = torch.stack([spd(1e4, 64), spd(10.0, 64)]).float()
    lower = torch.tensor([1e-2, 1e-1], dtype=torch.float64)
    x, info = hk.schulz_inverse(a, bounds=(lower, 1.0), precision="bf16", return_info=True)
    assert info.lowered.tolist() == [False, True]
    assert info.converged.all()
    assert not info.replaced.any()
    for i in range(2):
        peer = torch.linalg.inv(a[i])
        oracle.assert_as_exact_as(x[i], oracle.inverse(a[i]), peer, k=8.0, floor=1e-6)


def test_divergence_is_seen_matrix_by_matrix() -> None:
    a = torch.stack([spd(50.0, 20, seed=i) * scale for i, scale in enumerate((1, 40, 1, 1e3))])
    x, info = hk.schulz_inverse(a, bounds=(1 / 50, 1.0), return_info=True)
    assert info.replaced.tolist() == [False, True, False, True]
    assert "2 of 4 matrices" in info.fallback
    for i in range(4):
        assert oracle.inverse_residual(a[i], x[i]) <= 1e-12
        assert float(info.residual[i]) <= 1e-12


def test_the_scale_of_a_matrix_changes_nothing_but_the_scale_of_its_inverse() -> None:
    a = spd(1e3, 20).float()
    for power in (-60, 40):
        x = hk.schulz_inverse(a * 2.0**power, bounds=(1e-3 * 2.0**power, 2.0**power))
        torch.testing.assert_close(
            x * 2.0**power, hk.schulz_inverse(a, bounds=(1e-3, 1.0)), rtol=0, atol=0
        )


@pytest.mark.parametrize("power", [-200, 200])
def test_fp64_scales_beyond_fp32_do_not_keep_a_start_from_running_there(power: int) -> None:
    a, v = spd(300.0, 24), torch.randn(2, 24, dtype=torch.float64)
    scale = 2.0**power
    x, info = hk.schulz_inverse(a * scale, precision="tf32", return_info=True)
    w, solved = hk.schulz_solve(a * scale, v, return_info=True)
    assert bool(info.lowered)
    assert info.fallback is solved.fallback is None
    assert oracle.inverse_residual(a, x * scale) <= 1e-12
    assert oracle.solve_residual(a, v, w * scale) <= 1e-13


@pytest.mark.parametrize(
    ("of_a", "of_v"), [(1.0, 1e-170), (1.0, 1e200), (1e-200, 1e-200), (1e250, 1e100)]
)
def test_fp64_scales_whose_squares_leave_fp64_are_solved_and_judged(
    of_a: float, of_v: float
) -> None:
    a, v = spd(1e3, 24) * of_a, torch.randn(3, 24, dtype=torch.float64) * of_v
    w, info = hk.schulz_solve(a, v, return_info=True)
    assert info.fallback is None
    assert bool(info.converged)
    true = oracle.solve_residual(oracle.f64(a) / of_a, oracle.f64(v) / of_v,
                                 oracle.f64(w) / of_v * of_a)  # fmt: skip
    assert true <= 1e-12
    assert float(info.residual) == pytest.approx(true, rel=1)


def test_a_solution_beyond_its_dtype_is_refused() -> None:
    a, v = spd(10.0, 8), torch.randn(2, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"solution of A overflows torch.float64; rescale A or V"):
        hk.schulz_solve(a * 1e-200, v * 1e200)
    stack = torch.stack([a, a * 1e-30]).float()
    with pytest.raises(ValueError, match=r"solution of A\[1\] overflows torch.float32"):
        hk.schulz_solve(stack, torch.stack([v, v * 1e20]).float())


def test_a_direct_result_is_judged_by_its_own_floor() -> None:
    """An upper bound of half the spectrum, so that the first result is far off or not finite."""
    a = torch.from_numpy(oracle.spd(np.r_[1e-6, np.ones(19)], 0))
    v = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, info = hk.schulz_solve(a, v, bounds=(1e-6, 0.5), return_info=True)
    assert bool(info.replaced)
    assert bool(info.converged)
    assert oracle.solve_residual(a, v, w) <= 1e-9


# --- it never lies and never diverges ------------------------------------------------------------


def test_spectra_of_every_kind_in_every_precision_keep_the_promises() -> None:
    """The lean part; `python -m tests.spectra` does 10,000."""
    for precision, total in spectra.run(400, seed=5).items():
        promises = {k: total[k] for k in ("lies", "false_claims", "unflagged")}
        assert not any(promises.values()), (precision, total)
        # both outcomes are common, or nothing was tested
        assert total["converged"] > 500
        assert total["replaced"] > 50
        assert (total["lowered"] > 100) == (precision != "ieee")


def test_the_judge_of_spectra_sees_a_lie_a_false_claim_and_a_missing_flag() -> None:
    A = np.stack([np.diag([1.0, 2.0, 4.0])] * 3)
    X = np.stack([np.diag([1.0, 0.5, 0.25])] * 3)
    X[1, 0, 0] = 1.1
    eye = np.broadcast_to(np.eye(3), A.shape)
    residual = torch.tensor([0.0, 0.1 / 3**0.5, 0.0], dtype=torch.float64)

    def verdict(residual: torch.Tensor, converged: list[bool]) -> Counter[str]:
        info = hk.SolveInfo(
            "schulz", "torch", "ieee", 1, 1, residual, torch.tensor(converged), None,
            torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool),
        )  # fmt: skip
        return spectra.judge(A, eye, X, info, 1e-3)

    assert verdict(residual, [True, False, True])["unflagged"] == 1
    assert verdict(residual, [True, True, True])["false_claims"] == 1
    assert verdict(torch.zeros(3, dtype=torch.float64), [True] * 3)["lies"] == 1


def test_matrices_that_rounding_made_indefinite_are_refused() -> None:
    refused = 0
    for batch in spectra.matrices(60, seed=2):
        for A in batch.astype(np.float32):
            mu = np.linalg.eigvalsh(A.astype(np.float64))
            if mu[0] < -1e-9 * mu[-1]:
                with pytest.raises(ValueError, match="positive definite"):
                    hk.schulz_inverse(torch.from_numpy(A))
                refused += 1
    assert refused > 5


def test_reference_products_can_be_exchanged() -> None:
    """What `schulz_rounded` rests on: every product of a chain goes through the given function."""
    a = spd(1e4, 32)
    start, steps = schedule.plan_steps(
        torch.tensor(1e-4).double(), torch.tensor(1.0).double(), 1e-6
    )
    calls = []

    def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x @ y

    with counting(32) as seen:
        _, products = reference.schulz(a, start, steps, product)
    assert len(calls) == products == seen.counted == 13


def test_the_floor_of_large_entries_is_that_of_their_condition() -> None:
    eye = torch.eye(32)
    floor = inverse_floor(3e37 * (eye + 1), (eye - 1 / 33) / 3e37)
    assert float(floor) < 1e-3

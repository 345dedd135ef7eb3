"""The compiled batched Schulz steps against the same steps in numpy fp64, on every path."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import reference, schedule
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads, worst
from tests.oracle import Array

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
# largest error <= K x largest error of the same steps in torch fp32, plus a few roundings
K = 3.0
FLOOR = 16 * np.finfo(np.float32).eps
DEGREES = [(2,), (3,), (5,), (9,), (2, 3), (5, 9), (9, 2, 3, 5)]


def spd(batch: int, d: int, kappa: float = 100.0) -> torch.Tensor:
    basis = np.linalg.qr(random(batch, d, d, dtype=torch.float64).numpy())[0]
    values = np.geomspace(1 / kappa, 1, d)
    return torch.from_numpy((basis * values) @ basis.swapaxes(-1, -2)).float()


def planned(
    A: torch.Tensor, degrees: tuple[int, ...], kappa: float = 100.0
) -> tuple[torch.Tensor, list[schedule.Step]]:
    """The start and the steps of these degrees for matrices of this condition."""
    lower = torch.linspace(0.9, 1.0, len(A), dtype=torch.float64) / kappa
    e = (1 - lower) / (1 + lower)
    steps = []
    for degree in degrees:
        coefficients, e = schedule._STEPS[degree](e)
        steps.append(schedule.Step(degree, coefficients))
    return 2 / (1 + lower), steps


def polynomial(A: torch.Tensor, start: torch.Tensor, degrees: tuple[int, ...], kappa: float
               ) -> Array:  # fmt: skip
    """What the steps must give: eigenvalue by eigenvalue, (1 - T_n(r/e) / T_n(1/e)) / mu in fp64.

    n is the product of the degrees, r = 1 - start mu and e the bound of |r|.
    """
    values, vectors = np.linalg.eigh(A.double().numpy())
    s = start.numpy()[:, None]
    lower = 2 / s - 1
    e = (1 - lower) / (1 + lower)
    n = int(np.prod(degrees))
    x = (1 - s * values) / e
    inside = np.cos(n * np.arccos(np.clip(x, -1, 1)))
    outside = np.sign(x) ** n * np.cosh(n * np.arccosh(np.maximum(np.abs(x), 1)))
    chebyshev = np.where(np.abs(x) <= 1, inside, outside)
    residual = chebyshev / np.cosh(n * np.arccosh(1 / e))
    return (vectors * ((1 - residual) / values)[:, None, :]) @ vectors.swapaxes(-1, -2)


def run(A: torch.Tensor, start: torch.Tensor, steps: list[schedule.Step]) -> torch.Tensor:
    """The face of the kernel, without the plan that would choose torch."""
    from hyperinf_kernels.ops import cpu

    X, products = cpu.schulz(A, start.float(), steps)
    assert products == reference.schulz(A[:1], start.float()[:1], first(steps))[1]
    return X


def first(steps: list[schedule.Step]) -> list[schedule.Step]:
    return [
        schedule.Step(s.degree, {k: c[:1].float() for k, c in s.coefficients.items()})
        for s in steps
    ]


def narrow(steps: list[schedule.Step]) -> list[schedule.Step]:
    return [
        schedule.Step(s.degree, {k: c.float() for k, c in s.coefficients.items()}) for s in steps
    ]


@pytest.mark.parametrize("degrees", DEGREES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 7, 16, 17, 33, 64])
def test_any_chain_is_its_chebyshev_polynomial(d: int, degrees: tuple[int, ...]) -> None:
    A = spd(5, d)
    start, steps = planned(A, degrees)
    expected = polynomial(A, start, degrees, 100.0)
    peer, _ = reference.schulz(A, start.float(), narrow(steps))
    bound = K * worst(peer, expected) + FLOOR * np.abs(expected).max()
    assert worst(run(A, start, narrow(steps)), expected) <= bound


@pytest.mark.parametrize("d", [3, 8, 15, 31, 32, 48, 65, 100, 127, 128])
def test_any_side_reaches_the_inverse(d: int) -> None:
    A = spd(3, d)
    start, steps = planned(A, (9, 9, 3))
    expected = np.linalg.inv(A.double().numpy())
    peer, _ = reference.schulz(A, start.float(), narrow(steps))
    bound = K * worst(peer, expected) + FLOOR * np.abs(expected).max()
    assert worst(run(A, start, narrow(steps)), expected) <= bound


def test_no_steps_give_the_start_and_an_empty_batch_nothing() -> None:
    A = spd(2, 5)
    start = torch.tensor([0.5, 2.0])
    assert torch.equal(run(A, start, []), start[:, None, None] * torch.eye(5))
    assert run(A[:0], start[:0], []).shape == (0, 5, 5)


def test_layout_threads_and_place_in_the_batch_do_not_change_a_bit() -> None:
    A = spd(11, 20)
    start, steps = planned(A, (5, 3))
    steps = narrow(steps)
    with threads(1):
        plain = run(A, start, steps)
    views = [shifted(A), A.repeat_interleave(2, 0)[::2], A.mT.contiguous().mT]
    for view in views:
        with threads(2):
            assert torch.equal(run(view, start, steps), plain)
    order = torch.arange(10, -1, -1)
    turned = [
        schedule.Step(s.degree, {k: c[order] for k, c in s.coefficients.items()}) for s in steps
    ]
    assert torch.equal(run(A[order], start[order], turned), plain[order])


def test_nan_stays_in_its_matrix() -> None:
    A = spd(5, 20)
    start, steps = planned(A, (5, 3))
    clean = run(A, start, narrow(steps))
    A[2, 3, 4] = torch.nan
    spoiled = run(A, start, narrow(steps))
    keep = torch.arange(5) != 2
    assert spoiled[2].isnan().any()
    assert torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.eye(3), torch.ones(1), torch.ones(1, 1, 8), [2]), "A must have 3 dimensions"),
        ((torch.ones(1, 129, 129), torch.ones(1), torch.ones(1, 1, 8), [2]), "at most 128"),
        ((torch.ones(1, 2, 3), torch.ones(1), torch.ones(1, 1, 8), [2]), "square matrices"),
        ((torch.ones(1, 3, 3), torch.ones(2), torch.ones(1, 1, 8), [2]), "start must hold one"),
        ((torch.ones(1, 3, 3), torch.ones(1), torch.ones(1, 2, 8), [2]), "coefficients must be"),
        ((torch.ones(1, 3, 3), torch.ones(1), torch.ones(1, 1, 8), [-2]), "degrees must be 2, 3"),
    ],
    ids=["dims", "size", "square", "start", "coefficients", "degrees"],
)
def test_the_raw_op_refuses_by_name(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hyperinf.schulz(*args)


def test_faces_run_on_the_kernel_and_say_so() -> None:
    A = spd(6, 24).reshape(2, 3, 24, 24)
    with on_cpu_kernels("schulz_adaptive"):
        X, info = hk.schulz_inverse(A, return_info=True)
        hk.schulz_solve(A, random(2, 3, 4, 24))
    assert info.backend == "cpu"
    assert bool(info.converged.all())
    expected = np.linalg.inv(A.double().numpy())
    assert worst(X, expected) <= 1e-4 * np.abs(expected).max()

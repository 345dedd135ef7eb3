"""The Triton Schulz kernels against inverses in numpy fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.ops import reference, schedule
from hyperinf_kernels.ops.schedule import Step
from hyperinf_kernels.ops.triton import entry as face
from tests import oracle
from tests.triton_cases import (
    DEVICE,
    EPS,
    INTERPRETING,
    Allocations,
    FewPrograms,
    on_device,
    poisoned,
    random,
    spd,
)
from tests.triton_cases import allocations as allocations
from tests.triton_cases import through_the_dispatcher as through_the_dispatcher

pytestmark = on_device()
# largest error <= K x largest error of the same chain in torch fp32, plus a few roundings
K, FLOOR = 2.0, 4 * EPS


def plan(batch: int, condition: float, target: float = 1e-6) -> tuple[Tensor, list[Step]]:
    lower = torch.full((batch,), 1 / condition, dtype=torch.float64, device=DEVICE)
    # every matrix gets its own scalars
    upper = torch.linspace(1.0, 1.5, batch, dtype=torch.float64, device=DEVICE)
    start, steps = schedule.plan_steps(lower, upper, target)
    return start.float(), [
        Step(s.degree, {k: c.float() for k, c in s.coefficients.items()}) for s in steps
    ]


def of_degrees(*degrees: int, batch: int, e: float) -> tuple[Tensor, list[Step]]:
    """A chain of given degrees for spectra in [(1 - e) / 2, (1 + e) / 2]."""
    width = torch.full((batch,), e, dtype=torch.float64)
    steps = []
    for degree in degrees:
        coefficients, width = schedule._STEPS[degree](width)
        steps.append(Step(degree, {k: c.float().to(DEVICE) for k, c in coefficients.items()}))
    return torch.full((batch,), 2.0, device=DEVICE), steps


@pytest.mark.parametrize("d", [1, 5, 16, 20, 32, 33, 64, 100, 128, 130])
@pytest.mark.parametrize("condition", [3.0, 1e4], ids=["kappa3", "kappa1e4"])
def test_any_size_is_as_exact_as_torch(d: int, condition: float, allocations: Allocations) -> None:
    batch = 1 if d > 64 else 3
    A = spd(batch, d, condition)
    start, steps = plan(batch, condition)
    X, products = face.schulz(poisoned(A), start, steps)
    peer, peer_products = reference.schulz(A, start, steps)
    oracle.assert_as_exact_as(X, oracle.inverse(A), peer, k=K, floor=FLOOR, what=f"d={d}")
    # on chip the residual of the last step is a product more
    assert products == peer_products + (d <= 128)
    allocations.assert_intact()


@pytest.mark.parametrize("degrees", [(2,), (3,), (5,), (9,), (2, 3), (3, 5, 2), (5, 9)], ids=str)
@pytest.mark.parametrize("d", [20, 40, 70], ids=["registers", "resident", "product"])
def test_every_degree_first_and_later(
    degrees: tuple[int, ...], d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face, "LARGEST_ONCHIP", 64)
    eigenvalues = np.linspace(0.25, 0.75, d)
    A = torch.from_numpy(np.stack([oracle.spd(eigenvalues, seed=b) for b in range(2)]))
    A = A.float().to(DEVICE)
    start, steps = of_degrees(*degrees, batch=2, e=0.5)
    X, _ = face.schulz(A, start, steps)
    # the truth of a short chain is its polynomial, not the inverse
    wide = [Step(s.degree, {k: c.double() for k, c in s.coefficients.items()}) for s in steps]
    truth, _ = reference.schulz(A.double(), start.double(), wide)
    peer, _ = reference.schulz(A, start, steps)
    oracle.assert_as_exact_as(X, truth, peer, k=K, floor=FLOOR)
    residual = oracle.inverse_residual(A, X)
    reach = 1 / np.cosh(np.prod(degrees) * np.arccosh(2.0))
    assert (residual <= reach + 32 * EPS).all()


@pytest.mark.parametrize("precision", ["tf32x3", "tf32", "bf16"])
@pytest.mark.parametrize("d", [48, 70], ids=["resident", "product"])
def test_lower_precisions_converge_as_far_as_they_can(
    precision: str, d: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(face, "LARGEST_ONCHIP", 64)
    A = spd(1, d, 4.0)
    start, steps = plan(1, 4.0)
    X, _ = face.schulz_rounded(A, start, steps, precision)
    residual = oracle.inverse_residual(A, X).max()
    # a few unit roundoffs of the operands times the condition number
    limit = {"tf32x3": 2.0**-23, "tf32": 2.0**-11, "bf16": 2.0**-8}[precision] * 16
    assert residual <= limit
    rounds = precision == "bf16" or (precision == "tf32" and not INTERPRETING)
    if rounds:
        # the arithmetic asked for is the one that ran
        assert residual > limit / 1000


def test_symmetric_products_mirror_exactly_and_stay_accurate() -> None:
    from hyperinf_kernels.ops.triton.schulz import packed, schulz_chain

    A = spd(2, 140, 30.0)
    start, steps = plan(2, 30.0)
    coefficients, _ = packed(steps, 2, A.device)
    degrees = [s.degree for s in steps]
    X, _, _ = schulz_chain(A, start, coefficients, degrees, 0.0, 0, "ieee", len(steps))
    assert torch.equal(X, X.mT)
    peer, _ = reference.schulz(A, start, steps)
    oracle.assert_as_exact_as(X, oracle.inverse(A), peer, k=2 * K, floor=FLOOR)


@pytest.mark.parametrize("d", [24, 40], ids=["registers", "resident"])
def test_on_chip_each_matrix_stops_by_itself(d: int) -> None:
    from hyperinf_kernels.ops.triton.schulz import packed, schulz_onchip

    A = spd(3, d, 50.0)
    A[1] = torch.eye(d, device=DEVICE)
    start, steps = of_degrees(2, 2, 2, 2, 2, 2, 2, 2, 2, 2, batch=3, e=0.99)
    start = torch.full((3,), 1.0, device=DEVICE)
    coefficients, degrees = packed(steps, 3, A.device)
    X, residual, done = schulz_onchip(A, start, coefficients, degrees, 1e-3, "ieee")
    measured = oracle.inverse_residual(A, X)
    np.testing.assert_allclose(residual.cpu(), measured, rtol=0.05, atol=1e-6)
    assert (measured <= 1e-3).all()
    assert done[1] == 0
    assert 0 < done[0] == done[2] < len(steps)
    everything, _, all_done = schulz_onchip(A, start, coefficients, degrees, 0.0, "ieee")
    # without a tolerance only an exact inverse stops early
    assert all_done.tolist() == [len(steps), 0, len(steps)]
    assert (oracle.inverse_residual(A, everything) < 1e-4).all()


def test_the_host_reads_the_residual_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperinf_kernels.ops.triton.schulz import packed, schulz_chain

    A = spd(2, 40, 4.0)
    start, steps = of_degrees(*[2] * 8, batch=2, e=0.6)
    start = torch.full((2,), 1.6, device=DEVICE)
    coefficients, _ = packed(steps, 2, A.device)
    reads: list[Tensor] = []
    original = Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda t: reads.append(t) or original(t))
    _, _, all_products = schulz_chain(A, start, coefficients, [2] * 8, 1e-2, 0, "ieee", 0)
    assert reads == []
    X, residual, products = schulz_chain(A, start, coefficients, [2] * 8, 1e-2, 2, "ieee", 0)
    assert 1 <= len(reads) <= 4
    assert products.item() < all_products.item()
    np.testing.assert_allclose(residual.cpu(), oracle.inverse_residual(A, X), rtol=0.05, atol=1e-6)


@pytest.mark.parametrize("d", [6, 40, 70], ids=["registers", "resident", "product"])
def test_nan_stays_in_its_own_matrix(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "LARGEST_ONCHIP", 64)
    A = spd(3, d, 5.0)
    A[1, 0, 0] = float("nan")
    start, steps = plan(3, 5.0)
    X, _ = face.schulz(A, start, steps)
    assert X[1].isnan().any()
    assert X[0].isfinite().all()
    assert X[2].isfinite().all()


def test_thousands_of_matrices_through_a_few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETING:
        chosen = list(range(4000))
    else:
        chosen = [0, 1, 1777, 3998, 3999]
        from hyperinf_kernels.ops.triton import schulz as module

        few = FewPrograms(module._schulz_registers_kernel, chosen)
        monkeypatch.setattr(module, "_schulz_registers_kernel", few)
    A = spd(7, 6, 10.0).repeat(572, 1, 1)[:4000]
    start, steps = plan(4000, 10.0)
    X, _ = face.schulz(A, start, steps)
    truth = np.tile(oracle.inverse(A[:7]), (572, 1, 1))[:4000]
    peer, _ = reference.schulz(A, start, steps)
    oracle.assert_as_exact_as(X[chosen], truth[chosen], peer[chosen], k=K, floor=FLOOR)


def test_resident_programs_walk_a_batch_larger_than_the_grid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperinf_kernels.ops.triton import schulz as module

    monkeypatch.setattr(module, "RESIDENT_PROGRAMS", 1)
    monkeypatch.setattr(module, "MULTIPROCESSORS", dict.fromkeys((80, 90, 100), 2))
    A = spd(5, 34, 10.0)
    start, steps = plan(5, 10.0)
    X, _ = face.schulz(A, start, steps)
    peer, _ = reference.schulz(A, start, steps)
    oracle.assert_as_exact_as(X, oracle.inverse(A), peer, k=K, floor=FLOOR)


def test_batch_dimensions_views_and_transposes() -> None:
    A = spd(6, 20, 10.0)
    start, steps = plan(6, 10.0)
    plain, _ = face.schulz(A, start, steps)
    shaped = [Step(s.degree, {k: c.reshape(2, 3) for k, c in s.coefficients.items()})
              for s in steps]  # fmt: skip
    for view in (A.view(2, 3, 20, 20), A.view(2, 3, 20, 20).mT):
        X, _ = face.schulz(view, start.view(2, 3), shaped)
        assert X.shape == (2, 3, 20, 20)
        torch.testing.assert_close(X.view(6, 20, 20), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("through_the_dispatcher")
@pytest.mark.parametrize(
    ("d", "condition", "asked", "runs"),
    [(20, 100.0, "tf32", "tf32"), (40, 100.0, "bf16", "bf16"), (40, 1e4, "tf32", "ieee"),
     (40, 1e4, "tf32x3", "tf32x3"), (40, 1e4, "ieee", "ieee")],
)  # fmt: skip
def test_the_public_inverse_converges_whatever_precision_is_permitted(
    d: int, condition: float, asked: str, runs: str
) -> None:
    A = spd(2, d, condition)
    with hk.trace_backends() as log:
        X, info = hk.schulz_inverse(
            A, bounds=(1 / condition, 1.01), precision=asked, return_info=True
        )
    assert [plan.backend for plan in log] == ["triton"]
    assert (info.backend, info.precision, info.fallback) == ("triton", runs, None)
    assert info.converged.all()
    peer = torch.linalg.inv(A)
    oracle.assert_as_exact_as(X, oracle.inverse(A), peer, k=4 * K, floor=FLOOR)


@pytest.mark.usefixtures("through_the_dispatcher")
def test_the_public_solve_starts_from_a_low_precision_inverse() -> None:
    A, V = spd(2, 40, 100.0), random(2, 3, 40)
    W, info = hk.schulz_solve(A, V, bounds=(0.01, 1.01), precision="bf16", return_info=True)
    assert (info.backend, info.precision, info.fallback) == ("triton", "bf16", None)
    assert info.converged.all()
    oracle.assert_as_exact_as(W, oracle.solve(A, V), V @ torch.linalg.inv(A), k=2 * K, floor=FLOOR)


@pytest.mark.parametrize("name", ["schulz_onchip", "schulz_chain"])
def test_opcheck(name: str) -> None:
    from hyperinf_kernels.ops.triton import schulz as module

    d = 8 if name == "schulz_onchip" else 40
    A = spd(2, d, 5.0)
    start, steps = of_degrees(2, 3, batch=2, e=0.9)
    coefficients, degrees = module.packed(steps, 2, A.device)
    given = degrees if name == "schulz_onchip" else [2, 3]
    tail = (0.0, "ieee") if name == "schulz_onchip" else (0.0, 0, "ieee", 1)
    torch.library.opcheck(getattr(module, name), (A, start, coefficients, given, *tail))


@pytest.mark.parametrize("d", [6, 40, 70], ids=["registers", "resident", "product"])
def test_no_steps_leave_the_start(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(face, "LARGEST_ONCHIP", 64)
    start = torch.tensor([0.5, 2.0], device=DEVICE)
    X, products = face.schulz(spd(2, d, 3.0), start, [])
    assert torch.equal(X, start[:, None, None] * torch.eye(d, device=DEVICE))
    assert products == 0


def test_empty_batches_and_matrices() -> None:
    start, steps = plan(1, 10.0)
    none = [Step(s.degree, {k: c[:0] for k, c in s.coefficients.items()}) for s in steps]
    assert face.schulz(random(0, 5, 5), start[:0], none)[0].shape == (0, 5, 5)
    assert face.schulz(random(1, 0, 0), start, steps)[0].shape == (1, 0, 0)

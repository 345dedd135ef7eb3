"""The compiled batched Cholesky inverse against numpy fp64, on every compiled path."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads, worst
from tests.oracle import Array

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
# largest error of a batch <= K x LAPACK's largest error on it (cholesky, cholesky_inverse, fp32),
# plus a few roundings; over 400 matrices the two are within 1.6, over few they scatter more
K = 4.0
FLOOR = 8 * np.finfo(np.float32).eps


def spd(batch: int, d: int, kappa: float = 100.0, seed: int = 0) -> torch.Tensor:
    """Random eigenvectors, eigenvalues spread evenly on a logarithmic scale."""
    basis = np.linalg.qr(random(batch, d, d, dtype=torch.float64, seed=seed).numpy())[0]
    values = np.geomspace(1 / kappa, 1, d)
    return torch.from_numpy((basis * values) @ basis.swapaxes(-1, -2)).float()


def truth(A: torch.Tensor) -> Array:
    """The inverse of the symmetric matrix in the lower triangle."""
    low = np.tril(A.double().numpy())
    return np.linalg.inv(low + np.tril(low, -1).swapaxes(-1, -2))


def assert_exact(X: torch.Tensor, A: torch.Tensor) -> None:
    expected = truth(A)
    lapack = torch.cholesky_inverse(torch.linalg.cholesky(A))
    bound = K * worst(lapack, expected) + FLOOR * np.abs(expected).max(initial=0)
    assert worst(X, expected) <= bound


def run(A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel itself, which takes sizes that the face leaves to torch."""
    X, info = torch.ops.hyperinf.spd_inverse(A)
    return X, info


@pytest.mark.parametrize("d", [*range(1, 10), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])
def test_any_side(d: int) -> None:
    A = spd(5, d)
    X, info = run(A)
    assert info.dtype == torch.int32
    assert not info.any()
    assert torch.equal(X, X.mT)
    assert_exact(X, A)


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33])
def test_any_number_of_matrices(batch: int) -> None:
    A = spd(batch, 6)
    X, info = run(A)
    assert X.shape == (batch, 6, 6)
    assert info.shape == (batch,)
    assert_exact(X, A)


@pytest.mark.parametrize("kappa", [1.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("d", [16, 64])
def test_conditioning(kappa: float, d: int) -> None:
    A = spd(17, d, kappa)
    assert_exact(run(A)[0], A)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10])
def test_scale(scale: float) -> None:
    A = spd(5, 12) * scale
    assert_exact(run(A)[0], A)


def test_an_empty_matrix_has_an_empty_inverse() -> None:
    X, info = run(torch.zeros(3, 0, 0))
    assert X.shape == (3, 0, 0)
    assert not info.any()


BAD: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "negative at 1": (lambda A: A.index_put((torch.tensor(0), torch.tensor(0)),
                                            torch.tensor(-1.0)), 1),
    "zero matrix": (torch.zeros_like, 1),
    "singular at 4": (lambda A: torch.diag(torch.tensor([1.0, 1, 1, 0, 1, 1, 1])), 4),
    "indefinite at 7": (lambda A: torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 1, -1])), 7),
    "nan at 3": (lambda A: A.index_put((torch.tensor(2), torch.tensor(1)),
                                       torch.tensor(torch.nan)), 3),
    "all nan": (lambda A: torch.full_like(A, torch.nan), 1),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 3, 15, 16, 20])
def test_a_matrix_that_fails_is_nan_alone_and_named_by_info(bad: str, place: int) -> None:
    A = spd(21, 7)
    clean, _ = run(A)
    spoil, order = BAD[bad]
    A[place] = spoil(A[place])
    X, info = run(A)
    keep = torch.arange(21) != place
    assert info[place] == order
    assert X[place].isnan().all()
    assert not info[keep].any()
    assert torch.equal(X[keep], clean[keep])


def test_info_is_lapacks_on_random_symmetric_matrices() -> None:
    S = random(60, 9, 9)
    A = S + S.mT + 3 * torch.eye(9)
    _, info = run(A)
    assert torch.equal(info, torch.linalg.cholesky_ex(A).info)
    assert len(info.unique()) > 3


def test_only_the_lower_triangle_is_read() -> None:
    A = spd(5, 11)
    X, _ = run(A)
    upper = A.masked_fill(torch.ones(11, 11).triu(1).bool(), torch.nan)
    assert torch.equal(run(upper)[0], X)


@pytest.mark.parametrize("place", [0, 14, 16, 20])
@pytest.mark.parametrize("d", [2, 5, 9, 33])
def test_a_check_marks_what_is_not_symmetric_or_not_finite(d: int, place: int) -> None:
    A = spd(21, d)
    X, info = torch.ops.hyperinf.spd_inverse(A, True)
    assert not info.any()
    assert torch.equal(X, run(A)[0])
    largest = A[place].abs().max()
    for i, j, value in (
        (0, d - 1, A[place, 0, d - 1] + 1.01e-3 * largest), (d - 2, d - 1, torch.tensor(torch.nan)),
        (0, d - 1, torch.tensor(torch.inf)), (d - 1, d - 1, torch.tensor(torch.inf)),
    ):  # fmt: skip
        B = A.clone()
        B[place, i, j] = value
        assert torch.ops.hyperinf.spd_inverse(B, True)[1].nonzero().tolist() == [[place]], (i, j)
    close = A.clone()
    close[place, 0, d - 1] += 0.99e-3 * largest
    assert not torch.ops.hyperinf.spd_inverse(close, True)[1].any()


def test_a_check_marks_an_inverse_beyond_fp32() -> None:
    A = spd(5, 4)
    A[3] = torch.diag(torch.tensor([1.0, 1.0, 1e-39, 1.0]))
    info = torch.ops.hyperinf.spd_inverse(A, True)[1]
    assert info.nonzero().tolist() == [[3]]
    with pytest.raises(ValueError, match=r"inverse of A\[3\] overflows"):
        hk.spd_inverse(A)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda A: A[4, 2].__setitem__(5, torch.nan), r"A\[4\] holds NaN or inf \(1 of 6"),
        (lambda A: A[4, 5].__setitem__(2, torch.inf), r"A\[4\] holds NaN or inf \(1 of 6"),
        (lambda A: A[4, 2].__setitem__(2, 0.0), r"A\[4\] .* diagonal entry that is not positive"),
        (lambda A: A[4, 2].__setitem__(5, 3.0), "A must be symmetric"),
        (lambda A: A[4].sub_(2 * torch.eye(8)).diagonal().fill_(0.01), r"A\[4\] .* fp64"),
    ],
    ids=["nan", "inf", "diagonal", "symmetry", "indefinite"],
)
def test_the_face_refuses_by_name(spoil: Callable[[torch.Tensor], None], message: str) -> None:
    A = spd(6, 8)
    spoil(A)
    with (
        on_cpu_kernels("spd_inverse") if "fp64" not in message else nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        hk.spd_inverse(A)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unaligned": shifted,
    "every other matrix": lambda t: t.repeat_interleave(2, 0)[::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4), value=torch.nan)[:, 3:-4, 1:-2],
    "one matrix repeated": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
def test_layout_does_not_change_a_bit(view: str) -> None:
    A = VIEWS[view](spd(19, 13))
    assert torch.equal(run(A)[0], run(A.contiguous())[0])


def test_bits_depend_on_neither_threads_nor_place_in_the_batch() -> None:
    A = spd(70, 10)
    with threads(1):
        one, _ = run(A)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(run(A)[0], one)
    order = torch.arange(69, -1, -1)
    assert torch.equal(run(A[order])[0], one[order])


@pytest.mark.parametrize(
    ("A", "message"),
    [
        (torch.zeros(4, 4), "A must have 3 dimensions, got 2"),
        (torch.zeros(2, 3, 4), "square matrices, got 3 x 4"),
        (torch.zeros(1, 129, 129), "at most 128 on a side, got 129"),
        (torch.zeros(1, 3, 3).double(), "A must be fp32"),
        (torch.ones(1, 3, 6)[..., ::2], "unit stride"),
    ],
    ids=["dims", "square", "size", "fp64", "stride"],
)
def test_the_raw_op_refuses_by_name(A: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(A)


# --- the public face ----------------------------------------------------------------------------


def test_face_runs_on_the_kernel_and_says_so() -> None:
    A = spd(12, 20).reshape(3, 4, 20, 20)
    with on_cpu_kernels("spd_inverse"):
        X, info = hk.spd_inverse(A, return_info=True)
    assert info.backend == "cpu"
    assert info.fallback is None
    assert_exact(X.flatten(0, 1), A.flatten(0, 1))
    turned = A.mT.contiguous().mT
    assert_exact(hk.spd_inverse(turned).flatten(0, 1), A.flatten(0, 1))


def test_a_matrix_that_fp32_cannot_factor_is_retried_in_fp64() -> None:
    A = spd(6, 8)
    edge = spd(200, 8, kappa=1e8)
    definite = torch.linalg.eigvalsh(edge.double()).amin(-1) > 1e-9
    A[4] = edge[definite & (run(edge)[1] > 0)][0]
    X, info = hk.spd_inverse(A, return_info=True)
    assert "1 of 6 matrices needed fp64" in str(info.fallback)
    assert X.isfinite().all()


@pytest.mark.parametrize(
    ("A", "reason"),
    [
        (spd(4, 6).double(), "takes float32, not float64"),
        (spd(1, 129).expand(4, 129, 129), "up to 128 on a side"),
        (spd(1, 65), "one matrix over 64 on a side"),
    ],
    ids=["fp64", "large", "alone"],
)
def test_what_the_kernel_does_not_take_runs_in_torch_with_the_reason(
    A: torch.Tensor, reason: str
) -> None:
    plan = hk.explain("spd_inverse", A)
    assert plan.backend == "torch"
    assert reason in plan.reason

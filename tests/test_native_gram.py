"""The compiled Gram and GFIM sums against numpy fp64, on every compiled path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops.reference import RUN
from hyperinf_kernels.ops.sketch import combine_rows, image_rows
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads, worst
from tests.oracle import Array

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
# largest error <= K x largest error of torch.mm in fp32, plus a few roundings of the result
K = 2.0
FLOOR = 4 * np.finfo(np.float32).eps
BOTH = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
SIDES = [1, 2, 3, 4, 11, 12, 13, 31, 32, 33, 100]
DEPTHS = [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 1000]


def f64(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def assert_sum(
    C: torch.Tensor, before: torch.Tensor, X: torch.Tensor, Y: torch.Tensor, alpha: float = 1.0
) -> None:
    """C is before + alpha X Y^T, as exact as torch's product."""
    expected = f64(before) + alpha * (f64(X) @ np.swapaxes(f64(Y), -1, -2))
    peer = before + alpha * (X.float() @ Y.float().mT)
    bound = K * worst(peer, expected) + FLOOR * np.abs(expected).max(initial=0)
    assert worst(C, expected) <= bound


def add(C: torch.Tensor, X: torch.Tensor, Y: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """The kernel itself, which takes sizes that the face leaves to torch."""
    torch.ops.hyperinf.gram_accumulate_(C[None], X[None], None if Y is None else Y[None], alpha)
    return C


# --- the kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("side", SIDES)
def test_any_side(side: int, dtype: torch.dtype) -> None:
    X, Y = random(side, 70, dtype=dtype), random(45, 70, dtype=dtype, seed=1)
    for other, columns in ((None, side), (Y, 45)):
        before = random(side, columns, seed=2)
        C = add(before.clone(), X, other, 0.5)
        assert_sum(C, before, X, X if other is None else other, 0.5)
    before = random(45, side, seed=2)
    assert_sum(add(before.clone(), Y, X, 0.5), before, Y, X, 0.5)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("by_column", [False, True], ids=["rows contiguous", "columns contiguous"])
def test_any_depth_in_either_layout(depth: int, dtype: torch.dtype, by_column: bool) -> None:
    X, Y = random(37, depth, dtype=dtype), random(14, depth, dtype=dtype, seed=1)
    if by_column:
        X, Y = X.T.contiguous().T, Y.T.contiguous().T
    assert_sum(add(torch.zeros(37, 14), X, Y, 1.0), torch.zeros(37, 14), X, Y)
    assert_sum(add(torch.zeros(37, 37), X, None, 1.0), torch.zeros(37, 37), X, X)


@pytest.mark.parametrize("rows", [383, 384, 385, 800])
@pytest.mark.parametrize("depth", [100, 2100])
def test_several_tiles_and_chunks(rows: int, depth: int) -> None:
    X, Y = random(rows, depth), random(401, depth, seed=1)
    assert_sum(add(torch.zeros(rows, rows), X, None, 1.0), torch.zeros(rows, rows), X, X)
    assert_sum(add(torch.zeros(rows, 401), X, Y, 1.0), torch.zeros(rows, 401), X, Y)


def test_many_tiles_with_a_long_depth_add_their_chunks_in_order() -> None:
    X, Y = random(26, 33, 4500), random(26, 40, 4500, seed=1)
    C, D = torch.zeros(26, 33, 33), torch.zeros(26, 33, 40)
    torch.ops.hyperinf.gram_accumulate_(C, X, None, 1.0)
    torch.ops.hyperinf.gram_accumulate_(D, X, Y, 1.0)
    for i in range(26):
        assert_sum(C[i], torch.zeros(33, 33), X[i], X[i])
        assert_sum(D[i], torch.zeros(33, 40), X[i], Y[i])


@pytest.mark.parametrize("rows", [37, 400])
def test_own_products_are_symmetric_to_the_bit(rows: int) -> None:
    C = add(torch.zeros(rows, rows), random(rows, 333), None, 0.7)
    assert torch.equal(C, C.T)


@pytest.mark.parametrize("rows", [37, 400])
def test_an_accumulator_that_is_not_symmetric_keeps_both_its_halves(rows: int) -> None:
    before, X = random(rows, rows, seed=2), random(rows, 50)
    assert_sum(add(before.clone(), X, None, 1.0), before, X, X)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unaligned": shifted,
    "every other column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4), value=torch.nan)[3:-4, 1:-2],
    "transposed": lambda t: t.T.contiguous().T,
    "one row repeated": lambda t: t[:1].expand_as(t),
    "one column repeated": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("view", VIEWS)
def test_layout_does_not_change_a_bit(view: str, dtype: torch.dtype) -> None:
    X = VIEWS[view](random(41, 90, dtype=dtype))
    plain = add(torch.zeros(41, 41), X.contiguous(), None, 1.0)
    assert torch.equal(add(torch.zeros(41, 41), X, None, 1.0), plain)
    assert torch.equal(add(torch.zeros(41, 41), X, X.clone(), 1.0), plain)


def test_a_strided_accumulator_is_written_and_nothing_beside_it() -> None:
    buffer = torch.full((82, 90), 7.0)
    window = buffer[1:81:2, 3:83:2]
    window.zero_()
    X = random(40, 50)
    assert_sum(add(window, X, None, 1.0), torch.zeros(40, 40), X, X)
    assert int((buffer == 7).sum()) == buffer.numel() - 1600


def test_nan_reaches_its_row_and_column_only() -> None:
    X = random(50, 60)
    clean = add(torch.zeros(50, 50), X, None, 1.0)
    X[17, 3] = torch.nan
    spoiled = add(torch.zeros(50, 50), X, None, 1.0)
    keep = torch.arange(50) != 17
    assert spoiled[17].isnan().all()
    assert spoiled[:, 17].isnan().all()
    assert torch.equal(spoiled[keep][:, keep], clean[keep][:, keep])


def test_alpha_may_be_beyond_fp32() -> None:
    X = random(40, 30) * 1e-15
    C = add(torch.zeros(40, 40), X, None, 1e32)
    assert_sum(C * 1e-2, torch.zeros(40, 40), X * 1e15, X * 1e15)


def test_bits_do_not_depend_on_threads() -> None:
    cases = [(random(50, 5000), random(33, 5000, seed=1)), (random(500, 90), random(420, 90))]
    for X, Y in cases:
        sums = []
        for count in (1, 2, 2, 3):
            with threads(count):
                own = add(torch.zeros(len(X), len(X)), X, None, 1.0)
                sums.append((own, add(torch.zeros(len(X), len(Y)), X, Y, 1.0)))
        for own, mixed in sums[1:]:
            assert torch.equal(own, sums[0][0])
            assert torch.equal(mixed, sums[0][1])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 3), torch.zeros(1, 3, 4), None), "C must have 3 dimensions"),
        ((torch.zeros(1, 3, 3).half(), torch.zeros(1, 3, 4), None), "C must be fp32 or fp64"),
        ((torch.zeros(1, 3, 3), torch.zeros(1, 3, 4).double(), None), "X must be fp32 or bf16"),
        ((torch.zeros(1, 1, 3).expand(1, 3, 3), torch.zeros(1, 3, 4), None), "C overlaps itself"),
        ((torch.zeros(1, 3, 3), torch.zeros(1, 3, 4).half(), None), "X must be fp32 or bf16"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), torch.zeros(1, 2, 5)), "must agree"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), None), "must agree"),
        ((torch.zeros(1, 3, 2), torch.zeros(1, 3, 4), torch.zeros(1, 2, 4).bfloat16()),
         "one dtype"),
    ],
    ids=["dims", "fp16 sum", "fp64 rows", "expanded sum", "fp16 rows", "depths", "square", "mixed"],
)  # fmt: skip
def test_the_raw_op_refuses_what_it_cannot_read(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hyperinf.gram_accumulate_(*args, 1.0)


def test_a_sum_may_not_lie_in_the_memory_of_its_rows() -> None:
    buffer = random(50, 90)
    C, X = buffer[:, :50], buffer[:, 50:]
    with pytest.raises(RuntimeError, match="C must not overlap X"):
        add(C, X, None, 1.0)
    # the face reads the rows first, wherever they lie
    before = buffer.clone()
    with on_cpu_kernels("gram_accumulate_"):
        hk.gram_accumulate_(C, X)
    assert_sum(C, before[:, :50], before[:, 50:], before[:, 50:])


# fp64 sums round as numpy's: each product of fp32 numbers is exact in fp64
FLOOR64 = 16 * np.finfo(np.float64).eps


@pytest.mark.parametrize("dtype", [*BOTH, pytest.param(torch.float64, id="fp64")])
@pytest.mark.parametrize(("rows", "depth"), [(33, 1), (40, 129), (191, 70), (193, 2100), (400, 65)])
def test_sums_in_fp64_lose_nothing_of_the_rows(rows: int, depth: int, dtype: torch.dtype) -> None:
    X, Y = random(rows, depth, dtype=dtype), random(45, depth, dtype=dtype, seed=1)
    for other in (None, Y):
        right = X if other is None else other
        before = random(rows, len(right), seed=2, dtype=torch.float64)
        C = add(before.clone(), X, other, 0.5)
        expected = f64(before) + 0.5 * (f64(X) @ f64(right).T)
        scale = np.abs(f64(before)) + 0.5 * (np.abs(f64(X)) @ np.abs(f64(right)).T)
        assert (np.abs(f64(C) - expected) / scale).max() <= FLOOR64


def test_an_fp64_sum_shows_a_direction_that_fp32_sums_bury() -> None:
    # one direction of size 1e-5 beside others of size 1: fp32 sums carry noise of 1e-7 of the
    # largest entry, a thousand times the eigenvalue 1e-10
    basis = np.linalg.qr(random(40, 40, dtype=torch.float64).numpy())[0]
    scales = np.ones(40)
    scales[0] = 1e-5
    X = torch.from_numpy(random(3000, 40, dtype=torch.float64).numpy() * scales @ basis)
    X = X.float()
    C = hk.gfim_accumulate_(torch.zeros(40, 40).double(), X.unsqueeze(1), alpha=1 / 3000)
    low = np.linalg.eigvalsh(f64(C))[0]
    expected = np.linalg.eigvalsh(f64(X).T @ f64(X) / 3000)[0]
    assert low == pytest.approx(expected, rel=1e-3)
    narrow = hk.gfim_accumulate_(torch.zeros(40, 40), X.unsqueeze(1), alpha=1 / 3000)
    assert abs(np.linalg.eigvalsh(f64(narrow))[0] - expected) > 10 * expected


# --- the public faces ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
def test_gram_of_batches_and_mixed_types(dtype: torch.dtype) -> None:
    G1, G2 = random(2, 3, 35, 60, dtype=dtype), random(2, 3, 40, 60, seed=1)
    with on_cpu_kernels("gram_accumulate_"):
        K12 = hk.gram_accumulate_(torch.ones(2, 3, 35, 40), G1, G2)
        K11 = hk.gram_accumulate_(torch.ones(2, 3, 35, 35), G1)
        # batch dimensions that do not join into one stride
        crossed = torch.ones(3, 2, 35, 35).transpose(0, 1)
        assert hk.gram_accumulate_(crossed, G1) is crossed
    assert_sum(K12, torch.ones(2, 3, 35, 40), G1, G2)
    assert_sum(K11, torch.ones(2, 3, 35, 35), G1, G1)
    assert_sum(crossed, torch.ones(2, 3, 35, 35), G1, G1)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("side", ["cols", "rows"])
@pytest.mark.parametrize("factors", [False, True], ids=["gradients", "factors"])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["one block", "stacked"])
def test_gfim(lead: tuple[int, ...], factors: bool, side: str, dtype: torch.dtype) -> None:
    delta, act = random(*lead, 6, 9, 33, dtype=dtype), random(*lead, 6, 9, 47, dtype=dtype, seed=1)
    grads = torch.from_numpy(np.einsum("...to,...ti->...oi", f64(delta), f64(act))).to(dtype)
    size = 47 if side == "cols" else 33
    C = torch.ones(*lead, size, size)
    args = (delta, act) if factors else (grads,)
    with on_cpu_kernels("gfim_accumulate_"):
        assert hk.gfim_accumulate_(C, *args, side=side, alpha=0.25) is C
    given = torch.from_numpy(f64(delta).swapaxes(-1, -2) @ f64(act)) if factors else grads.double()
    stack = given.mT if side == "cols" else given
    stack = stack.movedim(-3, -2).flatten(-2)  # (..., side, B * other)
    expected = 1 + 0.25 * f64(stack) @ f64(stack).swapaxes(-1, -2)
    formed = delta.float().mT @ act.float() if factors else grads.float()
    formed = (formed.mT if side == "cols" else formed).movedim(-3, -2).flatten(-2)
    peer = 1 + 0.25 * (formed @ formed.mT)
    bound = K * worst(peer, expected) + FLOOR * np.abs(expected).max()
    assert worst(C, expected) <= bound


@pytest.mark.parametrize(
    ("total", "rows", "reason"),
    [
        (torch.zeros(40, 40), random(40, 5).double(), "takes float32 and bfloat16, not float64"),
        (torch.zeros(40, 40), random(40, 5).half(), "takes float32 and bfloat16, not float16"),
        (torch.zeros(31, 31), random(31, 5), "below 32 on a side"),
    ],
    ids=["fp64 rows", "fp16 rows", "small"],
)
def test_what_the_kernel_does_not_take_runs_in_torch_with_the_reason(
    total: torch.Tensor, rows: torch.Tensor, reason: str
) -> None:
    plan = hk.explain("gram_accumulate_", total, rows)
    assert plan.backend == "torch"
    assert reason in plan.reason
    total = hk.gram_accumulate_(total.clone(), rows)
    assert torch.allclose(total.double(), rows.double() @ rows.double().T, atol=1e-5)


def test_nothing_adds_nothing() -> None:
    K = random(40, 40)
    before = K.clone()
    with on_cpu_kernels("gram_accumulate_", "gfim_accumulate_"):
        hk.gram_accumulate_(K, torch.zeros(40, 0))
        hk.gfim_accumulate_(K, torch.zeros(0, 3, 40))
        hk.gram_accumulate_(torch.zeros(0, 40, 40), torch.zeros(0, 40, 3))
    assert torch.equal(K, before)


# --- fp32 runs in a fp64 sum ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("rows", "depth"), [(37, 5), (37, 768), (400, 769), (64, 20_000)])
def test_runs_lose_no_more_than_one_short_product(
    rows: int, depth: int, dtype: torch.dtype
) -> None:
    X, Y = random(rows, depth, dtype=dtype), random(45, depth, dtype=dtype, seed=1)
    for other in (None, Y):
        before = random(rows, len(Y) if other is not None else rows, seed=2).double()
        C = before.clone()[None]
        y = X if other is None else other
        torch.ops.hyperinf.gram_accumulate_(
            C, X[None], None if other is None else Y[None], 0.5, True
        )
        expected = f64(before) + 0.5 * (f64(X) @ f64(y).T)
        # what plain fp32 loses on a run at its worst, run by run, all of one sign
        parts = zip(X.float().split(RUN, 1), y.float().split(RUN, 1), strict=True)
        each = [worst(x @ w.T, f64(x) @ f64(w).T) for x, w in parts]
        assert worst(C[0], expected) <= K * sum(each) + FLOOR * np.abs(f64(X)).max()
        if other is None:
            wide = torch.zeros(1, rows, rows, dtype=torch.float64)
            torch.ops.hyperinf.gram_accumulate_(wide, X[None], None, 1.0, True)
            assert torch.equal(wide[0], wide[0].T)


def test_the_error_of_runs_does_not_grow_with_the_depth() -> None:
    """Equal rows: every error of a chain has one sign, so a long fp32 chain would show."""
    errors = []
    for depth in (RUN, 64 * RUN):
        X = torch.full((32, depth), 1.1)
        C = torch.zeros(1, 32, 32, dtype=torch.float64)
        torch.ops.hyperinf.gram_accumulate_(C, X[None], None, 1.0, True)
        errors.append(float((C[0] / (X[0, 0].double() ** 2 * depth) - 1).abs().max()))
    assert errors[1] <= 1.01 * errors[0] <= 1.01 * RUN * np.finfo(np.float32).eps / 2


def test_runs_do_not_depend_on_threads_and_need_a_wide_sum() -> None:
    X = random(300, 9000)
    results = []
    for count in (1, 2):
        with threads(count):
            C = torch.zeros(1, 300, 300, dtype=torch.float64)
            torch.ops.hyperinf.gram_accumulate_(C, X[None], None, 1.0, True)
            results.append(C)
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="C must be fp64"):
        torch.ops.hyperinf.gram_accumulate_(torch.zeros(1, 3, 3), X[None, :3], None, 1.0, True)


# --- sketches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("n", "width"), [(1, 1), (3, 5), (8, 16), (300, 37), (33, 1030)])
def test_sketches_are_fp64_whatever_the_rows_are(n: int, width: int, dtype: torch.dtype) -> None:
    P = torch.nn.functional.pad(random(n, width, dtype=dtype), (1, 2), value=torch.nan)[:, 1:-2]
    X, Z = random(n, 4, seed=1).double(), random(4, width, seed=2).double()
    for found, expected in (
        (torch.ops.hyperinf.combine_rows(X, P), f64(X).T @ f64(P)),
        (torch.ops.hyperinf.image_rows(Z, P), f64(Z) @ f64(P).T @ f64(P)),
    ):
        bound = 1e-15 * n**0.5 * width**0.5 * np.abs(expected).max() + 1e-14
        assert worst(found, expected) <= 4 * bound


def test_sketches_of_other_sizes_and_dtypes_run_in_torch() -> None:
    X, P = random(7, 3).double(), random(7, 20).double()
    for found, expected in (
        (combine_rows(X, P), X.mT @ P),
        (combine_rows(X, P.half()), X.mT @ P.half().double()),
        (image_rows(P[:2], P), P[:2] @ P.mT @ P),
    ):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)

"""The compiled sherman_morrison against its formula in numpy fp64, on every compiled path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads, worst
from tests.oracle import Array

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
# largest error <= K x largest error of the two-GEMM form in torch fp32, plus a few roundings
K = 2.0
FLOOR = 4 * np.finfo(np.float32).eps
BOTH = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


def truth(V: torch.Tensor, G: torch.Tensor, damping: float) -> Array:
    """mean_i (v - g_i (g_i . v) / (damping + g_i . g_i)) / damping, row by row."""
    v, rows = V.double().numpy(), G.double().numpy()
    total = np.zeros_like(v)
    for g in rows:
        total += v - np.outer(v @ g / (damping + g @ g), g)
    return total / (len(rows) * damping)


def two_gemms(V: torch.Tensor, G: torch.Tensor, damping: float) -> torch.Tensor:
    V, G = V.float(), G.float()
    weights = (V @ G.T) / (damping + G.square().sum(-1))
    return (V - weights @ G / len(G)) / damping


def assert_exact(actual: torch.Tensor, V: torch.Tensor, G: torch.Tensor, damping: float) -> None:
    expected = truth(V, G, damping)
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    bound = K * worst(two_gemms(V, G, damping), expected)
    assert worst(actual, expected) <= bound + FLOOR * np.abs(expected).max(initial=0)


def run(V: torch.Tensor, G: torch.Tensor, damping: float | torch.Tensor) -> torch.Tensor:
    with on_cpu_kernels("sherman_morrison"):
        return hk.sherman_morrison(V, G, damping)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 63, 64, 65, 1000, 1023, 1025])
def test_any_number_of_columns(columns: int, dtype: torch.dtype) -> None:
    V, G = random(3, columns), random(21, columns, dtype=dtype, seed=1)
    assert_exact(run(V, G, 0.5), V, G, 0.5)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("queries", [*range(1, 18), 33])
def test_any_number_of_queries(queries: int, dtype: torch.dtype) -> None:
    columns = 70 if queries < 33 else 1030  # many queries on short rows stay in torch
    V, G = random(queries, columns), random(19, columns, dtype=dtype, seed=1)
    assert_exact(run(V, G, 0.3), V, G, 0.3)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 63, 64, 65, 131, 1000])
def test_any_number_of_rows(rows: int) -> None:
    V, G = random(2, 50), random(rows, 50, seed=1)
    assert_exact(run(V, G, 0.3), V, G, 0.3)


def test_queries_may_be_bf16_and_unaligned_views_change_nothing() -> None:
    V, G = random(5, 77, dtype=torch.bfloat16), random(30, 77, seed=1)
    plain = run(V, G, 0.5)
    assert_exact(plain, V, G, 0.5)
    assert torch.equal(run(shifted(V), shifted(G), 0.5), plain)
    narrow = G.bfloat16()
    assert torch.equal(run(V, shifted(narrow), 0.5), run(V, narrow, 0.5))


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "window of columns": lambda t: torch.nn.functional.pad(t, (3, 5), value=float("nan"))[:, 3:-5],
    "one row repeated": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_rows_give_the_same_bits_as_contiguous_ones(view: str) -> None:
    V, G = random(5, 40), VIEWS[view](random(25, 40, seed=1))
    assert torch.equal(run(V, G, 0.5), run(V, G.contiguous(), 0.5))
    assert torch.equal(run(VIEWS[view](V), G, 0.5), run(VIEWS[view](V).contiguous(), G, 0.5))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda t: t.double(), "not float64"),
        (lambda t: t.half(), "not float16"),
        (lambda t: t.T.contiguous().T, "unit stride"),
    ],
    ids=["fp64", "fp16", "transposed"],
)
def test_what_the_kernel_does_not_take_runs_in_torch_with_the_reason(
    make: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    V, G = random(2, 6), make(random(5, 6, seed=1))
    plan = hk.explain("sherman_morrison", V, G)
    assert plan.backend == "torch"
    assert reason in plan.reason
    assert_exact(hk.sherman_morrison(V, G, 0.5).float(), V, G, 0.5)


@pytest.mark.parametrize("dtype", BOTH)
def test_batches_have_their_own_rows_and_damping(dtype: torch.dtype) -> None:
    V, G = random(2, 3, 4, 33), random(2, 3, 20, 33, dtype=dtype, seed=1)
    damping = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    actual = run(V, G, damping)
    for index in np.ndindex(2, 3):
        assert_exact(actual[index], V[index], G[index], float(damping[index]))
    # a batch that is not one block of memory
    assert torch.equal(run(V.transpose(0, 1), G.transpose(0, 1), damping.T), actual.transpose(0, 1))


def test_many_queries_on_short_rows_stay_in_torch() -> None:
    plan = hk.explain("sherman_morrison", random(33, 70), random(5, 70))
    assert plan.backend == "torch"
    assert "over 32 queries on rows below 1024" in plan.reason


def test_nothing_in_nothing_out() -> None:
    G = random(3, 6)
    assert run(torch.zeros(0, 6), G, 0.5).shape == (0, 6)
    assert run(torch.zeros(2, 0), torch.zeros(3, 0), 0.5).shape == (2, 0)
    assert run(torch.zeros(0, 2, 6), torch.zeros(0, 3, 6), torch.zeros(0)).shape == (0, 2, 6)


def test_a_row_of_nan_reaches_its_batch_entry_and_no_other() -> None:
    V, G = random(2, 3, 40), random(2, 30, 40, seed=1)
    clean = run(V, G, 0.5)
    G[0, 17, 5] = float("nan")
    spoiled = run(V, G, 0.5)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1], clean[1])


def test_a_query_of_nan_spoils_only_itself() -> None:
    V, G = random(6, 40), random(30, 40, seed=1)
    clean = run(V, G, 0.5)
    V[2] = float("nan")
    spoiled = run(V, G, 0.5)
    assert spoiled[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(spoiled[keep], clean[keep])


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_tiny_and_huge_gradients(scale: float) -> None:
    V, G = random(3, 40), random(30, 40, seed=1) * scale
    damping = 0.1 * scale**2
    assert_exact(run(V, G, damping), V, G, damping)


def test_bits_do_not_depend_on_threads_or_repetition() -> None:
    V, G = random(9, 300), random(700, 300, seed=1)
    with threads(1):
        one = run(V, G, 0.5)
    for count in (2, 2, 3):
        with threads(count):
            assert torch.equal(run(V, G, 0.5), one)


def test_neither_input_is_written() -> None:
    V, G = random(3, 40), random(30, 40, seed=1)
    kept = V.clone(), G.clone()
    run(V, G, 0.5)
    assert torch.equal(V, kept[0])
    assert torch.equal(G, kept[1])


def test_the_paths_agree_on_long_rows() -> None:
    V, G = random(8, 5000), random(300, 5000, seed=1)
    assert_exact(run(V, G, 0.5), V, G, 0.5)

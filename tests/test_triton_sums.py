"""Triton's GFIM, Gram, DataInf, per-sample and top-k kernels against the oracle in numpy fp64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.ops import reference
from hyperinf_kernels.ops.topk import topk_empty
from hyperinf_kernels.ops.triton import entry, factors
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
    sentinelled,
)
from tests.triton_cases import allocations as allocations
from tests.triton_cases import through_the_dispatcher as through_the_dispatcher

pytestmark = on_device()
# largest error <= K x largest error of torch's own fp32 products, plus a few roundings
K, FLOOR = 2.0, 8 * EPS
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# --- GFIM and Gram ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "rows", "d"), [(1, 1, 1), (7, 3, 65), (6, 5, 60), (20, 4, 130)], ids=str
)
@pytest.mark.parametrize("side", ["cols", "rows"])
def test_gfim(
    samples: int, rows: int, d: int, side: str, dtype: torch.dtype, allocations: Allocations
) -> None:
    grads = random(samples, rows, d, dtype=dtype)
    size = d if side == "cols" else rows
    before = random(size, size, seed=1)
    C, intact = sentinelled(before)
    entry.gfim_accumulate_(C, poisoned(grads), side=side, alpha=0.3)
    expected = oracle.f64(before) + 0.3 * oracle.gfim_sum(grads, side)
    peer = reference.gfim_accumulate_(before.clone(), grads, side=side, alpha=0.3)
    oracle.assert_as_exact_as(C, expected, peer, k=K, floor=FLOOR)
    assert intact()


@pytest.mark.parametrize("batched", [False, True])
def test_long_sums_are_cut_and_added_in_order(
    batched: bool, monkeypatch: pytest.MonkeyPatch, allocations: Allocations
) -> None:
    from hyperinf_kernels.ops.triton import accumulate

    monkeypatch.setattr(accumulate, "LEAST_DEPTH", 48)
    lead = (3,) if batched else ()
    grads = random(*lead, 101, 2, 70)
    before = random(*lead, 70, 70, seed=1)
    C, intact = sentinelled(before)
    entry.gfim_accumulate_(C, poisoned(grads), side="cols", alpha=1.0)
    assert any(len(buffer) > 4 * 64 * 64 for buffer in allocations.buffers), "nothing was cut"
    allocations.assert_intact()
    assert intact()
    peer = reference.gfim_accumulate_(before.clone(), grads, side="cols", alpha=1.0)
    for index in np.ndindex(*lead):
        expected = oracle.f64(before[index]) + oracle.gfim_sum(grads[index])
        oracle.assert_as_exact_as(C[index], expected, peer[index], k=K, floor=FLOOR)
    added = C - before
    torch.testing.assert_close(added, added.mT, rtol=1e-5, atol=1e-4)
    again = before.clone()
    entry.gfim_accumulate_(again, grads, side="cols", alpha=1.0)
    assert torch.equal(again, C)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["cols", "rows"])
@pytest.mark.parametrize("share", [1 << 20, 100], ids=["C in L2", "C beyond L2"])
def test_gfim_of_delta_and_act_in_slices(
    share: int, side: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
    allocations: Allocations,
) -> None:  # fmt: skip
    from hyperinf_kernels.ops.triton import launch

    monkeypatch.setattr(entry, "l2_share", lambda arch: share)
    monkeypatch.setattr(launch, "l2_share", lambda arch: 3 * (4 * 21 + 5 * 25) * 2)
    monkeypatch.setattr(reference, "SLICE_NUMBERS", 2 * 4 * 21)
    delta, act = random(8, 5, 4, dtype=dtype), random(8, 5, 21, dtype=dtype, seed=1)
    size = 21 if side == "cols" else 4
    before = random(size, size, seed=2)
    C, intact = sentinelled(before)
    entry.gfim_accumulate_(C, poisoned(delta), poisoned(act), side=side, alpha=0.5)
    allocations.assert_intact()
    assert intact()
    grads = oracle.per_sample_grad(delta, act)
    expected = oracle.f64(before) + 0.5 * oracle.gfim_sum(grads, side)
    peer = reference.gfim_accumulate_(before.clone(), delta, act, side=side, alpha=0.5)
    oracle.assert_as_exact_as(C, expected, peer, k=K, floor=FLOOR)


def test_gfim_of_factors_adds_to_every_matrix_of_a_strided_batch() -> None:
    delta, act = random(2, 3, 5, 4), random(2, 3, 5, 9, seed=1)
    before = random(9, 9, 2, seed=2)
    C = before.clone().permute(2, 0, 1)
    entry.gfim_accumulate_(C, delta, act, side="cols", alpha=1.0)
    for b in range(2):
        expected = oracle.f64(before[..., b]) + oracle.gfim_sum(
            oracle.per_sample_grad(delta[b], act[b])
        )
        start = before[..., b].clone()
        peer = reference.gfim_accumulate_(start, delta[b], act[b], side="cols", alpha=1.0)
        oracle.assert_as_exact_as(C[b], expected, peer, k=K, floor=FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["one set", "two sets"])
def test_gram(dtype: torch.dtype, same: bool) -> None:
    first = random(67, 90, dtype=dtype)
    second = first if same else random(130, 90, seed=2)
    before = random(len(first), len(second), seed=1)
    K0, intact = sentinelled(before)
    G1 = poisoned(first)
    entry.gram_accumulate_(K0, G1, G1 if same else poisoned(second))
    peer = reference.gram_accumulate_(before.clone(), first, second)
    expected = oracle.f64(before) + oracle.gram(first, second)
    oracle.assert_as_exact_as(K0, expected, peer, k=K, floor=FLOOR)
    assert intact()


def test_a_transposed_sum_is_added_where_it_lies() -> None:
    G1, G2 = random(9, 30), random(12, 30, seed=1)
    K0 = torch.zeros(12, 9, device=DEVICE).mT
    entry.gram_accumulate_(K0, G1, G2)
    peer = reference.gram_accumulate_(torch.zeros(9, 12, device=DEVICE), G1, G2)
    oracle.assert_as_exact_as(K0, oracle.gram(G1, G2), peer, k=K, floor=FLOOR)


def test_a_sum_may_share_memory_with_its_rows() -> None:
    """Both are read before either is written, as in torch."""
    whole = random(140, 140)
    K0 = whole[:70, :70]
    expected = oracle.f64(K0) + oracle.gram(K0, K0)
    peer = reference.gram_accumulate_(K0.clone(), K0.clone(), K0.clone())
    entry.gram_accumulate_(K0, K0, K0)
    oracle.assert_as_exact_as(K0, expected, peer, k=K, floor=FLOOR)


@pytest.mark.skipif(not INTERPRETING, reason="a sparse file on CPU: set TRITON_INTERPRET=1")
def test_rows_two_to_the_26_numbers_apart(tmp_path: Path) -> None:
    """Beyond 32 bits after one step of the sum; the file is sparse."""
    apart, depth = 1 << 26, 40
    file = np.memmap(tmp_path / "rows", np.float16, "w+", shape=(apart * (depth - 1) + 3,))
    far = torch.from_numpy(file).as_strided((depth, 3), (apart, 1))
    near = random(depth, 3, dtype=torch.float16)
    far.copy_(near)
    C = torch.zeros(3, 3)
    entry.gfim_accumulate_(C, far.unsqueeze(1), side="cols", alpha=1.0)
    peer = reference.gfim_accumulate_(torch.zeros(3, 3), near.unsqueeze(1), side="cols", alpha=1.0)
    expected = oracle.gfim_sum(near.unsqueeze(1))
    oracle.assert_as_exact_as(C, expected, peer, k=K, floor=FLOOR)


# --- Sherman-Morrison ---------------------------------------------------------------------------


def datainf_case(V: Tensor, G: Tensor, lam: float, actual: Tensor) -> None:
    peer = reference.sherman_morrison(V, G, torch.tensor(lam, device=DEVICE))
    oracle.assert_as_exact_as(actual, oracle.datainf(V, G, lam), peer, k=K, floor=FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 2, 16, 19])
@pytest.mark.parametrize(("n", "columns"), [(1, 1), (5, 300), (37, 130)], ids=str)
def test_sherman_morrison(
    n: int, columns: int, queries: int, dtype: torch.dtype, allocations: Allocations
) -> None:
    V, G = random(queries, columns), random(n, columns, dtype=dtype, seed=1)
    W = entry.sherman_morrison(V, poisoned(G), torch.tensor(0.3, device=DEVICE))
    allocations.assert_intact()
    datainf_case(V, G, 0.3, W)


@pytest.mark.parametrize("queries", [1, 17])
def test_rows_beyond_the_cache_go_in_chunks(
    queries: int, monkeypatch: pytest.MonkeyPatch, allocations: Allocations
) -> None:
    from hyperinf_kernels.ops.triton import launch

    monkeypatch.setattr(launch, "L2_BYTES", dict.fromkeys((80, 90, 100), 3 * 200 * 4 * 20))
    V, G = random(queries, 200), random(53, 200, seed=1)
    assert launch.chunk_rows(200, 4, 80, 8) == 16
    W = entry.sherman_morrison(V, poisoned(G), torch.tensor(0.5, device=DEVICE))
    allocations.assert_intact()
    datainf_case(V, G, 0.5, W)


def test_every_batch_has_its_own_rows_and_damping() -> None:
    V, G = random(2, 3, 4, 33), random(2, 3, 20, 33, seed=1)
    lam = torch.tensor([[0.1, 0.5, 1.0], [2.0, 0.3, 0.2]], device=DEVICE)
    W = entry.sherman_morrison(V, G, lam)
    for index in np.ndindex(2, 3):
        datainf_case(V[index], G[index], float(lam[index]), W[index])


def test_strided_rows() -> None:
    V, G = random(3, 40), random(50, 40, seed=1)
    datainf_case(
        V, G[::2], 0.5, entry.sherman_morrison(V, G[::2], torch.tensor(0.5, device=DEVICE))
    )


# --- per-sample gradients that are never written ------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "tokens", "rows", "columns", "queries"),
    [(1, 1, 1, 1, 1), (3, 40, 8, 70, 9), (2, 5, 33, 130, 3)], ids=str,
)  # fmt: skip
def test_dots_and_norms(
    samples: int, tokens: int, rows: int, columns: int, queries: int, dtype: torch.dtype,
    allocations: Allocations,
) -> None:  # fmt: skip
    delta = random(samples, tokens, rows, dtype=dtype)
    act = random(samples, tokens, columns, dtype=dtype, seed=1)
    V = random(queries, rows, columns, seed=2)
    dots = factors.per_sample_dot(poisoned(delta), poisoned(act), poisoned(V), False)
    norms = factors.per_sample_norm_sq(poisoned(delta), poisoned(act), False)
    allocations.assert_intact()
    peer = reference.per_sample_dot(delta, act, V, False)
    oracle.assert_as_exact_as(
        dots, oracle.per_sample_dot(delta, act, V), peer, k=K, floor=FLOOR, what="dots"
    )
    peer = reference.per_sample_norm_sq(delta, act, False)
    oracle.assert_as_exact_as(
        norms, oracle.per_sample_norm_sq(delta, act), peer, k=K, floor=FLOOR, what="norms"
    )


def test_samples_of_any_batch_shape() -> None:
    delta, act, V = random(2, 3, 6, 4), random(2, 3, 6, 10, seed=1), random(2, 4, 10, seed=2)
    dots = factors.per_sample_dot(delta, act, V, False)
    assert dots.shape == (2, 3, 2)
    peer = reference.per_sample_dot(delta, act, V, False)
    oracle.assert_as_exact_as(dots, oracle.per_sample_dot(delta, act, V), peer, k=K, floor=FLOOR)
    none = factors.per_sample_dot(delta[:, :0], act[:, :0], V, False)
    assert none.shape == (2, 0, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("samples", "tokens", "rows", "columns"), [(1, 1, 1, 1), (3, 40, 8, 130), (2, 5, 33, 70)],
    ids=str,
)  # fmt: skip
def test_gradients(
    samples: int, tokens: int, rows: int, columns: int, dtype: torch.dtype,
    allocations: Allocations,
) -> None:  # fmt: skip
    delta = random(samples, tokens, rows, dtype=dtype)
    act = random(samples, tokens, columns, dtype=dtype, seed=1)
    grads = factors.per_sample_grad(poisoned(delta), poisoned(act))
    allocations.assert_intact()
    peer = reference.per_sample_grad(delta, act)
    oracle.assert_as_exact_as(grads, oracle.per_sample_grad(delta, act), peer, k=K, floor=FLOOR)


def test_factors_of_two_dtypes_and_strided_columns() -> None:
    delta, act = random(3, 6, 8, dtype=torch.float16)[..., ::2], random(3, 6, 10, seed=1)
    V = random(2, 10, 4, seed=2).mT
    peer = reference.per_sample_grad(delta, act)
    grads = factors.per_sample_grad(delta, act)
    oracle.assert_as_exact_as(grads, oracle.per_sample_grad(delta, act), peer, k=K, floor=FLOOR)
    dots, peer = factors.per_sample_dot(delta, act, V, False), peer.flatten(1) @ V.flatten(1).mT
    oracle.assert_as_exact_as(dots, oracle.per_sample_dot(delta, act, V), peer, k=K, floor=FLOOR)


def test_no_tokens_are_zero_gradients() -> None:
    delta, act, V = random(3, 0, 4), random(3, 0, 9), random(9, 4, 9, seed=2)
    assert torch.equal(factors.per_sample_grad(delta, act), torch.zeros(3, 4, 9, device=DEVICE))
    for queries in (2, 9):
        dots = factors.per_sample_dot(delta, act, V[:queries], False)
        assert torch.equal(dots, torch.zeros(3, queries, device=DEVICE))
    lam = torch.tensor(0.25, device=DEVICE)
    assert torch.equal(factors.sherman_morrison_factored(V, delta, act, lam), 4 * V)


def test_more_queries_than_the_fused_kernel_holds_are_refused() -> None:
    from hyperinf_kernels.ops.triton.per_sample import per_sample

    with pytest.raises(ValueError, match="up to 8 queries at once, got 9"):
        per_sample(random(2, 3, 4), random(2, 3, 5), random(9, 4, 5))


@pytest.fixture(params=[None, 2], ids=["one slice", "slices of two"])
def slices_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> object:
    """L2 so small that `n` gradients of 4 x 70 are a slice."""
    from hyperinf_kernels.ops.triton import launch

    if request.param:
        monkeypatch.setattr(launch, "l2_share", lambda arch: request.param * (4 * 70 + 11 * 74) * 2)
    return request.param


@pytest.mark.usefixtures("slices_of")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_queries_meet_the_gradients_in_slices(
    dtype: torch.dtype, allocations: Allocations
) -> None:
    delta, act = random(5, 11, 4, dtype=dtype), random(5, 11, 70, dtype=dtype, seed=1)
    V = random(19, 4, 70, seed=2)
    dots = factors.per_sample_dot(poisoned(delta), poisoned(act), poisoned(V), False)
    allocations.assert_intact()
    peer = reference.per_sample_dot(delta, act, V, False)
    oracle.assert_as_exact_as(dots, oracle.per_sample_dot(delta, act, V), peer, k=K, floor=FLOOR)


@pytest.mark.usefixtures("slices_of")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 5, 17])
def test_factored_sherman_morrison_equals_the_one_on_gradients(
    queries: int, dtype: torch.dtype, allocations: Allocations
) -> None:
    delta = random(9, 11, 4, dtype=dtype)
    act = random(9, 11, 70, dtype=dtype, seed=1)
    V = random(queries, 4, 70, seed=2)
    lam = torch.tensor(2.0, device=DEVICE)
    W = factors.sherman_morrison_factored(V, poisoned(delta), poisoned(act), lam)
    allocations.assert_intact()
    grads = oracle.per_sample_grad(delta, act)
    expected = oracle.datainf(V.flatten(1), oracle.flatten(grads), 2.0)
    rows = reference.per_sample_grad(delta, act).flatten(1)
    peer = reference.sherman_morrison(V.flatten(1), rows, lam)
    oracle.assert_as_exact_as(W.flatten(1), expected, peer, k=K, floor=FLOOR)


@pytest.mark.usefixtures("through_the_dispatcher")
def test_the_public_factored_form_takes_batches_and_says_who_ran() -> None:
    delta, act, V = random(2, 3, 6, 4), random(2, 3, 6, 10, seed=1), random(2, 2, 4, 10, seed=2)
    lam = torch.tensor([0.5, 2.0], device=DEVICE)
    with hk.trace_backends() as log:
        W = hk.sherman_morrison(V, delta, lam, act=act)
    assert [plan.backend for plan in log] == ["triton"]
    assert log[0] == hk.explain("sherman_morrison_factored", V, delta, act)
    for b in range(2):
        grads = reference.per_sample_grad(delta[b], act[b]).flatten(1)
        datainf_case(V[b].flatten(1), grads, float(lam[b]), W[b].flatten(1))


# --- thousands, of which the interpreter runs a few programs -------------------------------------

THOUSANDS = 5000
CHOSEN = [0, 1, THOUSANDS - 2, THOUSANDS - 1]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Run only the CHOSEN programs of a kernel, by module and name."""

    def replace(module: str, kernel: str) -> None:
        if INTERPRETING:
            home = importlib.import_module(f"hyperinf_kernels.ops.triton.{module}")
            monkeypatch.setattr(home, kernel, FewPrograms(getattr(home, kernel), CHOSEN))

    return replace


def test_thousands_of_samples(few: Callable[[str, str], None]) -> None:
    few("per_sample", "_per_sample_kernel")
    few("grad", "_grad_kernel")
    delta, act = random(THOUSANDS, 2, 3), random(THOUSANDS, 2, 5, seed=1)
    V = random(2, 3, 5, seed=2)
    d, a = delta[CHOSEN], act[CHOSEN]
    dots = factors.per_sample_dot(delta, act, V, False)[CHOSEN]
    peer = reference.per_sample_dot(d, a, V, False)
    oracle.assert_as_exact_as(dots, oracle.per_sample_dot(d, a, V), peer, k=K, floor=FLOOR)
    grads = factors.per_sample_grad(delta, act)[CHOSEN]
    peer = reference.per_sample_grad(d, a)
    oracle.assert_as_exact_as(grads, oracle.per_sample_grad(d, a), peer, k=K, floor=FLOOR)


def test_thousands_of_sums(few: Callable[[str, str], None]) -> None:
    few("accumulate", "_accumulate_kernel")
    grads = random(THOUSANDS, 3, 2, 5)
    C = torch.zeros(THOUSANDS, 5, 5, device=DEVICE)
    entry.gfim_accumulate_(C, grads, side="cols", alpha=1.0)
    for b in CHOSEN:
        peer = reference.gfim_accumulate_(torch.zeros_like(C[b]), grads[b], side="cols", alpha=1.0)
        oracle.assert_as_exact_as(C[b], oracle.gfim_sum(grads[b]), peer, k=K, floor=FLOOR)


@pytest.mark.parametrize("queries", [1, 3])
def test_thousands_of_blocks(queries: int, few: Callable[[str, str], None]) -> None:
    few("sherman_morrison", "_dots_kernel")
    few("sherman_morrison", "_sum_kernel")
    V, G = random(THOUSANDS, queries, 6), random(THOUSANDS, 4, 6, seed=1)
    lam = torch.linspace(0.1, 1, THOUSANDS, device=DEVICE)
    W = entry.sherman_morrison(V, G, lam)
    for b in CHOSEN:
        datainf_case(V[b], G[b], float(lam[b]), W[b])


def test_thousands_of_queries_keep_their_best(few: Callable[[str, str], None]) -> None:
    few("topk", "_topk_kernel")
    scores = random(THOUSANDS, 9)
    values, positions = topk_empty(THOUSANDS, 2, device=DEVICE)
    entry.topk_merge_(values, positions, scores, 0, False)
    order = scores[CHOSEN].argsort(dim=1, stable=True)[:, :2]
    assert torch.equal(positions[CHOSEN], order)
    assert torch.equal(values[CHOSEN], scores[CHOSEN].gather(1, order))


# --- streaming top-k ----------------------------------------------------------------------------


def merged(scores: Tensor, k: int, sizes: tuple[int, ...], largest: bool) -> tuple[Tensor, Tensor]:
    """(values, positions) of a stream cut into batches of these sizes."""
    watched, first = Allocations(), 0
    kept = topk_empty(len(scores), k, device=DEVICE)
    values, positions = (watched.take(t.shape, t.dtype, DEVICE).copy_(t) for t in kept)
    for size in sizes:
        part = poisoned(scores[:, first : first + size])
        entry.topk_merge_(values, positions, part, first, largest)
        first += size
    watched.assert_intact()
    return values, positions


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(
    ("k", "sizes"), [(1, (1,)), (5, (40, 3, 100)), (100, (70, 200)), (300, (310,))], ids=str
)
def test_topk_of_a_stream_is_the_sorted_prefix(
    k: int, sizes: tuple[int, ...], largest: bool
) -> None:
    # few distinct values, so that ties are everywhere
    scores = (random(3, sum(sizes)) * 4).round() / 4
    values, positions = merged(scores, k, sizes, largest)
    signed = (-scores if largest else scores).double().cpu().numpy()
    order = np.argsort(signed, axis=1, kind="stable")[:, :k]
    kept = order.shape[1]
    assert (positions[:, :kept].cpu().numpy() == order).all()
    best = np.take_along_axis(scores.cpu().numpy(), order, 1)
    assert (values[:, :kept].cpu().numpy() == best).all()
    assert (positions[:, kept:] == -1).all()
    assert values[:, kept:].isnan().all()


@pytest.mark.parametrize("largest", [False, True])
def test_topk_orders_both_zeros_by_position(largest: bool) -> None:
    scores = torch.tensor([[0.0, -0.0, 5.0, -5.0, -0.0, 0.0]], device=DEVICE)
    _, positions = merged(scores, 5, (3, 3), largest)
    assert positions.tolist() == [[2 if largest else 3, 0, 1, 4, 5]]


def test_topk_never_keeps_nan_of_either_sign() -> None:
    scores = torch.tensor([[float("nan"), 2.0, float("-inf"), float("nan")]], device=DEVICE)
    scores[0, 3] = -scores[0, 0]
    values, positions = merged(scores, 3, (4,), False)
    assert positions.tolist() == [[2, 1, -1]]
    assert values[0, :2].tolist() == [float("-inf"), 2.0]


def test_topk_positions_end_at_31_bits() -> None:
    values, positions = topk_empty(1, 4, device=DEVICE)
    last = 2**31 - 3
    entry.topk_merge_(values, positions, torch.tensor([[1.0, 1.0, 0.0]], device=DEVICE), last, True)
    assert positions.tolist() == [[last, last + 1, last + 2, -1]]


@pytest.mark.usefixtures("through_the_dispatcher")
@pytest.mark.parametrize(("k", "backend"), [(128, "triton"), (513, "torch")])
def test_the_panel_of_top_k_merges_where_the_scores_are(k: int, backend: str) -> None:
    from hyperinf_kernels.attribution.scores import TopKPanel

    scores = (random(2, 300) * 4).round()
    panel = TopKPanel(2, k)
    with hk.trace_backends() as log:
        for first in range(0, 300, 100):
            panel.add(list(range(first, first + 100)), scores[:, first : first + 100])
    assert {plan.backend for plan in log} == {backend}
    found = panel.finish()
    order = np.argsort(scores.cpu().numpy(), axis=1, kind="stable")[:, :k]
    assert found["ids"] == order.tolist()
    order = np.argsort(-scores.cpu().numpy(), axis=1, kind="stable")[:, :k]
    assert found["harmful"].ids == order.tolist()


# --- registration -------------------------------------------------------------------------------


def _accumulate() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.accumulate import accumulate_

    L = random(1, 8, 5)
    return accumulate_, (random(1, 5, 5), L, L, 0.5, "tf32x3", True)


def _sherman_morrison() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.sherman_morrison import sherman_morrison

    return sherman_morrison, (random(1, 2, 9), random(1, 4, 9), torch.ones(1, device=DEVICE))


def _per_sample() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.per_sample import per_sample

    return per_sample, (random(2, 3, 4), random(2, 3, 5), random(2, 4, 5))


def _gradients() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.grad import per_sample_grad_

    return per_sample_grad_, (random(2, 4, 5), random(2, 3, 4), random(2, 3, 5))


def _factored() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.sherman_morrison import sherman_morrison_factored

    lam = torch.ones(1, device=DEVICE)
    return sherman_morrison_factored, (random(2, 4, 5), random(6, 3, 4), random(6, 3, 5), lam)


def _topk() -> tuple[object, tuple[object, ...]]:
    from hyperinf_kernels.ops.triton.topk import topk_merge_

    return topk_merge_, (*topk_empty(2, 3, device=DEVICE), random(2, 7), 0, False)


@pytest.mark.parametrize(
    "case", [_accumulate, _sherman_morrison, _per_sample, _gradients, _factored, _topk]
)
def test_opcheck(case: Callable[[], tuple[object, tuple[object, ...]]]) -> None:
    op, arguments = case()
    torch.library.opcheck(op, arguments)

"""sherman_morrison against the mean of explicit inverses in fp64, and how its backend is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperinf_kernels as hk
from hyperinf_kernels.ops import cpu, reference
from tests import oracle

# Another order of summation may be a few times worse than the peer's in one entry, not more.
K = 4.0
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float32, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16"),
    pytest.param(torch.float64, torch.float64, id="fp64"),
]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def peer(v: torch.Tensor, g: torch.Tensor, damping: float, acc: torch.dtype) -> torch.Tensor:
    v, g = v.to(acc), g.to(acc)
    weights = (v @ g.mT) / (damping + g.square().sum(-1))[..., None, :]
    return (v - weights @ g / g.shape[-2]) / damping


def assert_exact(
    actual: torch.Tensor, v: torch.Tensor, g: torch.Tensor, damping: float, acc: torch.dtype
) -> None:
    assert actual.dtype == acc
    expected = oracle.datainf(v, g, damping)
    floor = 8 * torch.finfo(acc).eps
    oracle.assert_as_exact_as(actual, expected, peer(v, g, damping, acc), k=K, floor=floor)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "size"),
    [
        pytest.param(3, 7, 12, id="few rows"),
        pytest.param(1, 1, 5, id="one row, one query"),
        pytest.param(2, 300, 9, id="many rows"),
        pytest.param(9, 4, 1000, id="long rows"),
        pytest.param(4, 6, 1, id="D=1"),
    ],
)
def test_direction_is_the_mean_of_the_rank_one_inverses(
    m: int, n: int, size: int, dtype: torch.dtype, acc: torch.dtype
) -> None:
    v, g = random(m, size, dtype=dtype), random(n, size, dtype=dtype, seed=1)
    assert_exact(hk.sherman_morrison(v, g, 0.5), v, g, 0.5, acc)


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0, 1e4], ids="damping={:g}".format)
def test_damping_spans_ten_decades(damping: float) -> None:
    v, g = random(3, 12), random(7, 12, seed=1)
    assert_exact(hk.sherman_morrison(v, g, damping), v, g, damping, torch.float32)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6], ids="gradients x {:g}".format)
def test_tiny_and_huge_gradients_neither_vanish_nor_overflow(scale: float) -> None:
    """lam follows the gradients, so lam and ||g||^2 may both be near the edge of fp32."""
    v, g = random(3, 12), random(7, 12, seed=1) * scale
    damping = 0.1 * scale**2
    assert_exact(hk.sherman_morrison(v, g, damping), v, g, damping, torch.float32)


def test_damping_may_be_a_tensor() -> None:
    v, g = random(3, 12), random(7, 12, seed=1)
    by_number = hk.sherman_morrison(v, g, 0.25)
    assert torch.equal(hk.sherman_morrison(v, g, torch.tensor(0.25)), by_number)


@pytest.mark.parametrize("lead", [(3,), (2, 2)], ids=["stack", "nested stack"])
def test_stacked_blocks_are_independent_and_have_their_own_damping(lead: tuple[int, ...]) -> None:
    v, g = random(*lead, 2, 6), random(*lead, 5, 6, seed=1)
    damping = torch.rand(lead, generator=torch.Generator().manual_seed(0)) + 0.1
    actual = hk.sherman_morrison(v, g, damping)
    for index in np.ndindex(*lead):
        assert_exact(actual[index], v[index], g[index], float(damping[index]), torch.float32)


def test_query_orthogonal_to_every_row_is_only_divided_by_the_damping() -> None:
    v, g = torch.zeros(1, 8), random(5, 8)
    v[0, 3], g[:, 3] = 2.0, 0.0
    assert torch.equal(hk.sherman_morrison(v, g, 0.25), 4 * v)


def test_zero_row_counts_as_identity_over_damping() -> None:
    v, g = random(2, 6), random(3, 6, seed=1)
    g[1] = 0
    assert_exact(hk.sherman_morrison(v, g, 0.5), v, g, 0.5, torch.float32)


def test_low_precision_rows_are_accumulated_in_fp32() -> None:
    """||g||^2 = 9e7 overflows fp16."""
    g = torch.full((2, 1000), 300.0, dtype=torch.float16)
    v = random(1, 1000, dtype=torch.float16)
    assert_exact(hk.sherman_morrison(v, g, 1.0), v, g, 1.0, torch.float32)


def test_no_queries_give_no_rows() -> None:
    assert hk.sherman_morrison(torch.zeros(0, 6), random(3, 6), 0.1).shape == (0, 6)


@pytest.mark.parametrize(
    ("of_v", "of_g", "acc"),
    [
        pytest.param(torch.bfloat16, torch.float32, torch.float32, id="bf16+fp32"),
        pytest.param(torch.float32, torch.float64, torch.float64, id="fp32+fp64"),
        pytest.param(torch.float64, torch.float16, torch.float64, id="fp64+fp16"),
    ],
)
def test_mixed_types_promote(of_v: torch.dtype, of_g: torch.dtype, acc: torch.dtype) -> None:
    v, g = random(3, 12, dtype=of_v), random(7, 12, dtype=of_g, seed=1)
    assert_exact(hk.sherman_morrison(v, g, 0.5), v, g, 0.5, acc)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t.mT.contiguous().mT, id="transposed"),
        pytest.param(lambda t: t.repeat_interleave(2, dim=-1)[..., ::2], id="strided"),
        pytest.param(lambda t: t[:1].expand_as(t), id="expanded"),
        pytest.param(lambda t: t.repeat(2, 1)[::2], id="every other row"),
    ],
)
def test_memory_layout_does_not_change_values(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    v, g = view(random(4, 12)), view(random(8, 12, seed=1))
    assert_exact(hk.sherman_morrison(v, g, 0.5), v, g, 0.5, torch.float32)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(order=st.permutations(range(9)))
def test_order_of_the_training_rows_does_not_matter(order: list[int]) -> None:
    v, g = random(2, 6), random(9, 6, seed=1)
    assert_exact(hk.sherman_morrison(v, g[order], 0.5), v, g, 0.5, torch.float32)


def test_inputs_are_left_alone_and_results_repeat_bit_for_bit() -> None:
    v, g = random(3, 50), random(70, 50, seed=1)
    kept = v.clone(), g.clone()
    assert torch.equal(hk.sherman_morrison(v, g, 0.5), hk.sherman_morrison(v, g, 0.5))
    assert torch.equal(v, kept[0])
    assert torch.equal(g, kept[1])


# --- rows as factors -----------------------------------------------------------------------------


def factors(
    lead: tuple[int, ...], n: int, tokens: int, rows: int, cols: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    delta = random(*lead, n, tokens, rows, dtype=dtype, seed=1)
    return delta, random(*lead, n, tokens, cols, dtype=dtype, seed=2)


def assert_factored(
    actual: torch.Tensor, v: torch.Tensor, delta: torch.Tensor, act: torch.Tensor, damping: float,
    acc: torch.dtype,
) -> None:  # fmt: skip
    assert actual.dtype == acc
    assert actual.shape == v.shape
    grads = oracle.per_sample_grad(delta, act)
    expected = oracle.datainf(oracle.flatten(v), oracle.flatten(grads), damping)
    formed = (delta.to(acc).mT @ act.to(acc)).flatten(1)
    floor = 8 * torch.finfo(acc).eps
    same = peer(v.flatten(1), formed, damping, acc)
    oracle.assert_as_exact_as(actual.flatten(1), expected, same, k=K, floor=floor)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("slice_numbers", [1 << 24, 3 * 20], ids=["one slice", "slices of three"])
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "tokens"),
    [
        pytest.param(3, 8, 6, id="few"),
        pytest.param(1, 1, 1, id="one of each"),
        pytest.param(2, 40, 3, id="many samples"),
    ],
)
def test_factors_give_the_direction_of_their_gradients(
    m: int, n: int, tokens: int, dtype: torch.dtype, acc: torch.dtype, slice_numbers: int,
    backend: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HYPERINF_BACKEND", backend)
    monkeypatch.setattr(cpu, "CACHED_NUMBERS", slice_numbers)
    monkeypatch.setattr(reference, "SLICE_NUMBERS", slice_numbers)
    delta, act = factors((), n, tokens, 4, 5, dtype)
    v = random(m, 4, 5, dtype=dtype)
    assert_factored(hk.sherman_morrison(v, delta, 0.5, act=act), v, delta, act, 0.5, acc)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_stacked_factors_are_independent_and_have_their_own_damping(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", backend)
    delta, act = factors((2, 3), 7, 4, 3, 5, torch.float32)
    v, damping = random(2, 3, 2, 3, 5), torch.linspace(0.1, 2, 6).view(2, 3)
    actual = hk.sherman_morrison(v, delta, damping, act=act)
    for index in np.ndindex(2, 3):
        each = (v[index], delta[index], act[index], float(damping[index]))
        assert_factored(actual[index], *each, torch.float32)


def test_no_token_means_zero_gradients() -> None:
    delta, act = factors((), 3, 0, 4, 5, torch.float32)
    v = random(2, 4, 5)
    assert torch.equal(hk.sherman_morrison(v, delta, 0.25, act=act), 4 * v)


def test_factors_of_two_dtypes_and_any_layout() -> None:
    delta, act = factors((), 6, 8, 4, 5, torch.bfloat16)
    delta, act = delta[:, ::2], act.float().mT.contiguous().mT[:, ::2]
    v = random(2, 5, 4).mT
    actual = hk.sherman_morrison(v, delta, 0.5, act=act)
    assert_factored(actual, v, delta, act, 0.5, torch.float32)


def test_all_gradients_are_never_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of the torch path is a slice."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    monkeypatch.setattr(reference, "SLICE_NUMBERS", 1000)
    delta, act = factors((), 50, 1, 10, 20, torch.float32)
    v = random(3, 10, 20)
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")
    with Watch():
        hk.sherman_morrison(v, delta, 0.5, act=act)
    assert largest <= max(1000, delta.numel(), act.numel()) < 50 * 10 * 20


@pytest.mark.parametrize(
    ("v", "delta", "act"),
    [
        pytest.param((2, 4, 5), (0, 3, 4), (0, 3, 5), id="no training rows"),
        pytest.param((2, 4, 5), (6, 3, 4), (6, 2, 5), id="tokens differ"),
        pytest.param((2, 4, 6), (6, 3, 4), (6, 3, 5), id="V has another side"),
        pytest.param((2, 20), (6, 3, 4), (6, 3, 5), id="V is flattened"),
        pytest.param((2, 2, 4, 5), (3, 6, 3, 4), (3, 6, 3, 5), id="stacks differ"),
    ],
)
def test_shapes_of_factors_are_refused_by_name(
    v: tuple[int, ...], delta: tuple[int, ...], act: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"\b(V|delta)\b.*\d"):
        hk.sherman_morrison(torch.ones(v), torch.ones(delta), 0.1, act=torch.ones(act))


def test_damping_is_checked_in_the_factored_form_too() -> None:
    delta, act = factors((), 3, 2, 4, 5, torch.float32)
    for bad in (0.0, math.nan, torch.tensor(-1.0)):
        with pytest.raises(ValueError, match="damping"):
            hk.sherman_morrison(torch.ones(1, 4, 5), delta, bad, act=act)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("v", "g"),
    [
        pytest.param((2, 6), (0, 6), id="no training rows"),
        pytest.param((2, 6), (3, 5), id="row lengths differ"),
        pytest.param((6,), (3, 6), id="query one-dimensional"),
        pytest.param((2, 6), (6,), id="rows one-dimensional"),
        pytest.param((2, 2, 6), (3, 3, 6), id="stacks differ"),
    ],
)
def test_shapes_are_refused_by_name(v: tuple[int, ...], g: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=oracle.naming({"V": v, "G": g})):
        hk.sherman_morrison(torch.zeros(v), torch.zeros(g), 0.1)


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("make", [float, torch.tensor], ids=["number", "tensor"])
def test_damping_must_be_positive_and_finite(
    damping: float, make: Callable[[float], object]
) -> None:
    with pytest.raises(ValueError, match="damping"):
        hk.sherman_morrison(torch.ones(2, 6), torch.ones(3, 6), make(damping))


def test_damping_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="damping"):
        hk.sherman_morrison(torch.ones(2, 2, 6), torch.ones(2, 3, 6), torch.ones(5))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: t.long(), id="int64"),
        pytest.param(lambda t: t.to(torch.complex64), id="complex"),
        pytest.param(lambda t: t.tolist(), id="list"),
        pytest.param(lambda t: t.to("meta"), id="another device"),
    ],
)
def test_unsupported_operands_are_refused_by_name(make: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\bG\b"):
        hk.sherman_morrison(torch.ones(2, 6), make(torch.ones(3, 6)), 0.1)


# --- which backend ran, and why -----------------------------------------------------------------


def test_explain_is_the_plan_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")
    v, g = torch.ones(2, 6), torch.ones(3, 6)
    plan = hk.explain("sherman_morrison", v, g)
    with hk.trace_backends() as log:
        assert log == []
        hk.sherman_morrison(v, g, 0.1)
    assert isinstance(plan, hk.Plan)
    assert plan.backend == "torch"
    assert "sherman_morrison" in plan.kernel
    assert plan.reason
    assert log == [plan]


CALLS: dict[str, tuple[torch.Tensor, ...]] = {
    "schulz_inverse": (torch.eye(3),),
    "spd_inverse": (torch.eye(3),),
    "schulz_solve": (torch.eye(3), torch.ones(2, 3)),
    "per_sample_grad": (torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
    "per_sample_norm_sq": (torch.ones(2, 3, 4), torch.ones(2, 3, 5)),
    "per_sample_dot": (torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(6, 4, 5)),
    "pairwise_dot": (*[torch.ones(2, 3, 4)] * 2, *[torch.ones(6, 1, 4)] * 2),
    "gfim_accumulate_": (torch.zeros(5, 5), torch.ones(2, 3, 5)),
    "gfim_accumulate_ of factors": (torch.zeros(5, 5), *[torch.ones(2, 3, 5)] * 2),
    "gram_accumulate_": (torch.zeros(2, 2), torch.ones(2, 3)),
    "sherman_morrison": (torch.ones(2, 6), torch.ones(3, 6)),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_public_op_can_be_explained_by_its_name(call: str) -> None:
    op, args = call.split()[0], CALLS[call]
    plan = hk.explain(op, *args)
    with hk.trace_backends() as log:
        getattr(hk, op)(*args, *((0.1,) if op == "sherman_morrison" else ()))
    assert plan in log


def test_the_factored_form_is_explained_by_a_name_of_its_own() -> None:
    delta, act = factors((), 3, 2, 4, 5, torch.float32)
    v = torch.ones(2, 4, 5)
    plan = hk.explain("sherman_morrison_factored", v, delta, act)
    with hk.trace_backends() as log:
        hk.sherman_morrison(v, delta, 0.1, act=act)
    assert log[0] == plan


def test_trace_lists_plans_in_call_order_and_stops_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")
    delta, act = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    with hk.trace_backends() as log:
        hk.gram_accumulate_(torch.zeros(2, 2), torch.ones(2, 6))
        hk.per_sample_grad(delta, act)
        with hk.trace_backends() as inner:
            hk.sherman_morrison(torch.ones(2, 6), torch.ones(3, 6), 0.1)
        hk.per_sample_norm_sq(delta, act)
    hk.per_sample_grad(delta, act)
    called = ["gram_accumulate_", "per_sample_grad", "sherman_morrison", "per_sample_norm_sq"]
    assert [name in plan.kernel for name, plan in zip(called, log, strict=True)] == [True] * 4
    assert [plan.kernel for plan in inner] == [log[2].kernel]
    assert {plan.backend for plan in log} == {"torch"}


def test_trace_ends_even_when_the_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), hk.trace_backends() as log:
        raise ZeroDivisionError
    hk.per_sample_grad(torch.ones(2, 3, 4), torch.ones(2, 3, 5))
    assert log == []


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
def test_backend_that_cannot_serve_falls_back_or_raises_with_its_reason(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton has no CPU target, so a CPU tensor is a fallback on every machine."""
    monkeypatch.setenv("HYPERINF_BACKEND", "triton")
    monkeypatch.setenv("HYPERINF_STRICT", "1" if strict else "0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    v, g = random(2, 6), random(3, 6, seed=1)
    if strict:
        with pytest.raises(hk.BackendError, match="triton"):
            hk.sherman_morrison(v, g, 0.5)
        with pytest.raises(hk.BackendError, match="triton"):
            hk.explain("sherman_morrison", v, g)
        return
    with hk.trace_backends() as log:
        assert_exact(hk.sherman_morrison(v, g, 0.5), v, g, 0.5, torch.float32)
    assert log[0].backend != "triton"
    assert "triton" in log[0].reason


def test_unknown_backend_and_unknown_op_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(hk.BackendError, match="sherman_morison"):
        hk.explain("sherman_morison", torch.ones(2, 6), torch.ones(3, 6))
    monkeypatch.setenv("HYPERINF_BACKEND", "tirton")
    with pytest.raises(hk.BackendError, match="tirton"):
        hk.sherman_morrison(torch.ones(2, 6), torch.ones(3, 6), 0.1)

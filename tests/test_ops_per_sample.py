"""per_sample_grad, per_sample_norm_sq, per_sample_dot and pairwise_dot against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperinf_kernels as hk
from tests import oracle

# Another order of summation may be a few times worse than the peer's in one entry, not more.
K = 4.0
METHODS = ["auto", "materialise", "ghost"]
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float32, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16"),
    pytest.param(torch.float64, torch.float64, id="fp64"),
]
SHAPES = [  # leading dims, T, O, I
    pytest.param((), 5, 4, 6, id="one sample"),
    pytest.param((5,), 7, 3, 10, id="batch"),
    pytest.param((2, 3), 4, 5, 6, id="batch of batches"),
    pytest.param((4,), 1, 3, 2, id="one token"),
    pytest.param((3,), 70, 2, 33, id="many tokens, LoRA rank"),
    pytest.param((3,), 2, 40, 30, id="few tokens, wide layer"),
    pytest.param((6,), 3, 1, 1, id="d=1"),
]
EMPTY = [
    pytest.param((0,), 4, id="no samples"),
    pytest.param((3,), 0, id="no tokens"),
    pytest.param((2, 0), 4, id="no samples in a batch of batches"),
]
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda t: t[:1].expand_as(t),
    "shifted": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view_as(t),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def factors(
    lead: tuple[int, ...], t: int, o: int, i: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    return random(*lead, t, o, dtype=dtype, seed=seed), random(*lead, t, i, dtype=dtype, seed=seed)


# --- the same expressions, computed naively by torch in the accumulation type -------------------


def peer_grad(delta: torch.Tensor, act: torch.Tensor, acc: torch.dtype) -> torch.Tensor:
    return delta.to(acc).mT @ act.to(acc)


def peer_dot(
    delta: torch.Tensor, act: torch.Tensor, v: torch.Tensor, acc: torch.dtype, method: str
) -> torch.Tensor:
    """V (m, O, I) -> (..., m)."""
    if method == "ghost":
        moved = torch.einsum("...to,moi->...mti", delta.to(acc), v.to(acc))
        return (moved * act.to(acc)[..., None, :, :]).sum((-2, -1))
    return (peer_grad(delta, act, acc)[..., None, :, :] * v.to(acc)).sum((-2, -1))


def peer_norm_sq(
    delta: torch.Tensor, act: torch.Tensor, acc: torch.dtype, method: str
) -> torch.Tensor:
    delta, act = delta.to(acc), act.to(acc)
    if method == "ghost":
        return ((delta @ delta.mT) * (act @ act.mT)).sum((-2, -1))
    return peer_grad(delta, act, acc).square().sum((-2, -1))


def worst_peer(expected: oracle.Array, *peers: torch.Tensor) -> torch.Tensor:
    """`auto` may take either form, so it is held to the less exact one."""
    reference = torch.from_numpy(expected)
    return max(peers, key=lambda peer: (peer - reference).abs().max().item())


def assert_exact(
    actual: torch.Tensor, expected: oracle.Array, peer: torch.Tensor, acc: torch.dtype
) -> None:
    assert actual.dtype == acc
    oracle.assert_as_exact_as(actual, expected, peer, k=K, floor=8 * torch.finfo(acc).eps)


def assert_norms_exact(
    delta: torch.Tensor, act: torch.Tensor, acc: torch.dtype, method: str
) -> None:
    expected = oracle.per_sample_norm_sq(delta, act)
    forms = ["materialise", "ghost"] if method == "auto" else [method]
    peers = [peer_norm_sq(delta, act, acc, form) for form in forms]
    actual = hk.per_sample_norm_sq(delta, act, method=method)
    assert_exact(actual, expected, worst_peer(expected, *peers), acc)


def assert_dots_exact(
    delta: torch.Tensor, act: torch.Tensor, v: torch.Tensor, acc: torch.dtype, method: str
) -> None:
    expected = oracle.per_sample_dot(delta, act, v)
    forms = ["materialise", "ghost"] if method == "auto" else [method]
    peers = [peer_dot(delta, act, v, acc, form) for form in forms]
    actual = hk.per_sample_dot(delta, act, v, method=method)
    assert_exact(actual, expected, worst_peer(expected, *peers), acc)


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(("lead", "t", "o", "i"), SHAPES)
def test_per_sample_grad_matches_the_oracle(
    lead: tuple[int, ...], t: int, o: int, i: int, dtype: torch.dtype, acc: torch.dtype
) -> None:
    delta, act = factors(lead, t, o, i, dtype)
    expected = oracle.per_sample_grad(delta, act)
    assert_exact(hk.per_sample_grad(delta, act), expected, peer_grad(delta, act, acc), acc)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(("lead", "t", "o", "i"), SHAPES)
def test_per_sample_norm_sq_matches_the_oracle(
    lead: tuple[int, ...], t: int, o: int, i: int, dtype: torch.dtype, acc: torch.dtype, method: str
) -> None:
    assert_norms_exact(*factors(lead, t, o, i, dtype), acc, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(("lead", "t", "o", "i"), SHAPES)
def test_per_sample_dot_matches_the_oracle(
    lead: tuple[int, ...], t: int, o: int, i: int, dtype: torch.dtype, acc: torch.dtype, method: str
) -> None:
    v = random(4, o, i, dtype=dtype, seed=3)
    assert_dots_exact(*factors(lead, t, o, i, dtype), v, acc, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=["one sample", "batch", "nested batch"])
def test_per_sample_dot_with_one_matrix_drops_the_query_axis(
    lead: tuple[int, ...], method: str
) -> None:
    delta, act = factors(lead, 4, 3, 6)
    v = random(3, 6, seed=3)
    actual = hk.per_sample_dot(delta, act, v, method=method)
    expected = oracle.per_sample_dot(delta, act, v)
    peers = [peer_dot(delta, act, v[None], torch.float32, m)[..., 0] for m in METHODS]
    assert_exact(actual, expected, worst_peer(expected, *peers), torch.float32)


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(
    ("b1", "t1", "b2", "t2", "o", "i"),
    [
        pytest.param(4, 5, 3, 7, 3, 6, id="unequal lengths"),
        pytest.param(1, 1, 1, 1, 1, 1, id="d=1"),
        pytest.param(2, 60, 3, 50, 2, 9, id="many tokens"),
        pytest.param(3, 2, 2, 1, 30, 20, id="few tokens"),
    ],
)
def test_pairwise_dot_matches_the_oracle(
    b1: int, t1: int, b2: int, t2: int, o: int, i: int, dtype: torch.dtype, acc: torch.dtype
) -> None:
    first, second = factors((b1,), t1, o, i, dtype), factors((b2,), t2, o, i, dtype, seed=9)
    expected = oracle.pairwise_dot(*first, *second)
    materialised = peer_grad(*first, acc).flatten(1) @ peer_grad(*second, acc).flatten(1).T
    deltas = torch.einsum("aso,bto->abst", first[0].to(acc), second[0].to(acc))
    acts = torch.einsum("asi,bti->abst", first[1].to(acc), second[1].to(acc))
    peer = worst_peer(expected, materialised, (deltas * acts).sum((-2, -1)))
    assert_exact(hk.pairwise_dot(*first, *second), expected, peer, acc)


def test_pairwise_dot_maps_over_leading_dims() -> None:
    first, second = factors((2, 3), 4, 2, 5), factors((2, 4), 6, 2, 5, seed=9)
    each = [hk.pairwise_dot(*(x[b] for x in (*first, *second))) for b in range(2)]
    torch.testing.assert_close(hk.pairwise_dot(*first, *second), torch.stack(each))


def test_tokens_are_not_summed_before_the_outer_product() -> None:
    """(sum delta)^T (sum act) would be zero here; sum of delta^T act is 2 in every entry."""
    delta = torch.tensor([1.0, -1.0])[:, None].expand(2, 3)[None]
    act = torch.tensor([1.0, -1.0])[:, None].expand(2, 4)[None]
    assert torch.equal(hk.per_sample_grad(delta, act), torch.full((1, 3, 4), 2.0))
    assert torch.equal(hk.pairwise_dot(delta, act, delta, act), torch.tensor([[48.0]]))
    for method in METHODS:
        norm = hk.per_sample_norm_sq(delta, act, method=method)
        assert torch.equal(norm, torch.tensor([48.0]))
        dot = hk.per_sample_dot(delta, act, torch.ones(3, 4), method=method)
        assert torch.equal(dot, torch.tensor([24.0]))


@pytest.mark.parametrize("method", METHODS)
def test_norms_of_cancelling_tokens_are_never_negative(method: str) -> None:
    delta = random(200, 3, 4)
    delta[:, 2] = -(delta[:, 0] + delta[:, 1])
    act = random(200, 1, 5).expand(200, 3, 5)  # the sum over tokens is zero up to rounding
    naive = peer_norm_sq(delta, act, torch.float32, "ghost")
    assert (naive < 0).any(), "the case has lost its teeth"
    norms = hk.per_sample_norm_sq(delta, act, method=method)
    assert (norms >= 0).all()
    assert norms.max() <= K * naive.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_products_are_accumulated_in_fp32(method: str) -> None:
    """Squares and sums beyond 65504 overflow fp16; 2000 equal terms stop growing in bf16."""
    delta = torch.full((1, 2000, 1), 8.0, dtype=torch.float16)
    act = torch.full((1, 2000, 1), 8.0, dtype=torch.float16)
    assert hk.per_sample_grad(delta, act).item() == 128000.0
    assert hk.per_sample_norm_sq(delta, act, method=method).item() == 128000.0**2
    ones = torch.ones(1, 2000, 1, dtype=torch.bfloat16)
    dot = hk.per_sample_dot(ones, ones, torch.ones(1, 1, dtype=torch.bfloat16), method=method)
    assert dot.item() == 2000.0


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    b=st.integers(1, 4),
    t=st.integers(1, 9),
    o=st.integers(1, 9),
    i=st.integers(1, 9),
    m=st.integers(1, 3),
)
def test_ghost_and_materialised_forms_agree_in_fp64(b: int, t: int, o: int, i: int, m: int) -> None:
    delta, act = factors((b,), t, o, i, torch.float64)
    v = random(m, o, i, dtype=torch.float64)
    for method in METHODS:
        assert_norms_exact(delta, act, torch.float64, method)
        assert_dots_exact(delta, act, v, torch.float64, method)


# --- types, layouts, empties --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "acc"),
    [
        pytest.param(torch.bfloat16, torch.float32, torch.float32, id="bf16+fp32"),
        pytest.param(torch.float16, torch.bfloat16, torch.float32, id="fp16+bf16"),
        pytest.param(torch.float32, torch.float64, torch.float64, id="fp32+fp64"),
        pytest.param(torch.float64, torch.bfloat16, torch.float64, id="fp64+bf16"),
    ],
)
def test_mixed_types_promote_to_the_accumulation_type(
    first: torch.dtype, second: torch.dtype, acc: torch.dtype
) -> None:
    delta, act = random(3, 4, 5, dtype=first), random(3, 4, 6, dtype=second)
    v = random(2, 5, 6, dtype=second)
    expected = oracle.per_sample_grad(delta, act)
    assert_exact(hk.per_sample_grad(delta, act), expected, peer_grad(delta, act, acc), acc)
    for method in METHODS:
        assert_norms_exact(delta, act, acc, method)
        assert_dots_exact(delta, act, v, acc, method)
    pairs = hk.pairwise_dot(delta, act, delta.to(second), act)
    assert pairs.dtype == acc


@pytest.mark.parametrize("of_act", LAYOUTS)
@pytest.mark.parametrize("of_delta", LAYOUTS)
def test_memory_layout_does_not_change_values(of_delta: str, of_act: str) -> None:
    delta, act = LAYOUTS[of_delta](random(4, 5, 3)), LAYOUTS[of_act](random(4, 5, 6))
    v = random(2, 6, 3).mT
    acc = torch.float32
    expected = oracle.per_sample_grad(delta, act)
    assert_exact(hk.per_sample_grad(delta, act), expected, peer_grad(delta, act, acc), acc)
    for method in METHODS:
        assert_norms_exact(delta, act, acc, method)
        assert_dots_exact(delta, act, v, acc, method)
    pairs = oracle.pairwise_dot(delta, act, delta, act)
    grads = peer_grad(delta, act, acc).flatten(1)
    assert_exact(hk.pairwise_dot(delta, act, delta, act), pairs, grads @ grads.T, acc)


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(("lead", "t"), EMPTY)
def test_sums_over_nothing_are_zero(
    lead: tuple[int, ...], t: int, dtype: torch.dtype, acc: torch.dtype
) -> None:
    delta, act = factors(lead, t, 3, 5, dtype)
    v = random(2, 3, 5, dtype=dtype)
    results = [hk.per_sample_grad(delta, act)]
    results += [hk.per_sample_norm_sq(delta, act, method=method) for method in METHODS]
    results += [hk.per_sample_dot(delta, act, v, method=method) for method in METHODS]
    results += [hk.per_sample_dot(delta, act, v[0], method=method) for method in METHODS]
    shapes = [(*lead, 3, 5), *[lead] * 3, *[(*lead, 2)] * 3, *[lead] * 3]
    for result, shape in zip(results, shapes, strict=True):
        assert torch.equal(result, torch.zeros(shape, dtype=acc))


@pytest.mark.parametrize("method", METHODS)
def test_dot_with_no_queries_is_empty(method: str) -> None:
    delta, act = factors((4,), 5, 3, 6)
    assert hk.per_sample_dot(delta, act, torch.zeros(0, 3, 6), method=method).shape == (4, 0)


@pytest.mark.parametrize(
    ("b1", "t1", "b2", "t2"),
    [
        pytest.param(0, 2, 3, 4, id="no first samples"),
        pytest.param(3, 2, 0, 4, id="no second samples"),
        pytest.param(3, 0, 2, 4, id="no first tokens"),
        pytest.param(3, 2, 2, 0, id="no second tokens"),
    ],
)
def test_pairwise_dot_over_nothing_is_zero(b1: int, t1: int, b2: int, t2: int) -> None:
    first, second = factors((b1,), t1, 3, 5), factors((b2,), t2, 3, 5)
    assert torch.equal(hk.pairwise_dot(*first, *second), torch.zeros(b1, b2))


def test_inputs_are_left_alone_and_results_repeat_bit_for_bit() -> None:
    delta, act = factors((4,), 5, 3, 6)
    v = random(2, 3, 6)
    kept = [x.clone() for x in (delta, act, v)]
    calls: list[Callable[[], torch.Tensor]] = [
        lambda: hk.per_sample_grad(delta, act),
        lambda: hk.per_sample_norm_sq(delta, act),
        lambda: hk.per_sample_dot(delta, act, v),
        lambda: hk.pairwise_dot(delta, act, delta, act),
    ]
    for call in calls:
        assert torch.equal(call(), call())
    for tensor, copy in zip((delta, act, v), kept, strict=True):
        assert torch.equal(tensor, copy)


# --- refusals -----------------------------------------------------------------------------------

OPS: dict[str, Callable[..., torch.Tensor]] = {
    "per_sample_grad": lambda delta, act: hk.per_sample_grad(delta, act),
    "per_sample_norm_sq": lambda delta, act: hk.per_sample_norm_sq(delta, act),
    "per_sample_dot": lambda delta, act: hk.per_sample_dot(delta, act, torch.zeros(2, 4, 6)),
    "pairwise_dot": lambda delta, act: hk.pairwise_dot(delta, act, delta, act),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("delta", "act"),
    [
        pytest.param((2, 3, 4), (2, 5, 6), id="token counts differ"),
        pytest.param((2, 3, 4), (7, 3, 6), id="batches differ"),
        pytest.param((2, 3, 4), (1, 3, 6), id="batch of one is not broadcast"),
        pytest.param((2, 3, 4), (3, 6), id="act lacks the batch"),
        pytest.param((4,), (6,), id="one-dimensional"),
    ],
)
def test_mismatched_factors_are_refused_by_name_and_shape(
    op: str, delta: tuple[int, ...], act: tuple[int, ...]
) -> None:
    shapes = {"delta": delta, "act": act, "delta1": delta, "act1": act}
    with pytest.raises(ValueError, match=oracle.naming(shapes)):
        OPS[op](torch.zeros(delta), torch.zeros(act))


@pytest.mark.parametrize(
    "v",
    [
        pytest.param((2, 4, 7), id="wrong I"),
        pytest.param((2, 3, 6), id="wrong O"),
        pytest.param((6,), id="one-dimensional"),
        pytest.param((1, 2, 4, 6), id="four-dimensional"),
    ],
)
def test_dot_refuses_queries_of_another_shape(v: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=oracle.naming({"V": v})):
        hk.per_sample_dot(*factors((2,), 3, 4, 6), torch.zeros(v))


@pytest.mark.parametrize(
    ("o", "i"), [pytest.param(5, 6, id="O differs"), pytest.param(4, 7, id="I differs")]
)
def test_pairwise_dot_refuses_pairs_of_different_layers(o: int, i: int) -> None:
    with pytest.raises(
        ValueError,
        match=oracle.naming(
            {"delta1": (2, 3, 4), "act1": (2, 3, 6), "delta2": (5, 2, o), "act2": (5, 2, i)}
        ),
    ):
        hk.pairwise_dot(*factors((2,), 3, 4, 6), *factors((5,), 2, o, i))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda t: t.long(), id="int64"),
        pytest.param(lambda t: t.bool(), id="bool"),
        pytest.param(lambda t: t.to(torch.complex64), id="complex"),
        pytest.param(lambda t: t.tolist(), id="list"),
        pytest.param(lambda t: t.to("meta"), id="another device"),
    ],
)
def test_unsupported_operands_are_refused_by_name(
    op: str, make: Callable[[torch.Tensor], object]
) -> None:
    delta, act = factors((2,), 3, 4, 6)
    with pytest.raises((TypeError, ValueError), match="act"):
        OPS[op](delta, make(act))


@pytest.mark.parametrize("op", ["per_sample_norm_sq", "per_sample_dot"])
def test_unknown_method_is_refused_by_name(op: str) -> None:
    delta, act = factors((2,), 3, 4, 6)
    rest = (torch.zeros(4, 6),) if op == "per_sample_dot" else ()
    with pytest.raises(ValueError, match=r"(?s)method.*fastest|fastest.*method"):
        getattr(hk, op)(delta, act, *rest, method="fastest")

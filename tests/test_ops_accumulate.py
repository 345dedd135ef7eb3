"""gfim_accumulate_ and gram_accumulate_ against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperinf_kernels as hk
from tests import oracle

# Another order of summation may be a few times worse than the peer's in one entry, not more.
K = 4.0
SIDES = ["cols", "rows"]
DTYPES = [  # inputs, accumulator
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.float16, torch.float32, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16"),
    pytest.param(torch.float64, torch.float64, id="fp64"),
    pytest.param(torch.float32, torch.float64, id="fp32 into fp64"),
    pytest.param(torch.float64, torch.float32, id="fp64 into fp32"),
]
SHAPES = [  # leading dims, B, r, d
    pytest.param((), 6, 3, 7, id="one block"),
    pytest.param((), 5, 4, 1, id="d=1"),
    pytest.param((), 5, 1, 6, id="r=1"),
    pytest.param((), 40, 2, 33, id="many samples"),
    pytest.param((3,), 4, 2, 5, id="stacked blocks"),
    pytest.param((2, 2), 3, 2, 4, id="nested stack"),
]
VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda t: t[:1].expand_as(t),
    "reversed axes": lambda t: (
        t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))
    ),
}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def over_lead(
    lead: tuple[int, ...], value: Callable[[tuple[int, ...]], oracle.Array]
) -> oracle.Array:
    """Stack value(index) over the leading dims."""
    return np.array([value(index) for index in np.ndindex(*lead)]).reshape(
        *lead, *value((0,) * len(lead)).shape
    )


def peer_gfim(
    c: torch.Tensor, grads: torch.Tensor, side: str, alpha: float, acc: torch.dtype
) -> torch.Tensor:
    """The less exact of the two naive forms: sample by sample, and one product of the stack."""
    g = (grads if side == "cols" else grads.mT).to(acc)
    stack = g.reshape(*g.shape[:-3], -1, g.shape[-1])
    truth = c.double() + alpha * (g.double().mT @ g.double()).sum(-3)
    forms = c + alpha * (g.mT @ g).sum(-3), c + alpha * (stack.mT @ stack)
    return max(forms, key=lambda form: (form - truth).abs().max().item())


def assert_exact(
    actual: torch.Tensor, expected: oracle.Array, peer: torch.Tensor, acc: torch.dtype
) -> None:
    assert actual.dtype == acc
    oracle.assert_as_exact_as(actual, expected, peer, k=K, floor=8 * torch.finfo(acc).eps)


# --- GFIM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.125, -0.3], ids="alpha={}".format)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(("lead", "b", "r", "d"), SHAPES)
def test_gfim_of_gradients_is_added_to_the_accumulator(
    lead: tuple[int, ...],
    b: int,
    r: int,
    d: int,
    dtype: torch.dtype,
    acc: torch.dtype,
    side: str,
    alpha: float,
) -> None:
    grads = random(*lead, b, r, d, dtype=dtype)
    size = d if side == "cols" else r
    c = random(*lead, size, size, dtype=acc, seed=5)
    c = c + c.mT
    start = oracle.f64(c)
    peer = peer_gfim(c, grads, side, alpha, acc)
    returned = hk.gfim_accumulate_(c, grads, side=side, alpha=alpha)
    assert returned is c
    sums = over_lead(lead, lambda index: oracle.gfim_sum(grads[index], side))
    assert_exact(c, start + alpha * sums, peer, acc)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(
    ("lead", "b", "t", "o", "i"),
    [
        pytest.param((), 5, 4, 3, 6, id="one block"),
        pytest.param((), 4, 1, 3, 6, id="one token"),
        pytest.param((), 3, 40, 2, 9, id="many tokens, LoRA rank"),
        pytest.param((), 3, 2, 30, 11, id="few tokens, wide layer"),
        pytest.param((), 4, 3, 1, 1, id="d=1"),
        pytest.param((2,), 3, 4, 2, 5, id="stacked blocks"),
    ],
)
def test_gfim_of_factors_is_the_gfim_of_their_gradients(
    lead: tuple[int, ...],
    b: int,
    t: int,
    o: int,
    i: int,
    dtype: torch.dtype,
    acc: torch.dtype,
    side: str,
) -> None:
    delta = random(*lead, b, t, o, dtype=dtype)
    act = random(*lead, b, t, i, dtype=dtype)
    size = i if side == "cols" else o
    c = torch.zeros(*lead, size, size, dtype=acc)
    peer = peer_gfim(c, delta.to(acc).mT @ act.to(acc), side, 0.5, acc)
    assert hk.gfim_accumulate_(c, delta, act, side=side, alpha=0.5) is c
    grads = oracle.per_sample_grad(delta, act)
    expected = 0.5 * over_lead(lead, lambda index: oracle.gfim_sum(grads[index], side))
    assert_exact(c, expected, peer, acc)


def test_gfim_of_factors_does_not_mix_tokens_or_samples() -> None:
    """Summing over tokens, or stacking samples before the outer product, would give zero here."""
    signs = torch.tensor([1.0, -1.0])[None, :, None]
    delta, act = signs.expand(2, 2, 1), signs.expand(2, 2, 3)
    by_samples = delta * torch.tensor([1.0, -1.0])[:, None, None]
    for factor in (delta, by_samples):
        c = hk.gfim_accumulate_(torch.zeros(3, 3), factor, act)
        assert torch.equal(c, torch.full((3, 3), 8.0))


def test_columns_are_the_default_side_and_one_the_default_alpha() -> None:
    grads = random(3, 2, 5)
    default = hk.gfim_accumulate_(torch.zeros(5, 5), grads)
    spelled = hk.gfim_accumulate_(torch.zeros(5, 5), grads, side="cols", alpha=1.0)
    assert torch.equal(default, spelled)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 17), max_size=5), side=st.sampled_from(SIDES))
def test_gfim_does_not_depend_on_how_samples_are_chunked(cuts: list[int], side: str) -> None:
    grads = random(17, 3, 5)
    size = 5 if side == "cols" else 3
    c = torch.zeros(size, size)
    peer = peer_gfim(c, grads, side, 1.0, torch.float32)
    edges = [0, *sorted(cuts), 17]
    for start, stop in pairwise(edges):
        hk.gfim_accumulate_(c, grads[start:stop], side=side)
    assert_exact(c, oracle.gfim_sum(grads, side), peer, torch.float32)


@pytest.mark.parametrize("side", SIDES)
def test_gfim_of_nothing_leaves_the_accumulator_bit_for_bit(side: str) -> None:
    size = 5 if side == "cols" else 3
    c = random(size, size)
    before = c.clone()
    hk.gfim_accumulate_(c, torch.zeros(0, 3, 5), side=side)
    hk.gfim_accumulate_(c, torch.zeros(0, 4, 3), torch.zeros(0, 4, 5), side=side)
    hk.gfim_accumulate_(c, torch.zeros(2, 0, 3), torch.zeros(2, 0, 5), side=side)
    assert torch.equal(c, before)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("side", SIDES)
def test_gfim_of_strided_inputs_matches_the_oracle(view: str, side: str) -> None:
    acc = torch.float32
    size = 6 if side == "cols" else 3
    grads = VIEWS[view](random(4, 3, 6))
    c = torch.zeros(size, size)
    peer = peer_gfim(c, grads, side, 1.0, acc)
    hk.gfim_accumulate_(c, grads, side=side)
    assert_exact(c, oracle.gfim_sum(grads, side), peer, acc)

    delta, act = VIEWS[view](random(4, 5, 3)), VIEWS[view](random(4, 5, 6))
    c = torch.zeros(size, size)
    peer = peer_gfim(c, delta.mT @ act, side, 1.0, acc)
    hk.gfim_accumulate_(c, delta, act, side=side)
    assert_exact(c, oracle.gfim_sum(oracle.per_sample_grad(delta, act), side), peer, acc)


def strided_accumulator(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A window (rows, cols) into a buffer of sevens, and the buffer."""
    buffer = torch.full((2 * rows + 2, 2 * cols + 2), 7.0)
    window = buffer[1 : 2 * rows + 1 : 2, 1 : 2 * cols + 1 : 2]
    window.zero_()
    return window, buffer


def test_gfim_is_written_through_a_strided_accumulator_and_nowhere_else() -> None:
    window, buffer = strided_accumulator(4, 4)
    grads = random(5, 2, 4)
    peer = peer_gfim(window, grads, "cols", 1.0, torch.float32)
    assert hk.gfim_accumulate_(window, grads) is window
    assert_exact(buffer[1:9:2, 1:9:2], oracle.gfim_sum(grads), peer, torch.float32)
    assert int((buffer == 7.0).sum()) == buffer.numel() - 16


# --- Gram ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "acc"), DTYPES)
@pytest.mark.parametrize(
    ("lead", "n1", "n2", "size"),
    [
        pytest.param((), 6, 4, 9, id="rectangular"),
        pytest.param((), 3, 1, 200, id="long rows"),
        pytest.param((), 40, 33, 1, id="D=1"),
        pytest.param((3,), 4, 2, 5, id="stacked"),
    ],
)
def test_dot_products_are_added_to_the_gram(
    lead: tuple[int, ...], n1: int, n2: int, size: int, dtype: torch.dtype, acc: torch.dtype
) -> None:
    first = random(*lead, n1, size, dtype=dtype)
    second = random(*lead, n2, size, dtype=dtype, seed=1)
    for other, columns in ((None, n1), (second, n2)):
        k = random(*lead, n1, columns, dtype=acc, seed=2)
        if other is None:
            k = k + k.mT
        start = oracle.f64(k)
        right = first if other is None else other
        peer = k + first.to(acc) @ right.to(acc).mT
        returned = (
            hk.gram_accumulate_(k, first) if other is None else hk.gram_accumulate_(k, first, other)
        )
        assert returned is k
        dots = over_lead(lead, lambda index, right=right: oracle.gram(first[index], right[index]))
        assert_exact(k, start + dots, peer, acc)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 30), max_size=4), same=st.booleans())
def test_gram_does_not_depend_on_how_columns_are_chunked(cuts: list[int], same: bool) -> None:
    first, second = random(5, 30), random(3, 30)
    k = torch.zeros(5, 5 if same else 3)
    edges = [0, *sorted(cuts), 30]
    for start, stop in pairwise(edges):
        piece = first[:, start:stop]
        if same:
            hk.gram_accumulate_(k, piece)
        else:
            hk.gram_accumulate_(k, piece, second[:, start:stop])
    right = first if same else second
    assert_exact(k, oracle.gram(first, right), first @ right.T, torch.float32)


def test_gram_of_one_set_with_itself_is_the_two_argument_form() -> None:
    rows = random(6, 11)
    one, two = torch.zeros(6, 6), torch.zeros(6, 6)
    hk.gram_accumulate_(one, rows)
    hk.gram_accumulate_(two, rows, rows)
    assert_exact(one, oracle.gram(rows), two, torch.float32)


def test_gram_mixes_types_by_promotion() -> None:
    first, second = random(4, 6, dtype=torch.bfloat16), random(3, 6)
    k = hk.gram_accumulate_(torch.zeros(4, 3), first, second)
    assert_exact(k, oracle.gram(first, second), first.float() @ second.T, torch.float32)


@pytest.mark.parametrize(
    ("n1", "n2", "size"),
    [
        pytest.param(0, 3, 5, id="no first rows"),
        pytest.param(3, 0, 5, id="no second rows"),
        pytest.param(3, 2, 0, id="no columns"),
    ],
)
def test_gram_of_nothing_adds_nothing(n1: int, n2: int, size: int) -> None:
    k = random(n1, n2)
    before = k.clone()
    hk.gram_accumulate_(k, torch.zeros(n1, size), torch.zeros(n2, size))
    assert torch.equal(k, before)
    square = random(n1, n1) if size == 0 or n1 == 0 else torch.zeros(n1, n1)
    before = square.clone()
    hk.gram_accumulate_(square, torch.zeros(n1, size))
    assert torch.equal(square, before)


@pytest.mark.parametrize("view", VIEWS)
def test_gram_of_strided_inputs_matches_the_oracle(view: str) -> None:
    first, second = VIEWS[view](random(5, 8)), VIEWS[view](random(4, 8, seed=1))
    k = hk.gram_accumulate_(torch.zeros(5, 4), first, second)
    assert_exact(k, oracle.gram(first, second), first @ second.T, torch.float32)
    k = hk.gram_accumulate_(torch.zeros(5, 5), first)
    assert_exact(k, oracle.gram(first), first @ first.T, torch.float32)


def test_gram_is_written_through_a_strided_accumulator_and_nowhere_else() -> None:
    window, buffer = strided_accumulator(3, 5)
    first, second = random(3, 6), random(5, 6)
    assert hk.gram_accumulate_(window, first, second) is window
    expected = oracle.gram(first, second)
    assert_exact(buffer[1:7:2, 1:11:2], expected, first @ second.T, torch.float32)
    assert int((buffer == 7.0).sum()) == buffer.numel() - 15


# --- both: precision, determinism, refusals -----------------------------------------------------


def test_low_precision_inputs_are_accumulated_in_fp32() -> None:
    """fp16 squares overflow beyond 65504; bf16 sums of ones stop growing at 256."""
    large = torch.full((3, 1, 1), 300.0, dtype=torch.float16)
    assert hk.gfim_accumulate_(torch.zeros(1, 1), large).item() == 270000.0
    assert hk.gram_accumulate_(torch.zeros(3, 3), large[:, 0])[0, 1].item() == 90000.0
    ones = torch.ones(1000, 1, 1, dtype=torch.bfloat16)
    assert hk.gfim_accumulate_(torch.zeros(1, 1), ones).item() == 1000.0
    assert hk.gram_accumulate_(torch.zeros(1, 1), ones[:, 0].mT).item() == 1000.0


def test_inputs_are_left_alone_and_sums_repeat_bit_for_bit() -> None:
    grads, rows = random(7, 3, 6), random(5, 9)
    kept = grads.clone(), rows.clone()
    for _ in range(2):
        gfims = [hk.gfim_accumulate_(torch.zeros(6, 6), grads) for _ in range(2)]
        grams = [hk.gram_accumulate_(torch.zeros(5, 5), rows) for _ in range(2)]
        assert torch.equal(*gfims)
        assert torch.equal(*grams)
    assert torch.equal(grads, kept[0])
    assert torch.equal(rows, kept[1])


@pytest.mark.parametrize(
    ("c", "first", "act", "side"),
    [
        pytest.param((5, 5), (3, 2, 6), None, "cols", id="C of another d"),
        pytest.param((6, 6), (3, 2, 6), None, "rows", id="C of the other side"),
        pytest.param((6, 5), (3, 2, 6), None, "cols", id="C not square"),
        pytest.param((6,), (3, 2, 6), None, "cols", id="C one-dimensional"),
        pytest.param((2, 6, 6), (3, 3, 2, 6), None, "cols", id="stacks differ"),
        pytest.param((6, 6), (6,), None, "cols", id="gradients one-dimensional"),
        pytest.param((6, 6), (3, 4, 2), (3, 5, 6), "cols", id="token counts differ"),
        pytest.param((6, 6), (3, 4, 2), (2, 4, 6), "cols", id="batches differ"),
        pytest.param((2, 2), (3, 4, 2), (3, 4, 6), "cols", id="C of the other factor"),
    ],
)
def test_gfim_refuses_shapes_by_name_and_leaves_the_accumulator(
    c: tuple[int, ...], first: tuple[int, ...], act: tuple[int, ...] | None, side: str
) -> None:
    accumulator = torch.zeros(c)
    shapes = {"C": c, "grads": first, "delta": first}
    args = [torch.ones(first)]
    if act is not None:
        shapes["act"] = act
        args.append(torch.ones(act))
    with pytest.raises(ValueError, match=oracle.naming(shapes)):
        hk.gfim_accumulate_(accumulator, *args, side=side)
    assert torch.equal(accumulator, torch.zeros(c))


@pytest.mark.parametrize(
    ("k", "first", "second"),
    [
        pytest.param((4, 4), (3, 6), None, id="K of another size"),
        pytest.param((3, 4), (3, 6), None, id="K not square"),
        pytest.param((4, 3), (3, 6), (4, 6), id="K transposed"),
        pytest.param((3, 4), (3, 6), (4, 7), id="row lengths differ"),
        pytest.param((3,), (3, 6), None, id="K one-dimensional"),
        pytest.param((3, 3), (6,), None, id="rows one-dimensional"),
        pytest.param((2, 3, 3), (4, 3, 6), None, id="stacks differ"),
    ],
)
def test_gram_refuses_shapes_by_name_and_leaves_the_accumulator(
    k: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...] | None
) -> None:
    accumulator = torch.zeros(k)
    shapes = {"K": k, "G1": first}
    args = [torch.ones(first)]
    if second is not None:
        shapes["G2"] = second
        args.append(torch.ones(second))
    with pytest.raises(ValueError, match=oracle.naming(shapes)):
        hk.gram_accumulate_(accumulator, *args)
    assert torch.equal(accumulator, torch.zeros(k))


BAD_OPERANDS = [
    pytest.param(lambda t: t.long(), id="int64"),
    pytest.param(lambda t: t.to(torch.complex64), id="complex"),
    pytest.param(lambda t: t.tolist(), id="list"),
    pytest.param(lambda t: t.to("meta"), id="another device"),
]


@pytest.mark.parametrize("make", BAD_OPERANDS)
def test_unsupported_inputs_are_refused_by_name(make: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises((TypeError, ValueError), match="grads"):
        hk.gfim_accumulate_(torch.zeros(4, 4), make(torch.ones(3, 2, 4)))
    with pytest.raises((TypeError, ValueError), match="act"):
        hk.gfim_accumulate_(torch.zeros(4, 4), torch.ones(3, 5, 2), make(torch.ones(3, 5, 4)))
    with pytest.raises((TypeError, ValueError), match="G1"):
        hk.gram_accumulate_(torch.zeros(3, 3), make(torch.ones(3, 4)))
    with pytest.raises((TypeError, ValueError), match="G2"):
        hk.gram_accumulate_(torch.zeros(2, 3), torch.ones(2, 4), make(torch.ones(3, 4)))


@pytest.mark.parametrize(
    "make",
    [
        *BAD_OPERANDS,
        pytest.param(lambda t: t.bfloat16(), id="bf16"),
        pytest.param(lambda t: t[:1].expand_as(t), id="overlapping memory"),
    ],
)
def test_unsupported_accumulators_are_refused_by_name(
    make: Callable[[torch.Tensor], object],
) -> None:
    with pytest.raises((TypeError, ValueError), match=r"\bC\b"):
        hk.gfim_accumulate_(make(torch.zeros(4, 4)), torch.ones(3, 2, 4))
    with pytest.raises((TypeError, ValueError), match=r"\bK\b"):
        hk.gram_accumulate_(make(torch.zeros(3, 3)), torch.ones(3, 4))


def test_unknown_side_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"(?s)side.*both|both.*side"):
        hk.gfim_accumulate_(torch.zeros(4, 4), torch.ones(3, 2, 4), side="both")

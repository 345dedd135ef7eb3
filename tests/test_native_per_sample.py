"""The compiled per-sample kernels against numpy fp64, on every compiled path."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from benchmarks.memory import peak_memory
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads, worst
from tests.oracle import Array

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
# largest error <= K x largest error of the same expression in torch fp32, plus a few roundings of
# the largest result
K = 2.0
FLOOR = 8 * np.finfo(np.float32).eps
BOTH = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
OP = torch.ops.hyperinf
# (T, O, I): a thin side of 1 to 16 on either side, both, neither, past a tile and off every width
SHAPES = [
    (1, 1, 1), (9, 8, 1030), (9, 1030, 8), (8, 16, 1024), (7, 13, 33), (3, 4, 2050), (17, 12, 40),
    (5, 17, 18), (6, 390, 33), (385, 20, 30), (2, 1, 65),
]  # fmt: skip


def factors(
    batch: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, rows, cols = shape
    return (
        random(batch, tokens, rows, dtype=dtype, seed=seed),
        random(batch, tokens, cols, dtype=dtype, seed=seed + 1),
    )


def grads(delta: torch.Tensor, act: torch.Tensor) -> Array:
    return np.einsum("bto,bti->boi", delta.double().numpy(), act.double().numpy())


def assert_close(actual: torch.Tensor, expected: Array, peer: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    assert tuple(actual.shape) == expected.shape
    bound = K * worst(peer, expected) + FLOOR * np.abs(expected).max(initial=0)
    assert worst(actual, expected) <= bound


def peer_grads(delta: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    return delta.float().mT @ act.float()


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_reduction_of_every_shape(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    delta, act = factors(3, shape, dtype)
    g, peer = grads(delta, act), peer_grads(delta, act)
    assert_close(OP.per_sample_grad(delta, act), g, peer)
    norms = np.square(g).sum((1, 2))
    for ghost in (False, True):
        assert_close(OP.per_sample_norm_sq(delta, act, ghost), norms, peer.square().sum((1, 2)))
    V = random(5, *shape[1:], seed=2)
    dots = g.reshape(3, -1) @ V.double().numpy().reshape(5, -1).T
    assert_close(OP.per_sample_dot(delta, act, V), dots, peer.flatten(1) @ V.flatten(1).T)
    delta2, act2 = factors(4, (shape[0] + 2, *shape[1:]), dtype, seed=3)
    g2, peer2 = grads(delta2, act2), peer_grads(delta2, act2)
    for ghost in (False, True):
        pairs = OP.pairwise_dot(delta, act, delta2, act2, ghost)
        expected = g.reshape(3, -1) @ g2.reshape(4, -1).T
        assert_close(pairs, expected, peer.flatten(1) @ peer2.flatten(1).T)
        own = OP.pairwise_dot(delta, act, delta, act, ghost)
        assert_close(
            own, g.reshape(3, -1) @ g.reshape(3, -1).T, peer.flatten(1) @ peer.flatten(1).T
        )
        if not ghost:
            assert torch.equal(own, own.T)


@pytest.mark.parametrize("shape", [(2, 8, 1000), (2, 1000, 8), (3, 400, 390)], ids=str)
def test_pairs_of_more_samples_than_one_block_of_features_holds(
    shape: tuple[int, int, int],
) -> None:
    delta, act = factors(300 if shape[1] != 400 else 40, shape)
    g, peer = grads(delta, act), peer_grads(delta, act).flatten(1)
    expected = g.reshape(len(g), -1) @ g.reshape(len(g), -1).T
    for ghost in (False, True):
        pairs = OP.pairwise_dot(delta, act, delta.clone(), act.clone(), ghost)
        assert_close(pairs, expected, peer @ peer.T)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unaligned": shifted,
    "every other sample": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 3, 4), value=torch.nan)[:, 3:-4, 1:-2],
    "one sample repeated": lambda t: t[:1].expand_as(t),
    "one token repeated": lambda t: t[:, :1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(11, 8, 70), (11, 70, 8), (11, 20, 50)], ids=str)
def test_layout_does_not_change_a_bit(view: str, shape: tuple[int, int, int]) -> None:
    delta, act = (VIEWS[view](t) for t in factors(3, shape))
    plain = delta.contiguous(), act.contiguous()
    V = random(2, *shape[1:])
    assert torch.equal(OP.per_sample_grad(delta, act), OP.per_sample_grad(*plain))
    assert torch.equal(OP.per_sample_dot(delta, act, V), OP.per_sample_dot(*plain, V))
    for ghost in (False, True):
        norms = OP.per_sample_norm_sq(delta, act, ghost)
        assert torch.equal(norms, OP.per_sample_norm_sq(*plain, ghost))
        # a tile of several samples reads them in the same order as one of a single sample
        pairs = OP.pairwise_dot(delta, act, delta, act, ghost)
        assert torch.allclose(pairs, OP.pairwise_dot(*plain, *plain, ghost), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(11, 8, 70), (11, 20, 400)], ids=str)
def test_nan_stays_in_its_sample(shape: tuple[int, int, int]) -> None:
    delta, act = factors(7, shape)
    keep = torch.arange(7) != 4
    V = random(2, *shape[1:])
    runs: list[Callable[[], torch.Tensor]] = [
        lambda: OP.per_sample_norm_sq(delta, act, False),
        lambda: OP.per_sample_norm_sq(delta, act, True),
        lambda: OP.per_sample_dot(delta, act, V),
        lambda: OP.pairwise_dot(delta, act, delta[:3], act[:3], False),
        lambda: OP.pairwise_dot(delta, act, delta[:3], act[:3], True),
    ]
    clean = [run() for run in runs]
    act[4, 2, 3] = torch.nan
    for run, before in zip(runs, clean, strict=True):
        after = run()
        assert after[4].isnan().all()
        assert torch.equal(after[keep], before[keep])


def test_bits_do_not_depend_on_threads() -> None:
    cases = [factors(9, shape) for shape in ((20, 8, 1500), (20, 400, 420))]
    for delta, act in cases:
        V = random(3, delta.shape[2], act.shape[2])
        seen = []
        for count in (1, 2, 3):
            with threads(count):
                seen.append((
                    OP.per_sample_grad(delta, act), OP.per_sample_dot(delta, act, V),
                    OP.per_sample_norm_sq(delta, act, False),
                    OP.per_sample_norm_sq(delta, act, True),
                    OP.pairwise_dot(delta, act, delta, act, False),
                    OP.pairwise_dot(delta, act, delta, act, True),
                ))  # fmt: skip
        for other in seen[1:]:
            assert all(map(torch.equal, seen[0], other))


def test_nothing_gives_zeros() -> None:
    for batch, tokens, rows, cols in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        delta, act = torch.ones(batch, tokens, rows), torch.ones(batch, tokens, cols)
        V = torch.ones(3, rows, cols)
        assert torch.equal(OP.per_sample_grad(delta, act), torch.zeros(batch, rows, cols))
        assert torch.equal(OP.per_sample_dot(delta, act, V), torch.zeros(batch, 3))
        for ghost in (False, True):
            assert torch.equal(OP.per_sample_norm_sq(delta, act, ghost), torch.zeros(batch))
            pairs = OP.pairwise_dot(delta, act, delta, act, ghost)
            assert torch.equal(pairs, torch.zeros(batch, batch))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(3, 4), torch.zeros(1, 3, 4)), "delta must have 3 dimensions, got 2"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).half()), "act must be fp32 or bf16"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).bfloat16()), "must have one dtype"),
        ((torch.zeros(1, 3, 4), torch.zeros(1, 2, 4)), "must agree in b and T"),
        ((torch.zeros(1, 3, 8)[..., ::2], torch.zeros(1, 3, 4)), "delta must have unit column"),
    ],
    ids=["dims", "fp16", "mixed", "tokens", "strided"],
)  # fmt: skip
def test_the_raw_op_refuses_by_name(args: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OP.per_sample_norm_sq(*args, False)


# --- the public faces ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
def test_faces_run_on_the_kernels(dtype: torch.dtype) -> None:
    delta, act = (t.reshape(2, 3, *t.shape[1:]) for t in factors(6, (9, 8, 33), dtype))
    V = random(8, 33)
    flat = delta.flatten(0, 1), act.flatten(0, 1)
    g, peer = grads(*flat), peer_grads(*flat)
    ops = ("per_sample_grad", "per_sample_norm_sq", "per_sample_dot", "pairwise_dot")
    with on_cpu_kernels(*ops):
        assert_close(hk.per_sample_grad(delta, act).flatten(0, 1), g, peer)
        assert_close(
            hk.per_sample_norm_sq(delta, act).flatten(), np.square(g).sum((1, 2)),
            peer.square().sum((1, 2)),
        )  # fmt: skip
        dots = np.einsum("boi,oi->b", g, V.double().numpy())
        assert_close(hk.per_sample_dot(delta, act, V).flatten(), dots, (peer * V).sum((1, 2)))
        pairs = hk.pairwise_dot(delta, act, delta, act)
    g, peer = g.reshape(2, 3, -1), peer.reshape(2, 3, -1)
    assert_close(pairs, g @ g.swapaxes(1, 2), peer @ peer.mT)


def test_mixed_dtypes_are_widened_and_others_stay_in_torch_with_the_reason() -> None:
    delta, act = random(2, 5, 4), random(2, 5, 33, dtype=torch.bfloat16)
    with on_cpu_kernels("per_sample_norm_sq"):
        norms = hk.per_sample_norm_sq(delta, act)
    g = grads(delta, act)
    assert_close(norms, np.square(g).sum((1, 2)), peer_grads(delta, act).square().sum((1, 2)))
    for other in (torch.float16, torch.float64):
        plan = hk.explain("per_sample_norm_sq", delta.to(other), act)
        assert plan.backend == "torch"
        assert str(other).removeprefix("torch.") in plan.reason


def test_nothing_of_the_size_of_all_gradients_is_allocated() -> None:
    delta, act = factors(48, (4, 512, 512))
    V = random(2, 512, 512)
    everything = 48 * 512 * 512 * 4
    runs: dict[str, Callable[[], object]] = {
        "grad": lambda: OP.per_sample_grad(delta, act),
        "norm": lambda: OP.per_sample_norm_sq(delta, act, False),
        "ghost norm": lambda: OP.per_sample_norm_sq(delta, act, True),
        "dot": lambda: OP.per_sample_dot(delta, act, V),
        "pairs": lambda: OP.pairwise_dot(delta, act, delta, act, False),
        "ghost pairs": lambda: OP.pairwise_dot(delta, act, delta, act, True),
    }
    used = {name: peak_memory(call) for name, call in runs.items()}
    # the op that returns them all shows that the measure sees them
    assert used.pop("grad") > 0.9 * everything
    assert max(used.values()) < everything / 2, used

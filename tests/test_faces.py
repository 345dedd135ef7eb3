"""What every face shares: tensors checked once per metadata, choices kept, nothing else kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import hyperinf_kernels as hk
from hyperinf_kernels.ops import capability, dispatch, native
from hyperinf_kernels.ops.topk import topk_empty, topk_merge_
from hyperinf_kernels.ops.triton import launch
from tests import oracle

Arrays = tuple[Tensor, ...]


def topk(scores: Tensor) -> Tensor:
    values, positions = topk_empty(len(scores), 3)
    topk_merge_(values, positions, scores, 0)
    return values


def gram(G: Tensor, other: Tensor) -> Tensor:
    return hk.gram_accumulate_(G.new_zeros(len(G), len(other)), G, other)


def gfim(grads: Tensor) -> Tensor:
    side = grads.shape[-1]
    return hk.gfim_accumulate_(grads.new_zeros(side, side), grads)


def gfim_of_factors(delta: Tensor, act: Tensor) -> Tensor:
    side = act.shape[-1]
    return hk.gfim_accumulate_(act.new_zeros(side, side), delta, act)


def draw(*shapes: tuple[int, ...]) -> Arrays:
    return tuple(torch.randn(*shape) for shape in shapes)


# name -> the call, its tensors for a number of samples, and the same in fp64
FACES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Arrays], Callable[..., object]]] = {
    "sherman_morrison": (
        lambda V, G: hk.sherman_morrison(V, G, 0.5),
        lambda n: draw((2, 8), (n, 8)),
        lambda V, G: oracle.datainf(V, G, 0.5),
    ),
    "sherman_morrison_factored": (
        lambda V, delta, act: hk.sherman_morrison(V, delta, 0.5, act),
        lambda n: draw((2, 4, 5), (n, 3, 4), (n, 3, 5)),
        lambda V, delta, act: oracle.datainf(
            oracle.flatten(V), oracle.flatten(oracle.per_sample_grad(delta, act)), 0.5
        ).reshape(V.shape),
    ),
    "per_sample_grad": (
        hk.per_sample_grad, lambda n: draw((n, 3, 4), (n, 3, 5)), oracle.per_sample_grad,
    ),
    "per_sample_norm_sq": (
        hk.per_sample_norm_sq, lambda n: draw((n, 3, 4), (n, 3, 5)), oracle.per_sample_norm_sq,
    ),
    "per_sample_dot": (
        hk.per_sample_dot, lambda n: draw((n, 3, 4), (n, 3, 5), (2, 4, 5)), oracle.per_sample_dot,
    ),
    "pairwise_dot": (
        hk.pairwise_dot,
        lambda n: draw((n, 3, 4), (n, 3, 5), (2, 3, 4), (2, 3, 5)),
        oracle.pairwise_dot,
    ),
    "gram_accumulate_": (gram, lambda n: draw((32 + n, 8), (40, 8)), oracle.gram),
    "gfim_accumulate_": (gfim, lambda n: draw((n, 4, 40)), oracle.gfim_sum),
    "gfim of factors": (
        gfim_of_factors,
        lambda n: draw((n, 3, 4), (n, 3, 40)),
        lambda delta, act: oracle.gfim_sum(oracle.per_sample_grad(delta, act)),
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("op", FACES)
kernels_only = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


# --- choices are kept ---------------------------------------------------------------------------


@EVERY
def test_the_same_metadata_are_checked_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    face, tensors, _ = FACES[op]
    first = face(*tensors(4))
    prepared: list[str] = []
    prepare = dispatch._prepare

    def counted(name: str, *args: object) -> dispatch.Ready:
        prepared.append(name)
        return prepare(name, *args)

    monkeypatch.setattr(dispatch, "_prepare", counted)
    again = face(*tensors(4))
    assert prepared == []
    assert again.shape == first.shape
    face(*tensors(5))
    assert len(prepared) == 1


def test_a_kept_choice_is_for_that_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a check or a choice depends on is part of what is compared."""
    delta, act = draw((2, 3, 4), (2, 3, 5))
    hk.per_sample_norm_sq(delta, act)
    with pytest.raises(ValueError, match="method must be"):
        hk.per_sample_norm_sq(delta, act, method="none")
    with pytest.raises(ValueError, match="differ in the last size only"):
        hk.per_sample_norm_sq(delta, act[:, :2])
    C, grads = torch.zeros(4, 4), torch.randn(2, 4, 4)
    hk.gfim_accumulate_(C, grads)
    with pytest.raises(ValueError, match="side must be"):
        hk.gfim_accumulate_(C, grads, side="both")
    K = torch.zeros(4, 4)
    hk.gram_accumulate_(K, grads[0])
    with pytest.raises(ValueError, match="expanded"):
        hk.gram_accumulate_(torch.zeros(1, 4).expand(4, 4), grads[0])
    with hk.trace_backends() as log:
        hk.per_sample_grad(delta, act)
        monkeypatch.setenv("HYPERINF_BACKEND", "torch")
        hk.per_sample_grad(delta, act)
        monkeypatch.delenv("HYPERINF_BACKEND")
        hk.per_sample_grad(delta, act.double())
        hk.per_sample_grad(delta, act.clone().requires_grad_())
        with torch.no_grad():
            hk.per_sample_grad(delta, act.clone().requires_grad_())
    fast = "torch" if native.missing() else "cpu"
    assert [plan.backend for plan in log] == [fast, "torch", "torch", "torch", fast]
    monkeypatch.setenv("HYPERINF_BACKEND", "triton")
    hk.per_sample_grad(delta, act)
    monkeypatch.setenv("HYPERINF_STRICT", "1")
    with pytest.raises(hk.BackendError, match="fall back"):
        hk.per_sample_grad(delta, act)


def test_what_is_kept_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_kept", {})
    monkeypatch.setattr(dispatch, "MOST_KEPT", 3)
    for n in range(1, 9):
        hk.per_sample_grad(*draw((n, 3, 4), (n, 3, 5)))
        assert 1 <= len(dispatch._kept) <= 3


@EVERY
def test_no_tensor_stays_behind(op: str) -> None:
    """Neither a real one nor one without data, which later calls would take for theirs."""
    face, tensors, _ = FACES[op]
    with FakeTensorMode():
        fake = face(*tensors(4))
    real = face(*tensors(4))
    assert type(real) is Tensor
    assert fake.shape == real.shape
    for key, ready in dispatch._kept.items():
        assert not any(isinstance(part, Tensor) for part in (*key, *ready, *ready.options))


def test_constants_on_a_device_outlive_no_mode() -> None:
    @launch.uploaded
    def numbers(count: int) -> Tensor:
        return torch.ones(count, dtype=torch.float32)

    with FakeTensorMode():
        assert type(numbers(3)) is not Tensor
    with torch.inference_mode():
        kept = numbers(3)
    assert type(kept) is Tensor
    assert not kept.is_inference()
    assert numbers(3) is kept


def test_tensors_on_a_processor_do_not_wake_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initialising CUDA would break workers that are forked afterwards."""

    def touched(*_: object) -> int:
        raise AssertionError("the choice for a CPU tensor asked about GPUs")

    for name in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, name, touched)
    capability.capability.cache_clear()
    assert capability.capability(torch.device("cpu")).cuda is None
    with pytest.raises(AssertionError, match="asked about GPUs"):
        capability.capability()


def test_every_gpu_has_its_own_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """One old card beside a new one does not take the new one's kernels away."""
    cards = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda d: cards[d if isinstance(d, int) else d.index]
    )
    capability.capability.cache_clear()
    try:
        found = {k: capability.capability(torch.device("cuda", k)).cuda for k in cards}
        assert found == cards
        assert capability.capability().cuda == (7, 5)
    finally:
        capability.capability.cache_clear()


# --- torch.compile, derivatives and transforms --------------------------------------------------


@EVERY
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_whole_at_several_sizes(
    op: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", backend)
    face, tensors, _ = FACES[op]
    torch.compiler.reset()
    compiled = torch.compile(face, backend="aot_eager", fullgraph=True)
    for n in (4, 5, 7):
        given = tensors(n)
        torch.testing.assert_close(compiled(*given), face(*given))


@EVERY
def test_forward_mode_derivatives_are_right(op: str) -> None:
    face, tensors, true = FACES[op]
    given, tangents = tensors(4), tensors(4)
    _, got = torch.func.jvp(face, given, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, s) for t, s in zip(given, tangents, strict=True)]
        dual = forward_ad.unpack_dual(face(*duals)).tangent
    pairs = list(zip(given, tangents, strict=True))
    step = 1e-5
    after, before = (
        true(*(t.double() + sign * step * s.double() for t, s in pairs)) for sign in (1, -1)
    )
    want = torch.from_numpy((after - before) / (2 * step))
    for tangent in (got, dual):
        torch.testing.assert_close(tangent.double(), want, rtol=1e-4, atol=1e-4)


@EVERY
def test_reverse_derivatives_are_right_for_every_tensor(op: str) -> None:
    """Damping too: a kernel that has no backward must not drop one of its inputs' gradients."""
    face, tensors, true = FACES[op]
    given = [t.requires_grad_() for t in tensors(4)]
    tangents = tensors(4)
    along = sum(
        (g * s).sum()
        for g, s in zip(torch.autograd.grad(face(*given).sum(), given), tangents, strict=True)
    )
    pairs = [(t.detach().double(), s.double()) for t, s in zip(given, tangents, strict=True)]
    step = 1e-5
    after, before = (true(*(t + sign * step * s for t, s in pairs)).sum() for sign in (1, -1))
    want = (after - before) / (2 * step)
    assert float(along) == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_the_gradient_of_a_damping_is_not_dropped() -> None:
    V, G = draw((2, 8), (5, 8))
    damping = torch.tensor(0.5, requires_grad=True)
    (got,) = torch.autograd.grad(hk.sherman_morrison(V, G, damping).sum(), damping)
    after, before = (oracle.datainf(V, G, 0.5 + step).sum() for step in (1e-6, -1e-6))
    assert float(got) == pytest.approx((after - before) / 2e-6, rel=1e-4)


@EVERY
def test_mapped_over_a_batch(op: str) -> None:
    face, tensors, _ = FACES[op]
    batches = [torch.stack(rows) for rows in zip(tensors(4), tensors(4), tensors(4), strict=True)]
    one_by_one = torch.stack([face(*(b[k] for b in batches)) for k in range(3)])
    torch.testing.assert_close(torch.vmap(face)(*batches), one_by_one)


def test_explain_follows_the_environment(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    delta, act = draw((2, 3, 4), (2, 3, 5))
    assert hk.explain("per_sample_grad", delta, act).config == {"isa": isa}
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")
    assert hk.explain("per_sample_grad", delta, act).backend == "torch"

"""Tensors that are more, or less, than numbers in memory: one clear error, from the face."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import hyperinf_kernels as hk
from hyperinf_kernels.ops.topk import topk_empty, topk_merge_
from hyperinf_kernels.solvers import METHODS, make_solver


class Wrapped(Tensor):
    """A tensor whose numbers are somewhere else."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise AssertionError(f"{function} saw the tensor before the face did")


class Named(Tensor):
    """A subclass that only has a name of its own."""


def nested(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(t.unbind(0)))


def sparse_rows(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return t.flatten(1).to_sparse_csr() if t.ndim > 2 else t.to_sparse_csr()


def quantised(t: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)


# what the error says of each
UNUSUAL: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "meta": (lambda t: t.to("meta"), "on meta"),
    "sparse": (lambda t: t.to_sparse(), "layout sparse_coo"),
    "sparse rows": (sparse_rows, "layout sparse_csr"),
    "one DNN": (lambda t: t.to_mkldnn(), "layout _mkldnn"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "conjugate": (lambda t: t.to(torch.complex64).conj(), "complex64"),
    "quantised": (quantised, "quantised"),
    "nested": (nested, "nested"),
    "zero": (lambda t: torch._efficientzerotensor(t.shape), "immutable zero"),
    "integers": (lambda t: t.long(), "int64"),
    "wrapped": (Wrapped, "Wrapped"),
    "list": (lambda t: t.tolist(), "list"),
    "array": (lambda t: t.numpy(), "ndarray"),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def merge(scores: Tensor) -> None:
    topk_merge_(*topk_empty(2, 3), scores, 0)


def merge_into(values: Tensor) -> None:
    topk_merge_(values, torch.full((2, 3), -1), draw(2, 9), 0)


# every tensor argument of every op in turn; the others are as they should be
DELTA, ACT, V = draw(2, 3, 4), draw(2, 3, 5), draw(2, 4, 5)
ARGUMENTS: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "sherman_morrison V": (lambda t: hk.sherman_morrison(t, draw(4, 8), 0.1), draw(2, 8)),
    "sherman_morrison G": (lambda t: hk.sherman_morrison(draw(2, 8), t, 0.1), draw(4, 8)),
    "factored V": (lambda t: hk.sherman_morrison(t, DELTA, 0.1, ACT), V),
    "factored delta": (lambda t: hk.sherman_morrison(V, t, 0.1, ACT), DELTA),
    "factored act": (lambda t: hk.sherman_morrison(V, DELTA, 0.1, t), ACT),
    "per_sample_grad delta": (lambda t: hk.per_sample_grad(t, ACT), DELTA),
    "per_sample_grad act": (lambda t: hk.per_sample_grad(DELTA, t), ACT),
    "per_sample_norm_sq delta": (lambda t: hk.per_sample_norm_sq(t, ACT), DELTA),
    "per_sample_dot act": (lambda t: hk.per_sample_dot(DELTA, t, V), ACT),
    "per_sample_dot V": (lambda t: hk.per_sample_dot(DELTA, ACT, t), V),
    "pairwise_dot delta1": (lambda t: hk.pairwise_dot(t, ACT, DELTA, ACT), DELTA),
    "pairwise_dot act2": (lambda t: hk.pairwise_dot(DELTA, ACT, DELTA, t), ACT),
    "gram_accumulate_ K": (lambda t: hk.gram_accumulate_(t, draw(40, 8)), draw(40, 40)),
    "gram_accumulate_ G1": (lambda t: hk.gram_accumulate_(draw(40, 40), t), draw(40, 8)),
    "gram_accumulate_ G2": (
        lambda t: hk.gram_accumulate_(draw(40, 33), draw(40, 8), t), draw(33, 8),
    ),
    "gfim_accumulate_ C": (lambda t: hk.gfim_accumulate_(t, draw(2, 4, 40)), draw(40, 40)),
    "gfim_accumulate_ grads": (lambda t: hk.gfim_accumulate_(draw(40, 40), t), draw(2, 4, 40)),
    "gfim_accumulate_ act": (
        lambda t: hk.gfim_accumulate_(draw(5, 5), DELTA, t), ACT,
    ),
    "topk_merge_ values": (merge_into, draw(2, 3)),
    "topk_merge_ scores": (merge, draw(2, 9)),
    "schulz_inverse": (hk.schulz_inverse, torch.eye(5).expand(2, 5, 5).contiguous()),
    "schulz_solve V": (lambda t: hk.schulz_solve(torch.eye(5), t), draw(2, 5)),
    "spd_inverse": (hk.spd_inverse, torch.eye(5).expand(2, 5, 5).contiguous()),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("argument", ARGUMENTS)
def test_ops_name_what_they_do_not_take(argument: str, kind: str) -> None:
    call, good = ARGUMENTS[argument]
    make, said = UNUSUAL[kind]
    call(good.clone())  # a choice that is kept must not let the other through
    name = argument.split()[-1] if " " in argument else "A"
    with pytest.raises((TypeError, ValueError), match=rf"{name}.*{said}|{said}.*{name}"):
        call(make(good))


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("role", ["train", "query"])
def test_influence_names_what_it_does_not_take(role: str, kind: str) -> None:
    make, said = UNUSUAL[kind]
    good = {"a": draw(5, 4, 6), "b": draw(5, 2, 7)}
    bad = {**good, "b": make(good["b"])}
    given = (bad, good) if role == "train" else (good, bad)
    with pytest.raises(hk.InputError, match=rf"block b: {role} gradients must be .*{said}"):
        hk.influence(*given, method="datainf")


@pytest.mark.parametrize("kind", UNUSUAL)
@pytest.mark.parametrize("method", METHODS)
def test_solvers_name_what_they_do_not_take(method: str, kind: str) -> None:
    make, said = UNUSUAL[kind]
    good = {"a": draw(5, 4, 6), "b": draw(5, 2, 7)}
    bad = {**good, "b": make(good["b"])}
    solver = make_solver(method)
    with pytest.raises(hk.InputError, match=rf"block b: train gradients must be .*{said}"):
        solver.update(bad)
    solver.update(good)
    for call in (solver.fit().apply, solver.self_influence):
        with pytest.raises(hk.InputError, match=rf"block b: query gradients must be .*{said}"):
            call(bad)


def test_views_with_a_pending_sign_are_read_as_what_they_are() -> None:
    """The imaginary part of a conjugate is a real tensor whose memory has the other sign."""
    complex_ = torch.complex(DELTA, -DELTA)
    delta = complex_.conj().imag
    assert delta.is_neg()
    assert torch.equal(delta, DELTA)
    assert torch.equal(hk.per_sample_grad(delta, ACT), hk.per_sample_grad(DELTA, ACT))
    rows = torch._neg_view(draw(40, 8))
    assert torch.equal(
        hk.gram_accumulate_(torch.zeros(40, 40), rows, draw(40, 8)),
        hk.gram_accumulate_(torch.zeros(40, 40), -draw(40, 8), draw(40, 8)),
    )
    with pytest.raises(TypeError, match="K.*resolve_neg"):
        hk.gram_accumulate_(torch._neg_view(torch.zeros(40, 40)), rows)
    got = hk.influence({"a": torch._neg_view(draw(5, 4, 6))}, {"a": draw(2, 4, 6)})
    assert torch.equal(got.values, hk.influence({"a": -draw(5, 4, 6)}, {"a": draw(2, 4, 6)}).values)


def test_a_subclass_without_rules_of_its_own_is_a_tensor() -> None:
    delta, act = DELTA.as_subclass(Named), ACT.as_subclass(Named)
    assert torch.equal(hk.per_sample_grad(delta, act).as_subclass(Tensor),
                       hk.per_sample_grad(DELTA, ACT))  # fmt: skip
    parameter = torch.nn.Parameter(draw(5, 4, 6))
    got = hk.influence({"a": parameter}, {"a": draw(2, 4, 6).as_subclass(Named)})
    want = hk.influence({"a": draw(5, 4, 6)}, {"a": draw(2, 4, 6)})
    assert torch.equal(got.values.as_subclass(Tensor), want.values)


# --- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_require_grad_leave_no_graph(method: str, tmp_path: Path) -> None:
    leaf, weight = draw(5, 4, 6).requires_grad_(), torch.ones(4, 6, requires_grad=True)
    train, query = {"a": leaf * weight}, {"a": draw(2, 4, 6).requires_grad_()}
    want = hk.influence({"a": leaf.detach()}, {"a": query["a"].detach()}, method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = hk.influence(train, query, method=method, per_block=True)
        got.to_parquet(tmp_path / "scores.parquet")
        solver = make_solver(method)
        solver.update(train)
        solver.update(train, copy=False)
        if solver.second_pass:
            solver.revisit(train)
        results = [solver.fit().apply(query)["a"], solver.self_influence(query)]
    assert torch.equal(got.values, want.values)
    kept = solver.state()[0].values()
    for tensor in (got.values, *got.per_block.values(), *results, *kept):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert leaf.grad is None


@pytest.mark.parametrize("role", ["train", "query"])
def test_solvers_refuse_forward_mode_derivatives_and_transforms(role: str) -> None:
    good = {"a": draw(5, 4, 6)}

    def scores(t: Tensor) -> Tensor:
        given = ({"a": t}, good) if role == "train" else (good, {"a": t})
        return hk.influence(*given, method="datainf").values

    refused = pytest.raises(hk.InputError, match=f"{role} gradients carry a forward-mode")
    with forward_ad.dual_level(), refused:
        scores(forward_ad.make_dual(good["a"], torch.ones(5, 4, 6)))
    for transform in (
        lambda: torch.func.jvp(scores, (good["a"],), (torch.ones(5, 4, 6),)),
        lambda: torch.func.jacrev(scores)(good["a"]),
        lambda: torch.vmap(scores)(good["a"].expand(2, 5, 4, 6)),
    ):
        with pytest.raises(hk.InputError, match=f"{role} gradients carry a forward-mode"):
            transform()


def test_state_made_in_inference_mode_serves_outside_and_the_other_way() -> None:
    train, query = {"a": draw(5, 4, 6)}, {"a": draw(2, 4, 6)}
    for method in METHODS:
        want = make_solver(method)
        for _ in range(2):
            want.update(train)
        solver = make_solver(method)
        with torch.inference_mode():
            solver.update({"a": draw(5, 4, 6)})
        solver.update(train)
        solver.fit()
        with torch.inference_mode():
            inside = solver.apply(query)["a"]
        assert not inside.is_inference()
        assert torch.equal(inside, want.fit().apply(query)["a"])
        assert torch.equal(solver.redamp(0.5).apply(query)["a"], want.redamp(0.5).apply(query)["a"])

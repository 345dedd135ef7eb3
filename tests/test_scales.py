"""Scores of a relative damping do not depend on the gradients' scale; what does is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.attribution.stream import cached_chunks
from hyperinf_kernels.solvers import make_solver
from hyperinf_kernels.solvers.scaling import FURTHEST, exponent_for
from tests import oracle

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("hyperinf", {}), ("hyperinf", {"side": "rows"}), ("hyperinf", {"side": "both"}),
    ("hyperinf", {"inverse": "schulz"}), ("hyperinf", {"inverse": "dual"}), ("datainf", {}),
    ("exact", {}), ("cg", {}), ("lissa", {"tol": 1e-6, "iterations": 100_000}), ("kfac", {}),
    ("ekfac", {}), ("ekfac", {"two_pass": True}),
]  # fmt: skip
EVERY = pytest.mark.parametrize(
    ("method", "options"), METHODS, ids=lambda x: x if isinstance(x, str) else ",".join(x)
)
SCALES = [1e-30, 1e-20, 1e-15, 1e15, 1e18]
# one block on the D x D side of the flat methods, one in Gram space
SHAPES = {"thin": (2, 5), "wide": (3, 60)}
Grads = dict[str, Tensor]


def gradients(n: int, seed: int) -> Grads:
    generator = torch.Generator().manual_seed(seed)
    return {b: torch.randn(n, *shape, generator=generator) for b, shape in SHAPES.items()}


def times(grads: Grads, factor: float | Tensor) -> Grads:
    return {name: g * factor for name, g in grads.items()}


def off(got: Tensor, want: Tensor | np.ndarray[Any, Any]) -> float:
    """The worst row's relative error."""
    got, want = got.double(), torch.as_tensor(want).double()
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


TRAIN, QUERY = gradients(30, 1), gradients(4, 2)


def solved(method: str, options: dict[str, Any], *batches: Grads) -> Any:
    solver = make_solver(method, **options)
    for batch in batches:
        solver.update(batch)
    for batch in batches if solver.second_pass else ():
        solver.revisit(batch)
    return solver.fit()


@EVERY
@pytest.mark.parametrize("scale", SCALES)
def test_scores_do_not_depend_on_the_scale(
    method: str, options: dict[str, Any], scale: float
) -> None:
    want = hk.influence(TRAIN, QUERY, method, **options)
    got = hk.influence(times(TRAIN, scale), times(QUERY, scale), method, **options)
    assert got.certificate()["certified"], got.certificate()
    assert off(got.values, want.values) <= 1e-5
    for one, other in zip(got.report, want.report, strict=True):
        assert one.damping == pytest.approx(other.damping * scale**2, rel=1e-5)
        assert one.condition_bound == pytest.approx(other.condition_bound, rel=1e-5)


@EVERY
def test_whatever_the_solver_gives_is_at_the_scale_of_its_input(
    method: str, options: dict[str, Any]
) -> None:
    plain = solved(method, options, TRAIN)
    small = solved(method, options, times(TRAIN, 1e-25))
    factor = torch.tensor([1e-25, 1e-14, 1e-33, 1e-22])[:, None, None]
    applied = small.apply(times(QUERY, factor))
    for name, want in plain.apply(QUERY).items():
        assert off(applied[name].double(), want.double() * factor * 1e50) <= 1e-5
    own = plain.self_influence(QUERY)
    assert off(small.self_influence(times(QUERY, 1e-25)), own) <= 1e-5
    if method not in ("cg", "lissa"):
        for name, half in plain.half(QUERY).items():
            found = small.half(times(QUERY, 1e-25))[name]
            assert off((found @ found.mT), half @ half.mT) <= 1e-5
    assert all(entry.converged for entry in small.report())


@EVERY
def test_batches_and_shards_of_other_scales(method: str, options: dict[str, Any]) -> None:
    factor = torch.cat([torch.zeros(2), torch.full((9,), 1e-28), torch.full((12,), 1e-9),
                        torch.ones(7)])[:, None, None]  # fmt: skip
    train = times(TRAIN, factor)
    cuts = (2, 9, 12, 7)
    split = {name: g.split(cuts) for name, g in train.items()}
    batches = [{name: pieces[i] for name, pieces in split.items()} for i in range(4)]
    whole = hk.influence(train, QUERY, method, **options).values
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        places = torch.cat([torch.arange(30).split(cuts)[i] for i in order])
        ordered = [batches[i] for i in order]
        solver = solved(method, options, *ordered)
        rows = {name: g[places] for name, g in train.items()}
        scores = -sum(
            W.flatten(1).double() @ rows[b].flatten(1).double().mT
            for b, W in solver.apply(QUERY).items()
        )
        assert off(scores, whole[:, places]) <= 1e-4
        if options.get("two_pass"):
            continue
        shards = [solved(method, options, batch) if i else make_solver(method, **options)
                  for i, batch in zip(order, ordered, strict=True)]  # fmt: skip
        for i, batch in zip(order, ordered, strict=True):
            if i == 0:
                shards[order.index(0)].update(batch)
        before = [shard.state()[1] if shard.n and shard.lambdas else None for shard in shards]
        merged = shards[0]
        for shard in shards[1:]:
            merged.merge(shard)
        after = [shard.state()[1] for shard in shards[1:] if shard.lambdas]
        assert after == [state for state in before[1:] if state is not None]
        for name, W in merged.fit().apply(QUERY).items():
            assert off(W.double(), solver.apply(QUERY)[name].double()) <= 1e-4
        if isinstance(merged, hk.Exact):
            assert off(sum(merged.scores(QUERY).values()), whole[:, places]) <= 1e-4


def test_mixed_scales_agree_with_the_oracle() -> None:
    factor = torch.tensor([1e-30] * 10 + [1e-17] * 12 + [1e-2] * 8)[:, None, None]
    train = times(TRAIN, factor)
    for method in ("hyperinf", "datainf", "exact"):
        want = oracle.influence(train, QUERY, method)
        solver = make_solver(method)
        for part in (slice(0, 10), slice(10, 22), slice(22, 30)):
            solver.update({name: g[part] for name, g in train.items()})
        scores = sum(
            -W.flatten(1).double() @ train[b].flatten(1).double().mT
            for b, W in solver.apply(QUERY).items()
        )
        assert off(scores, want) <= 1e-4, method


@EVERY
def test_a_saved_state_has_its_scale(method: str, options: dict[str, Any]) -> None:
    solver = solved(method, options, times(TRAIN, 1e-27))
    tensors, meta = solver.state()
    again = make_solver(method, **options)
    again.restore(tensors, meta)
    again.fit()
    query = times(QUERY, 1e-27)
    for name, W in solver.apply(query).items():
        assert torch.equal(again.apply(query)[name], W)
    # older versions wrote none
    plain = solved(method, options, TRAIN)
    tensors, meta = plain.state()
    old = {"blocks": ("shape", "sum_square", "n"), "factors": ("weight", "tokens")}
    meta = {
        kind: {name: {word: held[word] for word in old[kind]} for name, held in by_name.items()}
        for kind, by_name in meta.items()
    }
    again.restore(tensors, meta)
    assert (
        off(again.fit().apply(QUERY)["wide"].flatten(1), plain.apply(QUERY)["wide"].flatten(1))
        < 1e-6
    )


@EVERY
@pytest.mark.parametrize("scale", [1e-36, 1e-40, 1e30], ids=str)
def test_a_block_out_of_range_is_refused_by_name(
    method: str, options: dict[str, Any], scale: float
) -> None:
    train = {**TRAIN, "wide": TRAIN["wide"] * scale}
    with pytest.raises(hk.InputError, match=r"block wide: the largest norm .* rescale the loss"):
        hk.influence(train, QUERY, method, **options)
    # one such row among others is no reason
    train["wide"] = TRAIN["wide"].clone()
    if scale < 1:
        train["wide"][3] *= scale
        assert hk.influence(train, QUERY, method, **options).certificate()["certified"]


@EVERY
def test_queries_whose_scores_fp32_cannot_hold_are_not_certified(
    method: str, options: dict[str, Any]
) -> None:
    queries = {name: q.clone() for name, q in QUERY.items()}
    for q in queries.values():
        q[2] *= 1e-40
    scores = hk.influence(TRAIN, queries, method, **options)
    assert scores.certificate()["certified"] is False
    assert "query 2 is too small" in scores.report[0].fallback
    far = hk.influence(times(TRAIN, 1e17), times(QUERY, 1e-28), method, **options)
    assert far.certificate()["certified"] is False
    zero = hk.influence(TRAIN, {n: q * (torch.arange(4) != 2)[:, None, None] for n, q in
                                QUERY.items()}, method, **options)  # fmt: skip
    assert zero.certificate()["certified"]
    assert not zero.values[2].any()


def test_dot_products_that_fp32_cannot_hold_are_refused() -> None:
    train, query = times(TRAIN, 1e-25), times(QUERY, 1e-25)
    with pytest.raises(hk.InputError, match="grad_dot: the dot products of query 0 .* too small"):
        hk.influence(train, query, "grad_dot")
    engine = hk.GramEngine()
    engine.update(train)
    with pytest.raises(hk.InputError, match="grad_dot: the dot products of query 0 .* too small"):
        engine.scores(query, "grad_dot")
    # a block that adds nothing is no reason
    query["thin"] = QUERY["thin"] * 1e20
    (found,) = engine.scores(query, "grad_dot")
    assert off(found.values, hk.influence(train, query, "grad_dot").values) <= 1e-5


@pytest.mark.parametrize("scale", SCALES)
def test_the_engine_and_own_influence_at_every_scale(scale: float) -> None:
    plain, scaled = hk.GramEngine(), hk.GramEngine()
    plain.update(TRAIN)
    for part in (slice(0, 11), slice(11, 30)):
        scaled.update({name: g[part] * scale for name, g in TRAIN.items()})
    methods = ("datainf", "exact", "cg", "lissa")
    grid = [hk.DataInfDamping(0.1), hk.TraceDamping(0.5)]
    pairs = zip(scaled.scores(times(QUERY, scale), methods, grid),
                plain.scores(QUERY, methods, grid), strict=True)  # fmt: skip
    for got, want in pairs:
        assert off(got.values, want.values) <= 1e-5, got.method
        assert all(entry.converged for entry in got.report)
    for method in (hk.Exact, hk.DataInf):
        own = solved(method.method, {}, times(TRAIN, scale)).own_influence()
        assert off(own, solved(method.method, {}, TRAIN).own_influence()) <= 1e-5


@pytest.mark.parametrize("method", ["hyperinf", "exact", "datainf", "cg", "kfac"])
def test_an_absolute_damping_is_right_or_refused(method: str) -> None:
    want = hk.influence(TRAIN, QUERY, method, 0.3)
    small = times(TRAIN, 1e-20), times(QUERY, 1e-20)
    got = hk.influence(*small, method, 0.3e-40)
    assert off(got.values, want.values) <= 1e-5
    assert got.report[0].damping == pytest.approx(0.3e-40)
    with pytest.raises(
        hk.InputError, match=r"block thin: the damping 3.0e-01 is more than .* times"
    ):
        hk.influence(*small, method, 0.3)


@pytest.mark.parametrize("kind", [hk.KFAC, hk.EKFAC])
def test_tokens_at_every_scale(kind: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(30, 3, 4, generator=generator)
    right = torch.randn(30, 3, 20, generator=generator)
    query = torch.randn(5, 4, 20, generator=generator)

    def fitted(scales: tuple[float, float], cut: int) -> Any:
        solver = kind()
        for part in (slice(0, cut), slice(cut, 30)):
            a, b = left[part] * scales[0], right[part] * scales[1]
            g = (a.double().mT @ b.double()).float()
            if len(g):
                pairs = [(a.flatten(0, 1), b.flatten(0, 1))]
                solver.update({"a": g}, tokens={"a": pairs})
        return solver

    want = fitted((1, 1), 30).fit().apply({"a": query})["a"].double()
    for scales in ((1e-28, 1.0), (1.0, 1e-28), (1e-14, 1e-15), (1e-25, 1e24), (1e24, 1e-25)):
        for cut in (30, 11):
            got = fitted(scales, cut).fit().apply({"a": query * 1e-20})["a"].double()
            assert off(got * 1e20 * (scales[0] * scales[1]) ** 2, want) <= 1e-5
    shards = [fitted((1e-15, 1e14), 30), fitted((1e-2, 1e2), 30)]
    both = fitted((1e-15, 1e14), 30)
    merged = shards[0].merge(shards[1]).fit().apply({"a": query})["a"]
    a, b = left * 1e-2, right * 1e2
    pairs = [(a.flatten(0, 1), b.flatten(0, 1))]
    both.update({"a": a.mT @ b}, tokens={"a": pairs})
    assert off(merged.flatten(1), both.fit().apply({"a": query})["a"].flatten(1)) <= 1e-5


TINY = {name: g * 1e-40 for name, g in TRAIN.items()}
PART = {name: g * torch.logspace(0, -12, g.shape[2]) * 1e-28 for name, g in TRAIN.items()}


@EVERY
def test_numbers_that_the_processor_flushes_are_not_taken_for_zeros(
    method: str, options: dict[str, Any]
) -> None:
    query = times(QUERY, 1e-28)
    want = hk.influence(PART, query, method, **options).values
    assert torch.set_flush_denormal(True)
    try:
        got = hk.influence(PART, query, method, **options)
        with pytest.raises(hk.InputError, match="block thin: .* rescale the loss"):
            hk.influence(TINY, QUERY, method, hk.AbsoluteDamping(1e-60), **options)
        small = hk.influence(TRAIN, TINY, method, **options)
        mixed = {name: torch.cat([g, TRAIN[name]]) for name, g in TINY.items()}
        whole = hk.influence(mixed, QUERY, method, **options)
    finally:
        torch.set_flush_denormal(False)
    assert off(got.values, want) <= 1e-5
    assert small.certificate()["certified"] is False
    assert whole.certificate()["certified"]


@EVERY
def test_squares_that_leave_fp64_are_refused(method: str, options: dict[str, Any]) -> None:
    train = {name: g.double() * 1e-200 for name, g in TRAIN.items()}
    with pytest.raises(hk.InputError, match="block thin: .*count as zeros; rescale the loss"):
        hk.influence(train, QUERY, method, hk.AbsoluteDamping(1e-60), **options)


def test_ordinary_gradients_are_neither_copied_nor_scaled() -> None:
    for scale in (1.0, 1e-9, 1e9):
        train = times(TRAIN, scale)
        for kind in (hk.Exact, hk.EKFAC, hk.DataInf):
            solver = kind()
            solver.update(train, copy=False)
            for name, rows in solver.rows.items():
                assert solver.blocks[name].exponent == 0
                assert rows.tensor().data_ptr() == train[name].data_ptr()
    kept = times(TRAIN, 1e-20)
    before = {name: g.clone() for name, g in kept.items()}
    solver = hk.Exact()
    solver.update(kept, copy=False)
    solver.update(TRAIN, copy=False)
    solver.fit().scores(times(QUERY, 1e-20))
    for name, g in kept.items():
        assert torch.equal(g, before[name])


def test_kept_rows_are_read_at_their_own_scale(tmp_path: Path) -> None:
    for options in ({}, {"folder": tmp_path}):
        solver = hk.EKFAC(**options)
        solver.update(times(TRAIN, 1e-20))
        solver.update(TRAIN)
        ((_, read),) = cached_chunks(solver.kept, SHAPES)
        for name, g in read.items():
            torch.testing.assert_close(g[:30], TRAIN[name] * 1e-20, rtol=1e-6, atol=0)
            assert torch.equal(g[30:], TRAIN[name])


def test_what_cannot_be_kept_leaves_the_scale_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (hk.Exact, hk.HyperINF, hk.EKFAC):
        solver, same = kind(), kind()
        for one in (solver, same):
            one.update(times(TRAIN, 1e-20))
        keep = kind._keep

        def full(self: Any, name: str, batch: Tensor, copy: bool, keep: Any = keep) -> None:
            if name == "wide":
                raise hk.InputError("no room")
            keep(self, name, batch, copy)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "_keep", full)
            with pytest.raises(hk.InputError, match="no room"):
                solver.update(TRAIN)
        for one in (solver, same):
            one.update(TRAIN)
        for name, W in same.fit().apply(QUERY).items():
            assert torch.equal(solver.fit().apply(QUERY)[name], W)


def test_exponents() -> None:
    assert exponent_for(0.0) == exponent_for(1.0) == exponent_for(1e-24) == exponent_for(1e24) == 0
    for top in (1e-80, 1e-60, 1e-26, 1e26, 1e44):
        exponent = exponent_for(top)
        assert abs(exponent) <= FURTHEST
        assert 1e-10 <= top * 4.0**exponent <= 1e10
        assert exponent_for(top * 100, exponent) == exponent
    assert exponent_for(1.0, exponent_for(1e-60)) == 0

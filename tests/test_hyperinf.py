"""HyperINF's routes, its two sides, and what can be done with a fit: redamp, merge, half, save."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from benchmarks.memory import peak_memory
from hyperinf_kernels.ops import costs
from hyperinf_kernels.solvers import hyperinf, planning, routes, summarise
from hyperinf_kernels.solvers.gfim import Gfim
from tests import oracle

K = 8.0
EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
# 3 samples of rank 2 are 6 rows, fewer than 20 and more than 5
BLOCKS = {"wide": (2, 20), "narrow": (2, 5), "wider": (2, 20), "bias": (1, 9)}

Grads = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def shipped_rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Choices must not depend on what this machine was calibrated to."""
    monkeypatch.setenv("HYPERINF_RATES", str(tmp_path / "none.json"))


def grads(n: int, seed: int, whole: bool = False) -> Grads:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        return {
            name: torch.randint(-4, 5, (n, *shape), generator=generator).float()
            for name, shape in BLOCKS.items()
        }
    return {name: torch.randn(n, *shape, generator=generator) for name, shape in BLOCKS.items()}


def fitted(solver: hk.HyperINF, train: Grads, sizes: tuple[int, ...] = ()) -> hk.HyperINF:
    for start, size in zip(np.cumsum([0, *sizes]), sizes or (10**6,), strict=False):
        solver.update({name: g[start : start + size] for name, g in train.items()})
    return solver.fit()


def expected(name: str, train: Grads, query: Grads, lam: float, side: str) -> oracle.Array:
    if side == "both":
        return oracle.hyperinf_both(query[name], train[name], lam)
    return oracle.hyperinf(query[name], train[name], lam, side)


# --- routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["auto", "direct", "schulz", "dual", "cg"])
@pytest.mark.parametrize("damping", [0.1, 1e-3], ids="damping {:g}".format)
@pytest.mark.parametrize("n", [3, 40], ids="n={}".format)
def test_every_route_ends_at_the_same_solution(inverse: Any, damping: float, n: int) -> None:
    train, query = grads(n, 1), grads(4, 2)
    solver = fitted(hk.HyperINF(hk.DataInfDamping(damping), inverse=inverse), train, (1, n - 1))
    W = solver.apply(query)
    for entry in solver.report():
        truth = expected(entry.block, train, query, entry.damping, "cols")
        error = np.abs(oracle.f64(W[entry.block]) - truth).max() / np.abs(truth).max()
        # all routes end in fp64, so only the rounding of W to fp32 is left
        assert error <= 2 * EPS32
        A = oracle.damped(oracle.gfim(train[entry.block]), entry.damping)
        true = oracle.solve_residual(A, oracle.f64(query[entry.block]), oracle.f64(W[entry.block]))
        assert entry.converged
        whole = np.sqrt(np.mean(true**2))
        assert entry.residual <= 2 * np.max(true)
        assert entry.residual >= whole / 4


def test_fp64_gradients_keep_fp64_accuracy_by_conjugate_gradients() -> None:
    train, query = ({k: g.double() for k, g in grads(n, n).items()} for n in (40, 2))
    W = fitted(hk.HyperINF(inverse="cg"), train).apply(query)
    wanted = fitted(hk.HyperINF(inverse="direct"), train).apply(query)
    for name in W:
        assert float((W[name] - wanted[name]).norm()) <= 1e-11 * float(wanted[name].norm())


def test_steps_on_small_blocks_are_not_taken_for_free() -> None:
    for r, d in ((2, 8), (8, 64), (16, 256)):
        (block,) = hk.HyperINF().plan({"b": (r, d)}, n=2000, queries=1).blocks
        assert block.route == "direct"


def test_fp64_gradients_keep_fp64_accuracy_on_the_dual() -> None:
    train, query = ({k: g.double() for k, g in grads(n, n).items()} for n in (3, 2))
    solver = fitted(hk.HyperINF(hk.DataInfDamping(1e-4), inverse="dual"), train)
    W = solver.apply(query)
    for entry in solver.report():
        truth = expected(entry.block, train, query, entry.damping, "cols")
        condition = entry.condition_bound
        error = np.abs(oracle.f64(W[entry.block]) - truth).max() / np.abs(truth).max()
        assert error <= K * EPS64 * condition
        assert entry.residual <= K * EPS64 * condition


def test_the_dual_is_refined_where_its_difference_cancels() -> None:
    """Queries in the span of the rows, which are ten decades above the damping.

    Unrefined, the residual is eps x condition, about 1e-6.
    """
    train = {name: g.double() for name, g in grads(4, 1, whole=True).items()}
    query = {name: g[:3] + g[1:] for name, g in train.items()}
    solver = fitted(hk.HyperINF(hk.DataInfDamping(1e-10), inverse="dual"), train)
    W = solver.apply(query)
    for entry in solver.report():
        if entry.shape[1] > 8:
            A = oracle.damped(oracle.gfim(train[entry.block]), entry.damping)
            flat = [oracle.f64(x[entry.block]).reshape(-1, len(A)) for x in (query, W)]
            assert oracle.solve_residual(A, *flat) <= 1e-12
            assert entry.residual <= 1e-12


def test_rows_are_kept_only_while_they_are_the_smaller_thing() -> None:
    train = grads(30, 1)
    solver = hk.HyperINF()
    for i in range(30):
        solver.update({name: g[i : i + 1] for name, g in train.items()})
        for name, (r, d) in BLOCKS.items():
            gfim = solver.gfims[name]
            assert gfim.holds_rows == ((i + 1) * r < d)
            held = sum(t.numel() for t in gfim.tensors().values())
            assert held <= d * d
    forced = fitted(hk.HyperINF(inverse="dual"), train)
    assert all(gfim.holds_rows for gfim in forced.gfims.values())


@pytest.mark.parametrize("copy", [True, False])
def test_kept_rows_are_the_solvers_own_unless_it_may_keep_a_view(copy: bool) -> None:
    train, query = grads(3, 1), grads(2, 2)
    solver = hk.HyperINF(inverse="dual")
    buffer = {name: g.clone() for name, g in train.items()}
    solver.update(buffer, copy=copy)
    before = solver.fit().apply(query)["wide"]
    buffer["wide"].zero_()
    after = solver.apply(query)["wide"]
    assert torch.equal(before, after) == copy


def test_blocks_of_equal_size_are_one_schulz_batch() -> None:
    train, query = grads(40, 1), grads(3, 2)
    solver = fitted(hk.HyperINF(inverse="schulz"), train)
    with hk.trace_backends() as log:
        W = solver.apply(query)
    # wide and wider together, narrow, bias
    assert sum(plan.kernel.endswith(".schulz") for plan in log) == 3
    for entry in solver.report():
        truth = expected(entry.block, train, query, entry.damping, "cols")
        error = np.abs(oracle.f64(W[entry.block]) - truth).max() / np.abs(truth).max()
        assert error <= 2 * EPS32
        assert entry.fallback is None


def test_a_block_on_which_schulz_grows_is_solved_directly_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, query = grads(40, 1), grads(3, 2)
    true_bound = routes.upper_bound

    def too_low(A: torch.Tensor, *rest: Any) -> torch.Tensor:
        bound = true_bound(A, *rest)
        bound[1:] /= 50
        return bound

    monkeypatch.setattr(routes, "upper_bound", too_low)
    solver = fitted(hk.HyperINF(hk.DataInfDamping(1e-3), inverse="schulz"), train)
    W = solver.apply(query)
    entries = {entry.block: entry for entry in solver.report()}
    assert [name for name, entry in entries.items() if entry.fallback] == ["wider"]
    assert "Cholesky in fp64" in entries["wider"].fallback
    for name, entry in entries.items():
        truth = expected(name, train, query, entry.damping, "cols")
        assert np.abs(oracle.f64(W[name]) - truth).max() <= 2 * EPS32 * np.abs(truth).max()
        assert entry.converged


# --- both sides ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "of_oracle"),
    [
        (lambda: hk.DataInfDamping(0.1), oracle.Damping(datainf=0.1)),
        (lambda: hk.AbsoluteDamping(0.05), oracle.Damping(absolute=0.05)),
        (lambda: hk.TraceDamping(0.3), oracle.Damping(trace=0.3)),
    ],
    ids=["datainf", "absolute", "trace"],
)
def test_both_sides_are_the_damped_kronecker_product(
    make: Callable[[], Any], of_oracle: oracle.Damping
) -> None:
    train, query = grads(25, 1), grads(3, 2)
    solver = fitted(hk.HyperINF(make(), side="both"), train, (20, 5))
    W = solver.apply(query)
    for entry in solver.report():
        lam = of_oracle.of(train[entry.block], "flat")
        assert entry.damping == pytest.approx(lam, rel=1e-6)
        truth = expected(entry.block, train, query, entry.damping, "both")
        assert np.abs(oracle.f64(W[entry.block]) - truth).max() <= 4 * EPS32 * np.abs(truth).max()
        assert entry.converged
        assert entry.residual < 1e-5
        r, d = entry.shape
        t = np.mean(np.sum(oracle.f64(train[entry.block]) ** 2, axis=(1, 2)))
        sides = [
            np.linalg.cond(oracle.damped(oracle.gfim(train[entry.block], side) / t**0.5, mu))
            for side, mu in (("rows", (lam * d / r) ** 0.5), ("cols", (lam * r / d) ** 0.5))
        ]
        assert np.prod(sides) <= entry.condition_bound * (1 + 1e-9)


def test_both_sides_of_zero_gradients_under_absolute_damping_divide_by_it() -> None:
    train = {name: torch.zeros_like(g) for name, g in grads(4, 1).items()}
    query = grads(2, 2)
    W = fitted(hk.HyperINF(0.25, side="both"), train).apply(query)
    for name, V in query.items():
        torch.testing.assert_close(W[name], V / 0.25)


@pytest.mark.parametrize(
    "options",
    [
        {"side": "rows", "inverse": "dual"},
        {"side": "both", "inverse": "schulz"},
        {"side": "both", "mode": "paper"},
    ],
    ids=str,
)
def test_routes_that_a_side_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"side='{options['side']}' has no"):
        hk.HyperINF(**options)


# --- redamp, merge, half, self-influence, saving --------------------------------------------------

KINDS: list[Any] = [
    pytest.param({}, 3, id="rows kept"),
    pytest.param({}, 40, id="sums"),
    pytest.param({"inverse": "dual"}, 12, id="all rows kept"),
    pytest.param({"side": "rows"}, 12, id="row side"),
    pytest.param({"side": "both"}, 12, id="both sides"),
    pytest.param({"inverse": "schulz"}, 12, id="schulz"),
]


@pytest.mark.parametrize(("options", "n"), KINDS)
def test_redamping_equals_a_new_fit(options: dict[str, Any], n: int) -> None:
    train, query = grads(n, 1), grads(3, 2)
    solver = fitted(hk.HyperINF(**options), train)
    solver.apply(query)
    for damping in (hk.DataInfDamping(1.0), hk.AbsoluteDamping(0.3), hk.TraceDamping(0.01)):
        again = solver.redamp(damping)
        assert again is solver
        fresh = fitted(hk.HyperINF(damping, **options), train)
        W, truth = solver.apply(query), fresh.apply(query)
        assert [e.damping for e in solver.report()] == [e.damping for e in fresh.report()]
        assert all(torch.equal(W[name], truth[name]) for name in truth)


@pytest.mark.parametrize(("options", "n"), KINDS)
def test_merged_shards_are_the_whole_bit_for_bit(options: dict[str, Any], n: int) -> None:
    """Whole-number gradients, whose fp64 sums round nowhere."""
    train, query = grads(n, 1, whole=True), grads(3, 2)
    whole = fitted(hk.HyperINF(**options), train)
    cuts = (0, 1, n // 2, n)
    merged = hk.HyperINF(**options)
    for start, stop in itertools.pairwise(cuts):
        part = hk.HyperINF(**options)
        part.update({name: g[start:stop] for name, g in train.items()})
        kept = {name: gfim.tensors() for name, gfim in part.gfims.items()}
        assert merged.merge(part) is merged
        for name, tensors in kept.items():
            assert all(torch.equal(t, part.gfims[name].tensors()[w]) for w, t in tensors.items())
    assert merged.n == n
    for name in BLOCKS:
        for side in merged._sides():
            assert torch.equal(merged.fit().curvature(name, side), whole.curvature(name, side))
    W, truth = merged.apply(query), whole.apply(query)
    for name in BLOCKS:
        torch.testing.assert_close(W[name], truth[name], rtol=1e-5, atol=1e-6)


def test_shards_of_rows_and_of_sums_merge_either_way() -> None:
    train, query = grads(40, 1), grads(2, 2)
    truth = fitted(hk.HyperINF(), train).apply(query)
    for first, second in ((slice(0, 2), slice(2, 40)), (slice(2, 40), slice(0, 2))):
        parts = [hk.HyperINF(), hk.HyperINF()]
        for solver, part in zip(parts, (first, second), strict=True):
            solver.update({name: g[part] for name, g in train.items()})
        W = parts[0].merge(parts[1]).apply(query)
        for name in BLOCKS:
            torch.testing.assert_close(W[name], truth[name], rtol=1e-5, atol=1e-6)


def test_shards_that_do_not_fit_are_refused_and_change_nothing() -> None:
    solver, other = hk.HyperINF(), hk.HyperINF(side="rows")
    solver.update(grads(3, 1))
    other.update(grads(3, 1))
    odd = hk.HyperINF()
    odd.update(grads(3, 1) | {"bias": torch.randn(3, 1, 8)})
    for bad, named in ((other, "options"), (odd, "bias"), (solver, "another")):
        with pytest.raises(hk.InputError, match=named):
            solver.merge(bad)
    assert solver.n == 3


@pytest.mark.parametrize(("options", "n"), KINDS)
def test_halves_are_embeddings_of_the_inverse(options: dict[str, Any], n: int) -> None:
    train, x, y = grads(n, 1), grads(4, 2), grads(5, 3)
    solver = fitted(hk.HyperINF(**options), train)
    left, right = solver.half(x), solver.half(y)
    for name, (r, d) in BLOCKS.items():
        assert left[name].shape == (4, r * d)
        lam = solver.lambdas[name]
        truth = (
            oracle.flatten(expected(name, train, x, lam, solver.side)) @ oracle.flatten(y[name]).T
        )
        found = oracle.f64(left[name]) @ oracle.f64(right[name]).T
        assert np.abs(found - truth).max() <= 16 * EPS32 * np.abs(truth).max()


@pytest.mark.parametrize(("options", "n"), KINDS)
def test_self_influence_is_the_diagonal(options: dict[str, Any], n: int) -> None:
    train = grads(n, 1)
    scores = hk.influence(train, train, hk.HyperINF(**options)).values
    own = fitted(hk.HyperINF(**options), train).self_influence(train)
    assert own.shape == (n,)
    assert (own < 0).all()
    torch.testing.assert_close(own, scores.diagonal(), rtol=1e-5, atol=1e-6)


def test_paper_mode_has_no_half() -> None:
    solver = fitted(hk.HyperINF(mode="paper"), grads(3, 1))
    with pytest.raises(hk.InputError, match="paper"):
        solver.half(grads(2, 2))


@pytest.mark.parametrize(("options", "n"), KINDS)
def test_a_saved_fit_is_taken_up_again(options: dict[str, Any], n: int) -> None:
    train, query = grads(n, 1), grads(3, 2)
    solver = fitted(hk.HyperINF(**options), train)
    again = hk.HyperINF(**solver.options())
    again.restore(*solver.state())
    W, truth = again.fit().apply(query), solver.apply(query)
    assert all(torch.equal(W[name], truth[name]) for name in truth)
    more = grads(2, 9)
    for one in (solver, again):
        one.update(more)
    W, truth = again.apply(query), solver.apply(query)
    assert all(torch.equal(W[name], truth[name]) for name in truth)


# --- collapse ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["direct", "schulz", "dual", "cg"])
def test_a_solution_that_is_a_multiple_of_the_query_is_called_collapsed(inverse: Any) -> None:
    train, query = grads(10, 1), grads(3, 2)
    solver = fitted(hk.HyperINF(hk.DataInfDamping(0.1), inverse=inverse), train)
    for damping, collapsed in ((0.1, False), (1e5, True), (0.05, False)):
        W = solver.redamp(hk.DataInfDamping(damping)).apply(query)
        certificate = summarise(solver.report())
        for entry in solver.report():
            angle = oracle.angle(query[entry.block], W[entry.block])
            assert entry.collapse_angle == pytest.approx(angle, rel=1e-3, abs=1e-3)
            assert (entry.collapse_angle < 5) == collapsed
        assert certificate["certified"]
        assert certificate["collapsed_blocks"] == (len(BLOCKS) if collapsed else 0)
        assert ("gradient dot" in str(certificate["summary"])) == collapsed


@pytest.mark.parametrize("side", ["cols", "rows", "both"])
def test_a_state_of_another_side_is_refused(side: Any) -> None:
    train = grads(40, 1)
    for other in ("cols", "rows", "both"):
        for size in (3, 40):
            state = fitted(hk.HyperINF(side=other), {k: g[:size] for k, g in train.items()}).state()
            solver = hk.HyperINF(side=side)
            if other == side:
                solver.restore(*state)
                assert solver.n == size
            else:
                with pytest.raises(hk.InputError, match=f"block wide: .* not of side='{side}'"):
                    solver.restore(*state)


# --- the plan ------------------------------------------------------------------------------------


def test_a_plan_names_the_route_and_cost_of_every_block() -> None:
    shapes = {f"layer{i}": (16, 1024) for i in range(96)} | {"head": (2, 1024)}
    plan = hk.HyperINF().plan(shapes, n=4500, queries=1)
    assert [block.block for block in plan.blocks] == list(shapes)
    assert {block.route for block in plan.blocks} == {"direct"}
    assert plan.seconds == pytest.approx(sum(block.seconds for block in plan.blocks))
    curvature = 96 * 2 * 4500 * 16 * 1024**2 + 2 * 4500 * 2 * 1024**2
    assert curvature < plan.flops < 1.1 * curvature
    text = str(plan)
    assert "96" in text
    assert "16 x 1024" in text
    assert "shipped" in text
    # few samples of low rank: the n r x n r dual
    few = hk.HyperINF().plan({"b": (4, 2048)}, n=50, queries=3)
    assert few.blocks[0].route == "dual"
    assert few.blocks[0].seconds < few.blocks[0].candidates["direct"] / 4
    # a well-conditioned, very wide block and one query
    easy = hk.HyperINF(hk.TraceDamping(10.0)).plan({"b": (1, 20_000)}, n=50_000, queries=1)
    assert easy.blocks[0].route == "cg"
    assert hk.HyperINF(inverse="schulz").plan(shapes, 10, 1).blocks[0].route == "schulz"


def test_what_runs_is_what_was_planned() -> None:
    for n in (3, 40):
        train, query = grads(n, 1), grads(2, 2)
        solver = fitted(hk.HyperINF(), train)
        planned = solver.plan(BLOCKS, n, 2)
        for block in planned.blocks:
            assert block.route != "dual" or n * block.shape[0] < block.shape[1]
            assert solver._route(block.block, 2) == block.route
        solver.apply(query)


@pytest.mark.parametrize(
    ("inverse", "side"),
    [("auto", "cols"), ("direct", "cols"), ("schulz", "cols"), ("dual", "cols"), ("cg", "cols"),
     ("auto", "rows"), ("schulz", "rows"), ("cg", "rows"), ("auto", "both"), ("direct", "both")],
)  # fmt: skip
def test_the_plan_of_every_option_has_the_works_that_run(
    inverse: Any, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same bound of the condition they are equal to the last flop, whatever n r is."""
    monkeypatch.setattr(hyperinf, "condition_bound", lambda *rule: 500.0)
    monkeypatch.setattr(hk.HyperINF, "_condition_bound", lambda self, name: 500.0)
    for n in (3, 40):
        solver = fitted(hk.HyperINF(inverse=inverse, side=side), grads(n, 1))
        seen, works_of = [], solver._works
        monkeypatch.setattr(solver, "_works", lambda *a: seen.append(works_of(*a)) or seen[-1])
        planned = [block.route for block in solver.plan(BLOCKS, n, 2).blocks]
        assert [solver._route(name, 2) for name in BLOCKS] == planned
        assert seen[: len(BLOCKS)] == seen[len(BLOCKS) :]
        if inverse != "auto":
            assert set(planned) == {inverse}


def test_both_sides_are_planned_with_the_work_of_both() -> None:
    n, r, d = 100, 1024, 1024
    cols = hk.HyperINF(inverse="direct").plan({"a": (r, d)}, n, 2)
    both = hk.HyperINF(side="both").plan({"a": (r, d)}, n, 2)
    dots = 2 * 2 * n * r * d
    # a square block has two equal sides, and one set of dot products behind them
    assert both.flops - dots == 2 * (cols.flops - dots)
    assert both.kept == 2 * cols.kept
    wide = hk.HyperINF(side="both").plan({"a": (4, d)}, n, 2)
    narrow = hk.HyperINF(inverse="direct").plan({"a": (4, d)}, n, 2)
    assert 1 < wide.flops / narrow.flops < 1.05


def test_without_damping_the_plan_is_direct_or_refused_like_the_run() -> None:
    assert hk.HyperINF(0.0).plan({"a": (1, 128)}, 20, 1).blocks[0].route == "direct"
    solver = fitted(hk.HyperINF(0.0, inverse="cg"), grads(400, 1))
    with pytest.raises(hk.InputError, match="inverse: cg needs a positive damping"):
        solver.plan(BLOCKS, 400, 2)
    with pytest.raises(hk.InputError, match="block .*: cg needs a positive damping"):
        solver.apply(grads(2, 2))


def test_the_condition_bound_of_a_rule_holds_for_its_gradients() -> None:
    train = grads(12, 1)
    for rule in (hk.DataInfDamping(0.1), hk.TraceDamping(0.02) + hk.DataInfDamping(0.01)):
        solver = fitted(hk.HyperINF(rule), train)
        for name, (r, d) in BLOCKS.items():
            condition = np.linalg.cond(oracle.f64(solver.curvature(name)))
            assert condition <= planning.condition_bound(rule, r, d, d) * (1 + 1e-9)


def test_rates_of_another_machine_change_the_route(tmp_path: Any, monkeypatch: Any) -> None:
    slow = {name: {"peak": 1e6, "half": 0.0} for name in costs.OPERATIONS}
    fast = slow | {"gemm_fp32": {"peak": 1e15, "half": 0.0}, "gemm_fp64": {"peak": 1e15, "half": 0}}
    path = tmp_path / "rates.json"
    monkeypatch.setenv("HYPERINF_RATES", str(path))
    chosen = []
    for table in (slow, fast):
        entry = {"source": "made up", "rates": table}
        path.write_text(json.dumps({"format": 1, "devices": {"cpu": entry}}))
        chosen.append(costs.cheaper_inverse(512, 8))
        assert costs.rates_of("cpu").source == "made up"
        # a device that was not calibrated keeps the shipped figures
        assert costs.rates_of("cuda").source.startswith("shipped")
        os.utime(path, ns=(len(chosen), len(chosen)))
    assert chosen == ["direct", "schulz"]
    path.write_text("{}")
    with pytest.raises(hk.InputError, match=r"rates\.json.*calibrate"):
        costs.rates_of("cpu")


# --- sums in fp32 runs ---------------------------------------------------------------------------


def wide(n: int, seed: int, d: int = 320) -> Grads:
    return {"b": torch.randn(n, 2, d, generator=torch.Generator().manual_seed(seed))}


def test_runs_are_for_wide_blocks_at_usual_dampings_only() -> None:
    small = grads(40, 1)
    for solver, train, runs in (
        (hk.HyperINF(), wide(400, 1), True),
        (hk.HyperINF(), small, False),
        (hk.HyperINF(hk.DataInfDamping(1e-4)), wide(400, 1), False),
        (hk.HyperINF(hk.AbsoluteDamping(0.1)), wide(400, 1), True),
        (hk.HyperINF(hk.AbsoluteDamping(1e-4)), wide(400, 1), False),
        (hk.HyperINF(tol=1e-6), wide(400, 1), False),
        (hk.HyperINF(check="full"), wide(400, 1), False),
        (hk.HyperINF(side="both"), wide(400, 1), False),
        (hk.HyperINF(), {k: t.double() for k, t in wide(400, 1).items()}, False),
    ):
        fitted(solver, train)
        assert all((gfim.image is not None) == runs for gfim in solver.gfims.values())


def test_the_residual_of_runs_is_that_against_the_rows_themselves() -> None:
    train, query = wide(400, 1), wide(4, 2)
    solver = fitted(hk.HyperINF(), train, (150, 7, 243))
    W = solver.apply(query)
    (entry,) = solver.report()
    A = oracle.damped(oracle.gfim(train["b"]), entry.damping)
    V, X = oracle.f64(query["b"]), oracle.f64(W["b"])
    E = np.linalg.norm((V - X @ A).reshape(4, -1), axis=1) / np.linalg.norm(
        V.reshape(4, -1), axis=1
    )
    assert E.max() / 3 <= entry.residual <= 3 * E.max()
    assert entry.residual_by == "estimate"
    assert entry.converged


@pytest.mark.parametrize("one", [hk.DataInfDamping(0.1), hk.AbsoluteDamping(0.1)], ids=str)
def test_shards_of_runs_merge_to_what_the_whole_is_known_by(one: Any) -> None:
    train, query = wide(400, 1), wide(4, 2)
    parts = [fitted(hk.HyperINF(one), {"b": t}) for t in train["b"].split((250, 150))]
    merged, whole = parts[0].merge(parts[1]).fit(), fitted(hk.HyperINF(one), train)
    exact = fitted(hk.HyperINF(one, tol=1e-3), train)
    image = whole.gfims["b"].image
    assert image is not None
    assert merged.gfims["b"].image is not None
    stacked = train["b"].flatten(0, 1).double()
    want = whole.gfims["b"].probes() @ stacked.mT @ stacked
    for found in (image, merged.gfims["b"].image):
        assert float((found - want).norm() / want.norm()) <= 1e-13
    W, truth = merged.apply(query)["b"], exact.apply(query)["b"]
    assert float((W - truth).norm() / truth.norm()) <= 1e-5


def test_runs_and_fp64_sums_merge_either_way() -> None:
    first, second = wide(250, 1), wide(150, 2)
    for order in (1, -1):
        runs = fitted(hk.HyperINF(), first)
        fine = fitted(hk.HyperINF(), second)
        fine.gfims["b"] = Gfim(2, 320, "cols", "none")
        fine.gfims["b"].add(second["b"], copy=True)
        one, other = (runs, fine)[::order]
        merged = one.merge(other).fit().gfims["b"]
        stacked = torch.cat([first["b"], second["b"]]).flatten(0, 1).double()
        want = merged.probes() @ stacked.mT @ stacked
        assert float((merged.image - want).norm() / want.norm()) <= 1e-13


def test_a_saved_fit_of_runs_knows_what_they_lost() -> None:
    train, query = wide(400, 1), wide(4, 2)
    solver = fitted(hk.HyperINF(), train)
    again = hk.HyperINF(**solver.options())
    again.restore(*solver.state())
    for one in (solver, again):
        one.update(wide(30, 9))
        one.apply(query)
    assert again.report() == solver.report()
    assert again.report()[0].residual_by == "estimate"
    # a state from before there were runs has no image: its sums are fp64
    tensors, meta = fitted(hk.HyperINF(tol=1e-3), train).state()
    assert set(tensors) == {"b"}
    old = hk.HyperINF()
    old.restore(tensors, meta)
    old.fit().apply(query)
    assert old.report()[0].residual_by == "measured"


@pytest.mark.parametrize("method", ["hyperinf", "kfac", "ekfac"])
def test_no_fp64_copy_of_the_rows_is_made(method: str) -> None:
    """Rows of 128 MiB, in fp64 256: sums, factors, W and temporaries of tiles stay below both."""
    train = {"b": torch.randn(2048, 16, 1024)}
    query = {"b": torch.randn(4, 16, 1024)}
    call = lambda: hk.influence(train, query, method)
    hk.influence({"b": train["b"][:128]}, query, method)
    assert peak_memory(call) <= {"hyperinf": 96, "kfac": 128, "ekfac": 240}[method] * 2**20

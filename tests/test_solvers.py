"""hk.influence and the solver objects on plain tensors, against the fp64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from tests import oracle

# Each block's solve and the sum over blocks may each be a few times worse than the naive fp32 one.
K = 8.0
FLOOR = 8 * torch.finfo(torch.float32).eps
START = 5e-5
EXTRA = 1e-3  # damping that the released HyperINF code adds to its own

Grads = dict[str, torch.Tensor]
# LoRA A and B of one layer, a head and a bias; with 12 samples some have n < r d, some n > r d.
BLOCKS = {"q.lora_A": (2, 7), "q.lora_B": (2, 5), "head": (3, 4), "bias": (1, 6)}
SCALES = {"q.lora_A": 1.0, "q.lora_B": 1e-3, "head": 30.0, "bias": 0.1}

METHODS: list[Any] = [  # method, options of the package, options of the oracle
    pytest.param("grad_dot", {}, {}, id="grad_dot"),
    pytest.param("datainf", {}, {}, id="datainf"),
    pytest.param("exact", {}, {}, id="exact"),
    pytest.param("hyperinf", {}, {}, id="hyperinf"),
    pytest.param("hyperinf", {"inverse": "schulz"}, {}, id="hyperinf schulz"),
    pytest.param("hyperinf", {"inverse": "direct"}, {}, id="hyperinf direct"),
    pytest.param("hyperinf", {"side": "rows"}, {"side": "rows"}, id="hyperinf rows"),
]
MAKERS: dict[str, Callable[[], Any]] = {
    "grad_dot": lambda: hk.GradDot(),
    "datainf": lambda: hk.DataInf(damping=hk.DataInfDamping(0.1)),
    "exact": lambda: hk.Exact(damping=hk.DataInfDamping(0.1)),
    "lissa": lambda: hk.LiSSA(damping=hk.DataInfDamping(0.1)),
    "hyperinf": lambda: hk.HyperINF(damping=hk.DataInfDamping(0.1)),
}
NAMES = list(MAKERS)
DAMPINGS: list[Any] = [
    pytest.param(lambda: hk.DataInfDamping(0.1), oracle.Damping(datainf=0.1), id="datainf damping"),
    pytest.param(lambda: hk.DataInfDamping(2), oracle.Damping(datainf=2.0), id="datainf x 20"),
    pytest.param(lambda: hk.AbsoluteDamping(0.03), oracle.Damping(absolute=0.03), id="absolute"),
    pytest.param(lambda: hk.TraceDamping(0.2), oracle.Damping(trace=0.2), id="trace"),
    pytest.param(
        lambda: hk.DataInfDamping(0.1) + hk.AbsoluteDamping(0.01) + hk.TraceDamping(0.05),
        oracle.Damping(datainf=0.1, absolute=0.01, trace=0.05),
        id="sum of rules",
    ),
]


def gradients(n: int, seed: int, scales: dict[str, float] | None = None) -> Grads:
    generator = torch.Generator().manual_seed(seed)
    scales = SCALES if scales is None else scales
    return {
        name: scales[name] * torch.randn(n, *shape, generator=generator)
        for name, shape in BLOCKS.items()
    }


def train_and_query(n: int = 12, m: int = 3) -> tuple[Grads, Grads]:
    return gradients(n, seed=1), gradients(m, seed=2)


def to(grads: Grads, dtype: torch.dtype) -> Grads:
    return {name: g.to(dtype) for name, g in grads.items()}


def fitted(solver: Any, train: Grads) -> Any:
    solver.update(train)
    return solver.fit()


# --- the naive form of each method in fp32 ------------------------------------------------------


def peer_directions(
    grads: torch.Tensor, queries: torch.Tensor, method: str, lam: float, **options: Any
) -> torch.Tensor:
    grads, queries = grads.float(), queries.float()
    n, r, d = grads.shape
    if method == "grad_dot":
        return queries
    if method.startswith("hyperinf"):
        rows = options.pop("side", "cols") == "rows"
        g, v = (grads.mT, queries.mT) if rows else (grads, queries)
        a = (g.mT @ g).mean(0) + lam * torch.eye(g.shape[-1])
        w = v @ peer_iteration(a, **options) if options else torch.linalg.solve(a, v, left=False)
        return w.mT if rows else w
    p, q = grads.reshape(n, r * d), queries.reshape(-1, r * d)
    if method == "datainf":
        weights = q @ p.T / (lam + p.square().sum(-1))
        w = (q - weights @ p / n) / lam
    elif method == "exact":
        w = torch.linalg.solve(p.T @ p / n + lam * torch.eye(r * d), q, left=False)
    else:
        w = torch.zeros_like(q)
        for _ in range(options["steps"]):
            w = options["scale"] * q + w - options["scale"] * (w @ p.T @ p / n + lam * w)
    return w.reshape(queries.shape)


def peer_iteration(a: torch.Tensor, steps: int, start: float = START) -> torch.Tensor:
    identity = torch.eye(len(a))
    x = start * identity
    for _ in range(steps):
        x = x @ (2 * identity - a @ x)
    return x


def lam_of(grads: torch.Tensor, method: str, damping: oracle.Damping, options: Any) -> float:
    kind = options.get("side", "cols") if "hyperinf" in method else "flat"
    return 0.0 if method == "grad_dot" else damping.of(grads, kind) + options.get("extra", 0.0)


def peer_influence(
    train: Grads, query: Grads, method: str, damping: oracle.Damping, options: dict[str, Any]
) -> torch.Tensor:
    m, n = (len(next(iter(grads.values()))) for grads in (query, train))
    total = torch.zeros(m, n)
    for name, grads in train.items():
        lam = lam_of(grads, method, damping, options)
        rest = {key: value for key, value in options.items() if key != "extra"}
        w = peer_directions(grads, query[name], method, lam, **rest)
        total -= w.flatten(1) @ grads.float().flatten(1).T
    return total


def assert_influence_exact(
    values: torch.Tensor,
    train: Grads,
    query: Grads,
    method: str,
    damping: oracle.Damping = oracle.Damping(datainf=0.1),  # noqa: B008 - frozen
    **options: Any,
) -> None:
    expected = oracle.influence(train, query, method, damping, dict.fromkeys(train, options))
    peer = peer_influence(train, query, method, damping, options)
    assert values.dtype == torch.float32
    oracle.assert_as_exact_as(values, expected, peer, k=K, floor=FLOOR, what=method)


def assert_directions_exact(
    w: Grads, train: Grads, query: Grads, method: str, **options: Any
) -> None:
    assert list(w) == list(train)
    for name, grads in train.items():
        lam = lam_of(grads, method, oracle.Damping(datainf=0.1), options)
        rest = {key: value for key, value in options.items() if key != "extra"}
        expected = oracle.directions(grads, query[name], method, lam, **rest)
        peer = peer_directions(grads, query[name], method, lam, **rest)
        assert w[name].dtype == torch.float32
        oracle.assert_as_exact_as(w[name], expected, peer, k=K, floor=FLOOR, what=name)


# --- influence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 12, 60], ids="n={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "options", "of_oracle"), METHODS)
def test_influence_matches_the_oracle(
    method: str, options: dict[str, Any], of_oracle: dict[str, Any], dtype: torch.dtype, n: int
) -> None:
    train, query = (to(grads, dtype) for grads in train_and_query(n))
    scores = hk.influence(train, query, method=method, **options)
    assert_influence_exact(scores.values, train, query, method, **of_oracle)


@pytest.mark.parametrize(("make", "of_oracle_damping"), DAMPINGS)
@pytest.mark.parametrize(("method", "options", "of_oracle"), METHODS)
def test_every_damping_rule_reaches_every_method(
    method: str,
    options: dict[str, Any],
    of_oracle: dict[str, Any],
    make: Callable[[], Any],
    of_oracle_damping: oracle.Damping,
) -> None:
    train, query = train_and_query()
    scores = hk.influence(train, query, method=method, damping=make(), **options)
    assert_influence_exact(scores.values, train, query, method, of_oracle_damping, **of_oracle)
    for entry in scores.report:
        expected = lam_of(train[entry.block], method, of_oracle_damping, of_oracle)
        if method != "grad_dot":
            assert entry.damping == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("iterations", [1, 15, 20, 30], ids="k={}".format)
@pytest.mark.parametrize("extra", [0.0, EXTRA], ids="extra={:g}".format)
@pytest.mark.parametrize("side", ["cols", "rows"])
def test_paper_mode_is_the_published_iteration(side: str, extra: float, iterations: int) -> None:
    train, query = train_and_query()
    method = hk.HyperINF(
        mode="paper", iterations=iterations, start=START, extra_damping=extra, side=side
    )
    scores = hk.influence(train, query, method=method)
    assert_influence_exact(
        scores.values, train, query, "hyperinf_paper", side=side, steps=iterations, extra=extra
    )


def test_paper_mode_defaults_are_the_published_constants() -> None:
    train, query = train_and_query()
    values = hk.influence(train, query, method="hyperinf", mode="paper").values
    assert_influence_exact(values, train, query, "hyperinf_paper", steps=30, extra=EXTRA)


def test_converged_mode_adds_nothing_to_the_damping_and_inverts_small_eigenvalues() -> None:
    """After 15 published steps an eigenvalue of 1e-6 is scaled by 1.6, not by a million."""
    train, query = gradients(12, 1, dict.fromkeys(BLOCKS, 1e-3)), gradients(3, 2)
    converged = hk.influence(train, query, method="hyperinf").values
    assert_influence_exact(converged, train, query, "hyperinf")
    paper = hk.HyperINF(mode="paper", iterations=15, extra_damping=0.0)
    collapsed = hk.influence(train, query, method=paper).values
    scaled_dot = START * 2**15 * hk.influence(train, query, method="grad_dot").values
    torch.testing.assert_close(collapsed, scaled_dot, rtol=1e-2, atol=1e-6)
    assert converged.abs().max() > 1e3 * collapsed.abs().max()


@pytest.mark.parametrize("iterations", [1, 7, 100], ids="k={}".format)
def test_lissa_with_a_given_step_is_its_filter(iterations: int) -> None:
    scales = dict.fromkeys(BLOCKS, 1.0)
    train, query = gradients(12, 1, scales), gradients(3, 2, scales)
    step = 0.02
    method = hk.LiSSA(iterations=iterations, scale=step, tol=1e-30)
    values = hk.influence(train, query, method=method).values
    assert_influence_exact(values, train, query, "lissa", scale=step, steps=iterations)


@pytest.mark.parametrize("tol", [1e-2, 1e-5], ids="tol={:g}".format)
def test_lissa_finds_a_safe_step_and_stops_at_its_tolerance(tol: float) -> None:
    train, query = train_and_query(n=12, m=1)
    solver = hk.LiSSA(iterations=100_000, tol=tol)
    w = fitted(solver, train).apply(query)
    for entry in solver.report():
        rows = oracle.flatten(train[entry.block])
        a = oracle.damped(oracle.fisher(rows), entry.damping)
        residual = oracle.solve_residual(
            a, oracle.flatten(query[entry.block]), oracle.flatten(w[entry.block])
        )
        assert entry.converged
        assert residual <= tol * (1 + 1e-3)
        assert entry.residual == pytest.approx(residual, rel=0.05)
        assert 1 < entry.iterations < 100_000


def test_lissa_says_when_its_iterations_did_not_suffice() -> None:
    train, query = train_and_query()
    solver = hk.LiSSA(iterations=2, tol=1e-6)
    report = hk.influence(train, query, method=solver).report
    assert not any(entry.converged for entry in report)
    assert all(entry.residual > 1e-6 and entry.iterations == 2 for entry in report)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(lambda: hk.LiSSA(iterations=5000, scale=1e3), id="lissa, step too long"),
        pytest.param(
            lambda: hk.HyperINF(mode="paper", start=5.0), id="paper, start beyond 2 over lmax"
        ),
    ],
)
def test_divergence_never_reaches_a_score(method: Callable[[], Any]) -> None:
    train, query = train_and_query()
    with pytest.raises(ValueError, match=r"q\.lora_A|head"):
        hk.influence(train, query, method=method())


def test_exact_method_is_the_same_from_both_sides_of_woodbury() -> None:
    """12 samples use the n x n Gram matrix in some blocks and the D x D Fisher in others."""
    train, query = train_and_query(n=12)
    doubled = {name: torch.cat([g, g]) for name, g in train.items()}  # the same Fisher, n = 24
    once = hk.influence(train, query, method="exact").values
    twice = hk.influence(doubled, query, method="exact").values
    peer = peer_influence(train, query, "exact", oracle.Damping(datainf=0.1), {})
    oracle.assert_as_exact_as(twice[:, :12], once, peer, k=K, floor=FLOOR)
    oracle.assert_as_exact_as(twice[:, 12:], once, peer, k=K, floor=FLOOR)


# --- meaning of the numbers ---------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
def test_negative_helps_and_positive_harms(method: str) -> None:
    train, _ = train_and_query()
    query = {name: torch.stack([g[3], -g[3]]) for name, g in train.items()}
    values = hk.influence(train, query, method=method).values
    assert values[0, 3] < 0 < values[1, 3]


@pytest.mark.parametrize("method", NAMES)
def test_methods_other_than_the_dot_product_do_invert(method: str) -> None:
    """Scores with H or with nothing in place of the inverse rank differently; none may pass."""
    train, query = train_and_query()
    values = hk.influence(train, query, method=method).values.flatten()
    dot = peer_influence(train, query, "grad_dot", oracle.Damping(), {}).flatten()
    correlation = torch.corrcoef(torch.stack([values, dot]))[0, 1]
    assert correlation > 0.999 if method == "grad_dot" else correlation < 0.99


@pytest.mark.parametrize("method", ["datainf", "exact", "hyperinf"])
@pytest.mark.parametrize("factor", [1e-6, 1e4], ids="losses x {:g}".format)
def test_scaling_every_loss_leaves_scores_alone(method: str, factor: float) -> None:
    train, query = train_and_query()
    scaled = [{name: factor * g for name, g in grads.items()} for grads in (train, query)]
    values = hk.influence(*scaled, method=method).values
    assert_influence_exact(values, train, query, method)


@pytest.mark.parametrize("method", NAMES)
def test_queries_do_not_influence_each_other(method: str) -> None:
    train, query = train_and_query(m=4)
    together = hk.influence(train, query, method=method).values
    for q in range(4):
        one = {name: g[q : q + 1] for name, g in query.items()}
        alone = hk.influence(train, one, method=method).values
        # LiSSA stops on the residual of all queries, so rows agree to its tolerance only.
        tolerance = 1e-2 if method == "lissa" else 1e-4
        torch.testing.assert_close(
            together[q], alone[0], rtol=tolerance, atol=tolerance * alone.abs().max().item()
        )


@pytest.mark.parametrize("method", NAMES)
def test_order_of_the_training_samples_only_permutes_scores(method: str) -> None:
    train, query = train_and_query()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = {name: g[order] for name, g in train.items()}
    values = hk.influence(train, query, method=method).values[:, order]
    moved = hk.influence(shuffled, query, method=method).values
    torch.testing.assert_close(moved, values, rtol=1e-4, atol=1e-4 * values.abs().max().item())


@pytest.mark.parametrize("method", ["datainf", "exact", "hyperinf"])
def test_blocks_add_and_are_damped_on_their_own(method: str) -> None:
    train, query = train_and_query()
    parts = [
        hk.influence({name: train[name]}, {name: query[name]}, method=method).values
        for name in train
    ]
    values = hk.influence(train, query, method=method).values
    torch.testing.assert_close(values, sum(parts), rtol=1e-4, atol=1e-4 * values.abs().max().item())


def test_order_of_the_blocks_in_the_query_does_not_matter() -> None:
    train, query = train_and_query()
    turned = dict(reversed(list(query.items())))
    assert_influence_exact(hk.influence(train, turned).values, train, query, "hyperinf")


# --- inputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
def test_no_queries_give_no_rows(method: str) -> None:
    train, query = train_and_query(m=0)
    assert hk.influence(train, query, method=method).values.shape == (0, 12)


@pytest.mark.parametrize("method", ["grad_dot", "datainf", "exact", "hyperinf"])
def test_transposed_and_strided_gradients_are_read_as_they_are(method: str) -> None:
    train, query = train_and_query()
    odd_train = {name: g.mT.contiguous().mT for name, g in train.items()}
    odd_query = {name: g.repeat_interleave(2, dim=0)[::2] for name, g in query.items()}
    values = hk.influence(odd_train, odd_query, method=method).values
    assert_influence_exact(values, train, query, method)


@pytest.mark.parametrize("method", ["grad_dot", "datainf", "exact", "hyperinf"])
def test_types_of_train_and_query_may_differ(method: str) -> None:
    train, query = train_and_query()
    train = to(train, torch.bfloat16)
    assert_influence_exact(hk.influence(train, query, method=method).values, train, query, method)


@pytest.mark.parametrize("method", ["grad_dot", "datainf", "exact", "hyperinf"])
def test_fp64_gradients_are_solved_in_fp64(method: str) -> None:
    train, query = (to(grads, torch.float64) for grads in train_and_query())
    w = fitted(MAKERS[method](), train).apply(query)
    for name, grads in train.items():
        lam = lam_of(grads, method, oracle.Damping(datainf=0.1), {})
        expected = oracle.directions(grads, query[name], method, lam)
        condition = 1 + 10 * grads[0].numel()  # rigorous for the relative damping rule
        error = np.abs(oracle.f64(w[name]) - expected).max()
        assert w[name].dtype == torch.float64
        assert error <= K * np.finfo(np.float64).eps * condition * np.abs(expected).max()


def test_gradients_are_left_alone() -> None:
    train, query = train_and_query()
    kept = [{name: g.clone() for name, g in grads.items()} for grads in (train, query)]
    for method in NAMES:
        hk.influence(train, query, method=method)
    for grads, copy in zip((train, query), kept, strict=True):
        assert all(torch.equal(grads[name], copy[name]) for name in grads)


def test_cpu_tensors_run_on_the_plain_backend_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")
    train, query = train_and_query()
    with hk.trace_backends() as log:
        scores = hk.influence(train, query, method="datainf")
    assert {plan.backend for plan in log} == {"torch"}
    assert {entry.backend for entry in scores.report} == {"torch"}


# --- solvers fed in batches ---------------------------------------------------------------------

BATCHINGS = [
    pytest.param([12], id="one batch"),
    pytest.param([1] * 12, id="one by one"),
    pytest.param([5, 1, 4, 2], id="unequal batches"),
    pytest.param([3, 0, 9], id="with an empty batch"),
    pytest.param([11, 1], id="last batch of one"),
]


@pytest.mark.parametrize("batches", BATCHINGS)
@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        pytest.param(MAKERS["grad_dot"], "grad_dot", {}, id="grad_dot"),
        pytest.param(MAKERS["datainf"], "datainf", {}, id="datainf"),
        pytest.param(MAKERS["exact"], "exact", {}, id="exact"),
        pytest.param(MAKERS["hyperinf"], "hyperinf", {}, id="hyperinf"),
        pytest.param(
            lambda: hk.HyperINF(side="rows"), "hyperinf", {"side": "rows"}, id="hyperinf rows"
        ),
        pytest.param(
            lambda: hk.HyperINF(mode="paper", iterations=20),
            "hyperinf_paper",
            {"steps": 20, "extra": EXTRA},
            id="hyperinf paper",
        ),
        pytest.param(
            lambda: hk.LiSSA(iterations=9, scale=1e-3, tol=1e-30),
            "lissa",
            {"steps": 9, "scale": 1e-3},
            id="lissa",
        ),
    ],
)
def test_directions_do_not_depend_on_how_samples_were_batched(
    make: Callable[[], Any], method: str, options: dict[str, Any], batches: list[int]
) -> None:
    train, query = train_and_query()
    solver = make()
    for start, size in zip(np.cumsum([0, *batches]), batches, strict=False):
        solver.update({name: g[start : start + size] for name, g in train.items()})
    solver.fit()
    assert_directions_exact(solver.apply(query), train, query, method, **options)
    assert {entry.n for entry in solver.report()} == {12}


@pytest.mark.parametrize("method", NAMES)
def test_batches_may_be_overwritten_after_update(method: str) -> None:
    """Loaders reuse their buffers; a solver that keeps a view would see other gradients."""
    train, query = train_and_query()
    expected = fitted(MAKERS[method](), train).apply(query)
    solver = MAKERS[method]()
    buffer = {name: torch.empty_like(g[:6]) for name, g in train.items()}
    for start in (0, 6):
        for name, g in train.items():
            buffer[name].copy_(g[start : start + 6])
        solver.update(buffer)
    w = solver.fit().apply(query)
    for name, direction in expected.items():
        scale = direction.abs().max().item()
        torch.testing.assert_close(w[name], direction, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("method", NAMES)
def test_solver_applies_to_any_number_of_query_batches(method: str) -> None:
    train, query = train_and_query(m=4)
    solver = fitted(MAKERS[method](), train)
    together = solver.apply(query)
    for part in (slice(0, 1), slice(1, 4), slice(4, 4)):
        w = solver.apply({name: g[part] for name, g in query.items()})
        for name, direction in together.items():
            assert w[name].shape == direction[part].shape
            tolerance = 1e-2 if method == "lissa" else 1e-4
            scale = direction.abs().max().item()
            torch.testing.assert_close(
                w[name], direction[part], rtol=tolerance, atol=tolerance * scale
            )


@pytest.mark.parametrize("method", NAMES)
def test_solver_object_and_method_name_give_the_same_scores(method: str) -> None:
    train, query = train_and_query()
    by_name = hk.influence(train, query, method=method).values
    by_object = hk.influence(train, query, method=MAKERS[method]()).values
    assert torch.equal(by_name, by_object)


@pytest.mark.parametrize("method", NAMES)
def test_reset_forgets_the_samples(method: str) -> None:
    train, query = train_and_query()
    solver = fitted(MAKERS[method](), gradients(5, seed=7))
    solver.reset()
    solver.update(train)
    w, expected = solver.fit().apply(query), fitted(MAKERS[method](), train).apply(query)
    assert all(torch.equal(w[name], expected[name]) for name in expected)


# --- reports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NAMES)
def test_report_has_one_entry_per_block_in_order(method: str) -> None:
    train, query = train_and_query()
    report = hk.influence(train, query, method=method).report
    assert [entry.block for entry in report] == list(BLOCKS)
    assert [entry.shape for entry in report] == list(BLOCKS.values())
    for entry in report:
        assert isinstance(entry, hk.BlockReport)
        assert entry.n == 12
        assert entry.converged
        assert entry.fallback is None
        assert entry.backend
        assert entry.precision


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("exact", "flat"),
        ("lissa", "flat"),
        ("hyperinf", "cols"),
        ("hyperinf rows", "rows"),
    ],
    ids=lambda value: value,
)
def test_condition_bound_is_rigorous_and_not_absurd(method: str, kind: str) -> None:
    train, query = train_and_query()
    name, _, side = method.partition(" ")
    options = {"side": side} if side else {}
    for entry in hk.influence(train, query, method=name, **options).report:
        curvature = oracle.curvature(train[entry.block], kind)
        condition = np.linalg.cond(oracle.damped(curvature, entry.damping))
        by_trace = 1 + np.trace(curvature) / entry.damping
        assert condition * (1 - 1e-5) <= entry.condition_bound <= by_trace * (1 + 1e-5)


@pytest.mark.parametrize("inverse", ["auto", "schulz", "direct"])
@pytest.mark.parametrize("side", ["cols", "rows"])
def test_reported_residual_is_the_one_of_the_delivered_direction(side: str, inverse: str) -> None:
    train, query = train_and_query(m=1)
    solver = hk.HyperINF(side=side, inverse=inverse)
    w = fitted(solver, train).apply(query)
    for entry in solver.report():
        a = oracle.damped(oracle.gfim(train[entry.block], side), entry.damping)
        v, x = oracle.f64(query[entry.block][0]), oracle.f64(w[entry.block][0])
        if side == "rows":
            v, x = v.T, x.T
        recomputed = oracle.solve_residual(a, v, x)
        # A of the solver is an fp32 sum: its own rounding is a residual against the exact A.
        rounding = K * torch.finfo(torch.float32).eps * np.linalg.cond(a)
        assert recomputed <= 4 * entry.residual + rounding
        assert entry.residual <= rounding
        assert entry.converged


def test_exact_method_reports_the_residual_of_its_direction() -> None:
    train, query = train_and_query(m=1)
    solver = fitted(MAKERS["exact"](), train)
    w = solver.apply(query)
    for entry in solver.report():
        a = oracle.damped(oracle.fisher(oracle.flatten(train[entry.block])), entry.damping)
        v, x = oracle.flatten(query[entry.block]), oracle.flatten(w[entry.block])
        rounding = K * torch.finfo(torch.float32).eps * np.linalg.cond(a)
        assert oracle.solve_residual(a, v, x) <= 4 * entry.residual + rounding
        assert entry.residual <= rounding


@pytest.mark.parametrize("iterations", [1, 15, 30], ids="k={}".format)
def test_collapse_angle_is_the_angle_between_query_and_direction(iterations: int) -> None:
    train, query = train_and_query(m=1)
    solver = hk.HyperINF(mode="paper", iterations=iterations)
    w = fitted(solver, train).apply(query)
    for entry in solver.report():
        angle = oracle.angle(query[entry.block], w[entry.block])
        # fp32 directions carry an angle of about the roundoff times the square root of D.
        assert entry.collapse_angle == pytest.approx(angle, rel=1e-3, abs=1e-3)


def test_paper_mode_that_collapsed_is_reported_as_not_converged() -> None:
    train, query = gradients(12, 1, dict.fromkeys(BLOCKS, 1e-3)), gradients(3, 2)
    method = hk.HyperINF(mode="paper", iterations=15, extra_damping=0.0)
    for entry in hk.influence(train, query, method=method).report:
        assert not entry.converged
        assert entry.residual > 0.9
        assert entry.collapse_angle < 1


def test_gradient_dot_reports_that_nothing_was_solved() -> None:
    train, query = train_and_query()
    for entry in hk.influence(train, query, method="grad_dot").report:
        assert entry.condition_bound is None
        assert entry.products == 0
        assert entry.iterations == 0


# --- refusals -----------------------------------------------------------------------------------


def without(grads: Grads, name: str) -> Grads:
    return {block: g for block, g in grads.items() if block != name}


@pytest.mark.parametrize("method", NAMES)
def test_zero_training_rows_are_refused(method: str) -> None:
    train, query = train_and_query(n=0)
    with pytest.raises(ValueError, match="train"):
        hk.influence(train, query, method=method)


@pytest.mark.parametrize("method", NAMES)
def test_fit_without_samples_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="training"):
        MAKERS[method]().fit()


@pytest.mark.parametrize("where", ["train", "query"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("method", NAMES)
def test_gradients_that_are_not_finite_are_refused_by_block_and_sample(
    method: str, value: float, where: str
) -> None:
    train, query = train_and_query(m=9)
    (train if where == "train" else query)["head"][7, 1, 2] = value
    with pytest.raises(ValueError, match=r"(?=.*\bhead\b)(?=.*\b7\b)"):
        hk.influence(train, query, method=method)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param(lambda t, q: (t, without(q, "head")), "head", id="query lacks a block"),
        pytest.param(lambda t, q: (without(t, "head"), q), "head", id="train lacks a block"),
        pytest.param(
            lambda t, q: (t, q | {"head": q["head"].mT}), "head", id="query block transposed"
        ),
        pytest.param(
            lambda t, q: (t | {"head": t["head"][:5]}, q), "head", id="train counts differ"
        ),
        pytest.param(
            lambda t, q: (t, q | {"head": q["head"][:2]}), "head", id="query counts differ"
        ),
        pytest.param(lambda t, q: (t | {"head": t["head"][0]}, q), "head", id="train block 2-D"),
        pytest.param(lambda t, q: (t, q | {"head": q["head"][0]}), "head", id="query block 2-D"),
        pytest.param(lambda t, q: (t | {"head": t["head"].long()}, q), "head", id="integers"),
        pytest.param(lambda t, q: (t | {"head": t["head"].tolist()}, q), "head", id="a list"),
        pytest.param(lambda t, q: ({}, {}), "block", id="no blocks"),
    ],
)
@pytest.mark.parametrize("method", ["grad_dot", "exact", "hyperinf"])
def test_gradients_that_do_not_fit_are_refused_by_block(
    method: str, change: Callable[[Grads, Grads], tuple[Any, Any]], named: str
) -> None:
    train, query = change(*train_and_query())
    with pytest.raises((ValueError, TypeError), match=named):
        hk.influence(train, query, method=method)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g: without(g, "head"), id="a block is missing"),
        pytest.param(lambda g: g | {"head": g["head"].mT}, id="a block changed shape"),
        pytest.param(lambda g: g | {"head": g["head"][:1]}, id="counts differ"),
        pytest.param(lambda g: g | {"new head": g["head"]}, id="a block is new"),
    ],
)
@pytest.mark.parametrize("method", NAMES)
def test_later_batch_that_does_not_fit_is_refused_and_not_counted(
    method: str, change: Callable[[Grads], Grads]
) -> None:
    train, query = train_and_query()
    solver = MAKERS[method]()
    solver.update(train)
    with pytest.raises(ValueError, match="head"):
        solver.update(change(gradients(4, seed=3)))
    w, expected = solver.fit().apply(query), fitted(MAKERS[method](), train).apply(query)
    assert all(torch.equal(w[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", ["datainf", "exact", "lissa", "hyperinf"])
def test_block_without_any_gradient_has_no_relative_damping_and_is_named(method: str) -> None:
    train, query = train_and_query()
    train["head"].zero_()
    with pytest.raises(ValueError, match="head"):
        hk.influence(train, query, method=method)
    damped = hk.influence(train, query, method=method, damping=hk.AbsoluteDamping(0.1))
    assert torch.isfinite(damped.values).all()


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: hk.DataInfDamping(-0.1), id="negative coefficient"),
        pytest.param(lambda: hk.AbsoluteDamping(math.nan), id="nan"),
        pytest.param(lambda: hk.AbsoluteDamping(0.0), id="zero"),
        pytest.param(lambda: hk.TraceDamping(math.inf), id="inf"),
    ],
)
@pytest.mark.parametrize("method", ["datainf", "exact", "lissa"])
def test_damping_must_be_positive_and_finite(method: str, make: Callable[[], Any]) -> None:
    train, query = train_and_query()
    with pytest.raises(ValueError, match=r"(?i)damping"):
        hk.influence(train, query, method=method, damping=make())


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        pytest.param("hyperimf", {}, "hyperimf", id="unknown method"),
        pytest.param("hyperinf", {"side": "left"}, "side", id="unknown side"),
        pytest.param("hyperinf", {"mode": "quick"}, "mode", id="unknown mode"),
        pytest.param("hyperinf", {"inverse": "magic"}, "inverse", id="unknown inverse"),
        pytest.param(
            "hyperinf", {"mode": "paper", "iterations": -1}, "iterations", id="negative steps"
        ),
        pytest.param("hyperinf", {"mode": "paper", "start": 0.0}, "start", id="zero start"),
        pytest.param("lissa", {"iterations": 0}, "iterations", id="no LiSSA steps"),
        pytest.param("lissa", {"scale": -1.0}, "scale", id="negative LiSSA step"),
        pytest.param("lissa", {"scale": math.nan}, "scale", id="a LiSSA step that is no number"),
        pytest.param("lissa", {"tol": 0}, "tol", id="zero LiSSA tol"),
        pytest.param("cg", {"tol": None}, "tol must be a number", id="no CG tol"),
        pytest.param("cg", {"tol": -1.0}, "tol", id="negative CG tol"),
        pytest.param("cg", {"iterations": 2.5}, "iterations", id="half a CG step"),
        pytest.param("hyperinf", {"tol": math.nan}, "tol", id="tol that is no number"),
        pytest.param("hyperinf", {"tol": 0}, "tol", id="zero tol"),
        pytest.param("hyperinf", {"tol": -1}, "tol", id="negative tol"),
        pytest.param("hyperinf", {"tol": math.inf}, "tol", id="endless tol"),
        pytest.param("hyperinf", {"tol": "1e-3"}, "tol", id="tol in words"),
        pytest.param("hyperinf", {"extra_damping": -1e-3}, "extra_damping", id="less damping"),
        pytest.param("datainf", {"iterations": 3}, "iterations", id="option of another method"),
    ],
)
def test_bad_methods_and_options_are_refused_by_name(
    method: str, options: dict[str, Any], named: str
) -> None:
    train, query = train_and_query()
    with pytest.raises((ValueError, TypeError), match=named):
        hk.influence(train, query, method=method, **options)


@pytest.mark.parametrize("make", [hk.HyperINF, hk.DataInf, hk.Exact, hk.CG, hk.LiSSA])
@pytest.mark.parametrize(
    ("shape", "n", "queries", "message"),
    [
        ((2, 8), -5, 1, "n must be at least 1, got -5"),
        ((2, 8), 0, 1, "n must be at least 1, got 0"),
        ((2, 8), 9, 0, "queries must be at least 1, got 0"),
        ((2, 8), 2.5, 1, "n must be a whole number, got 2.5"),
        ((2, 0), 9, 1, "block b: d must be at least 1, got 0"),
    ],
)
def test_a_plan_of_nothing_is_refused(
    make: Any, shape: tuple[int, int], n: Any, queries: int, message: str
) -> None:
    with pytest.raises(hk.InputError, match=message):
        make().plan({"b": shape}, n, queries)


@pytest.mark.parametrize("make", [hk.Exact, hk.LiSSA, hk.EKFAC, hk.GramEngine])
def test_a_folder_that_cannot_be_used_is_named(make: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path / "file", "is there, but is no folder"),
        (tmp_path / "file" / "below", "cannot be made: Not a directory"),
        (Path("/proc/absent"), "cannot be made: No such file or directory"),
    ):
        with pytest.raises(hk.InputError, match=f"folder={path} {why}"):
            make(folder=path)
    gone = tmp_path / "gone"
    solver = hk.Exact(folder=gone)
    gone.rmdir()
    solver.update(train_and_query()[0])
    with pytest.raises(hk.InputError, match=f"no file can be made in {gone}: No such file"):
        solver.fit().apply(train_and_query()[1])


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"(?=.*datainf)(?=.*exact)(?=.*hyperinf)(?=.*lissa)"):
        hk.influence(*train_and_query(), method="influence")

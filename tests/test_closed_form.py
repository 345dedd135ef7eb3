"""DataInf's certificate: what it says of the worst query is true for every kind of rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.attribution.influence import fitted_scores, sum_blocks
from hyperinf_kernels.integrations.datainf import IFEngine
from hyperinf_kernels.ops import native
from hyperinf_kernels.solvers.closed_form import Bounded, certified, probed, probes
from tests import models, oracle

EPS32 = float(np.finfo(np.float32).eps)


def kinds(n: int, D: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n + D)
    noise = torch.randn(n, D, generator=generator)
    first = noise[:1].clone()
    outlier = noise.clone()
    outlier[0] *= 1e4
    sparse = noise * (torch.rand(n, D, generator=generator) < 0.05)
    sparse[:, 0] = 1.0
    return {
        "gauss": noise,
        "decaying": noise * torch.logspace(0, -6, D),
        "near copies": first + 1e-3 * noise,
        "sparse": sparse,
        "columns of 8 orders": noise * torch.logspace(-4, 4, D)[torch.randperm(D)],
        "an outlier": outlier,
        "near 1": 1 + 1e-2 * noise,
        "rank one": torch.rand(n, 1, generator=generator) * first + 1e-6 * noise,
    }


def asked(P: Tensor) -> Tensor:
    """A training row, a near copy of one, the mean, and three of no relation."""
    generator = torch.Generator().manual_seed(1)
    other = torch.randn(3, P.shape[1], generator=generator) * P.norm(dim=1).mean()
    return torch.cat([P[:1], P[-1:] * 1.001, P.mean(0, keepdim=True), other / P.shape[1] ** 0.5])


def errors(found: Tensor, truth: oracle.Array) -> oracle.Array:
    gap = np.linalg.norm(oracle.f64(found) - truth, axis=1)
    error: oracle.Array = gap / np.linalg.norm(truth, axis=1)
    return error


@pytest.mark.parametrize("check", ["bound", "full", "off"])
@pytest.mark.parametrize("n", [1, 2, 7, 60, 300, 1500])
@pytest.mark.parametrize("kind", list(kinds(2, 4)))
def test_no_certificate_is_untrue(kind: str, n: int, check: str) -> None:
    P = kinds(n, 1200)[kind]
    V = asked(P)
    train, query = {"b": P.view(n, 4, 300)}, {"b": V.view(len(V), 4, 300)}
    for damping in (0.1, 1e-4):
        solver = hk.DataInf(hk.DataInfDamping(damping), check=check)
        solver.update(train, copy=False)
        S = solver.scores(query)["b"]
        (entry,) = solver.report()
        truth = oracle.datainf(oracle.f64(V), oracle.f64(P), entry.damping)
        worst = errors(S, -truth @ oracle.f64(P).T).max()
        W = solver.fit().apply(query)["b"].flatten(1)
        (applied,) = solver.report()
        worst_W = errors(W, truth).max()
        if check == "off":
            assert (entry.converged, entry.score_error, entry.residual) == (None, None, None)
            assert applied.converged is None
            continue
        # four probes show less than a tenth of an error twice in 10,000
        slack = {"bound": 1.0, "measured": 1.01, "estimate": 10.0}
        if entry.score_error_by is not None:  # few rows have their own form
            assert worst <= slack[entry.score_error_by] * entry.score_error + 2 * EPS32
        assert worst_W <= slack[applied.residual_by] * applied.residual + 2 * EPS32
        for claim, error in ((entry.converged, worst), (applied.converged, worst_W)):
            assert claim
            assert error <= 1e-3


@pytest.mark.parametrize("kind", ["gauss", "decaying", "sparse", "columns of 8 orders"])
def test_usual_rows_are_certified_by_the_bound_alone(kind: str) -> None:
    P = kinds(400, 4096)[kind]
    V = asked(P)[3:]
    scores = hk.influence({"b": P.view(400, 4, -1)}, {"b": V.view(3, 4, -1)}, "datainf")
    (entry,) = scores.report
    assert entry.converged
    assert entry.precision == "fp32"
    if entry.backend == "cpu":
        assert entry.score_error_by == "bound"


def test_checks_agree_where_nothing_is_redone() -> None:
    P, V = torch.randn(200, 4, 500), torch.randn(3, 4, 500)
    off, bound, full = (
        hk.influence({"b": P}, {"b": V}, "datainf", check=check)
        for check in ("off", "bound", "full")
    )
    assert torch.equal(off.values, bound.values)
    assert torch.equal(off.values, full.values)
    assert off.certificate()["certified"] is None
    assert full.report[0].score_error_by == "measured"
    if bound.report[0].score_error_by == "bound":
        assert full.report[0].score_error <= bound.report[0].score_error


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1.0, 1e12, 1e17])
def test_any_scale_keeps_its_digits(scale: float) -> None:
    P, V = scale * torch.randn(40, 2, 300), scale * torch.randn(2, 2, 300)
    scores = hk.influence({"b": P}, {"b": V}, "datainf")
    (entry,) = scores.report
    wanted = oracle.datainf(oracle.flatten(V), oracle.flatten(P), entry.damping)
    assert errors(scores.values, -wanted @ oracle.flatten(P).T).max() <= 1e-5
    assert entry.converged


def test_zero_queries_and_queries_that_no_row_sees() -> None:
    P = torch.randn(50, 1, 400)
    P[:, :, 300:] = 0
    V = torch.zeros(2, 1, 400)
    V[1, :, 300:] = 1.0
    scores = hk.influence({"b": P}, {"b": V}, "datainf")
    assert not scores.values.any()
    assert scores.certificate()["certified"]


def test_a_row_over_its_bound_is_probed_and_then_done_again() -> None:
    """One wrong row among right ones: probes find it, fp64 mends it, the others stay."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(50, 50, generator=generator, dtype=torch.float64)
    A, V = A + A.mT, torch.randn(20, 50, generator=generator)

    def formula(X: Tensor) -> Bounded:
        rows, bound = X @ A.to(X.dtype), torch.full((len(X),), 1e-6, dtype=torch.float64)
        if X.dtype == torch.float32:
            rows[3] *= 1.5
            bound[[3, 5]] = 1.0  # one that is wrong, one of which too little is known
        return Bounded(rows, bound)

    def estimate(X: Tensor, rows: Tensor) -> Tensor:
        Z = probes(50, X.device)
        return probed(rows, Z, X, Z @ A)

    for check, by in (("bound", "bound"), ("full", "measured")):
        rows, known = certified(formula, estimate, V, check)
        truth = oracle.f64(V) @ A.numpy()
        assert errors(rows, truth).max() <= 1e-6
        assert known.converged
        assert known.by == by
    assert known.error <= 1e-6
    rows, known = certified(formula, estimate, V, "off")
    assert errors(rows, truth).max() > 0.4
    assert known.converged is None


def samples(grads: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    return {i: {name: g[i] for name, g in grads.items()} for i in range(len(grads["a"]))}


TRAIN = {name: torch.randn(90, 4, 64) for name in ("a", "b")}
QUERY = {name: torch.randn(3, 4, 64) for name in TRAIN}


def applied() -> None:
    solver = hk.DataInf()
    solver.update(TRAIN)
    solver.apply(QUERY)


def released(mode: Any) -> None:
    host = IFEngine(mode=mode)
    host.preprocess_gradients(samples(TRAIN), samples(QUERY))
    host.compute_hvp_proposed()
    host.compute_IF()


def attributed() -> None:
    model, batch = models.llama(), models.text_batch("right", (5, 7, 4, 9, 6, 8, 5, 7, 9))
    hk.Attributor(model, method="datainf").fit([batch]).score([models.text_batch("right", (5, 7))])


KEPT = {"row_dots", "span_dots"}  # scores of the rows that are kept
DOORS: dict[str, tuple[Callable[[], object], set[str]]] = {
    "influence": (lambda: hk.influence(TRAIN, QUERY, "datainf"), KEPT),
    "Attributor": (attributed, KEPT | {"per_sample_grad"}),
    "apply": (applied, {"row_dots", "span"}),
    "IFEngine": (lambda: released("converged"), {"row_dots", "span"}),
    "IFEngine as released": (lambda: released("parity"), {"row_dots", "span"}),
}


@pytest.mark.parametrize("door", list(DOORS))
def test_every_door_takes_the_path_that_reads_least(door: str) -> None:
    run, allowed = DOORS[door]
    with hk.trace_backends() as log:
        run()
    ran = [plan.kernel.rpartition(".")[2] for plan in log]
    needed = allowed - {"per_sample_grad"}
    assert needed <= set(ran) <= allowed
    if native.missing() is None:
        assert {plan.backend for plan in log if plan.kernel.endswith(tuple(needed))} == {"cpu"}
    if door == "influence":
        # rows, with their dot products, and queries where they are checked; then one more reading
        assert ran == ["row_dots"] * 4 + ["span_dots"] * 2


def taken(method: str, parts: tuple[int, ...], early: bool, queries: dict[str, Tensor]) -> Tensor:
    solver = hk.DataInf() if method == "datainf" else hk.GradDot()
    solver.reset()
    solver.foresee(queries if early else None)
    cut = {name: grads.split(parts) for name, grads in TRAIN.items()}
    for i in range(len(parts)):
        solver.update({name: batches[i] for name, batches in cut.items()})
    found = fitted_scores(solver.fit(), queries, cut, per_block=False)
    return sum_blocks(found)


@pytest.mark.parametrize("parts", [(90,), (13, 1, 76)])
@pytest.mark.parametrize("method", ["datainf", "grad_dot"])
def test_dots_taken_while_rows_arrive_are_those_taken_later(
    method: str, parts: tuple[int, ...]
) -> None:
    for queries in (QUERY, {name: V.bfloat16() for name, V in QUERY.items()}):
        early = taken(method, parts, True, queries)
        assert torch.equal(early, taken(method, parts, False, queries))


def test_dots_of_rows_that_were_refused_are_not_used() -> None:
    """After an update that failed the rows are not those that were read."""
    solver = hk.DataInf()
    solver.foresee(QUERY)
    bad = {name: grads.clone() for name, grads in TRAIN.items()}
    bad["b"][7] = float("nan")
    with pytest.raises(hk.InputError, match=r"block b.*row 7"):
        solver.update(bad)
    other = {name: grads.flip(0) for name, grads in TRAIN.items()}
    solver.update(other)
    want = hk.influence(other, QUERY, "datainf").values
    assert torch.equal(sum_blocks(fitted_scores(solver.fit(), QUERY, {}, False)), want)


def test_other_queries_than_foreseen_are_scored_as_themselves() -> None:
    solver, other = hk.DataInf(), {name: V.flip(0).contiguous() for name, V in QUERY.items()}
    solver.foresee(QUERY)
    solver.update(TRAIN)
    got = sum_blocks(solver.fit().scores(other))
    assert torch.equal(got, hk.influence(TRAIN, other, "datainf").values)


PEAK = """
import resource, sys, torch, hyperinf_kernels as hk
torch.set_num_threads(2)
n, r, d, m, method = 2000, 8, 1024, int(sys.argv[1]), sys.argv[2]
small = {"b": torch.randn(40, r, d)}
hk.influence(small, {"b": torch.randn(m, r, d)}, method)
train, query = {"b": torch.randn(n, r, d)}, {"b": torch.randn(m, r, d)}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hk.influence(train, query, method)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(native.missing() is not None, reason="the memory of the compiled kernels")
@pytest.mark.parametrize("m", [1, 32])
@pytest.mark.parametrize("method", ["datainf", "grad_dot"])
def test_no_copy_of_the_rows_is_made(method: str, m: int) -> None:
    """Beyond the caller's own tensors: queries packed once, m x n numbers, and cache blocks."""
    words = [sys.executable, "-c", PEAK, str(m), method]
    rows, queries, numbers = 2000 * 8192 * 4, m * 8192 * 4, 8 * m * 2000
    peak = int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
    assert peak <= rows / 8 + 4 * queries + 12 * numbers

"""Gram space: kept rows scored by n x n algebra, merged, re-damped, rooted and kept in files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.solvers import datainf, make_solver
from hyperinf_kernels.solvers.block_gram import BlockGram
from hyperinf_kernels.solvers.flat import FlatSolver
from hyperinf_kernels.solvers.rows import GradientRows, squares
from hyperinf_kernels.solvers.scratch import Scratch
from tests import oracle
from tests.test_solvers import peer_directions

K = 8.0
FLOOR = 16 * torch.finfo(torch.float32).eps
EPS32 = torch.finfo(torch.float32).eps
Grads = dict[str, Tensor]
# n = 60: Gram space for the first two, the D x D side for the third
BLOCKS = {"q.lora_A": (4, 90), "q.lora_B": (4, 31), "head": (2, 11)}
ITERATIVE = {
    "cg": {"tol": 1e-7},
    "lissa": {"tol": 1e-5, "iterations": 100_000},
}


def gradients(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Grads:
    """Rows that share a direction, so that K is far from a multiple of I."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.Generator().manual_seed(99)
    out = {}
    for i, (name, shape) in enumerate(BLOCKS.items()):
        shared = torch.randn(1, *shape, generator=common, dtype=torch.float64)
        weights = torch.rand(n, 1, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        out[name] = (10.0 ** (1 - i) * (3 * shared * weights + noise)).to(dtype)
    return out


def parts(grads: Grads, sizes: tuple[int, ...]) -> list[Grads]:
    split = {name: g.split(sizes) for name, g in grads.items()}
    return [{name: pieces[i] for name, pieces in split.items()} for i in range(len(sizes))]


def fitted(solver: Any, grads: Grads, sizes: tuple[int, ...] = (7, 1, 40, 12)) -> Any:
    for batch in parts(grads, sizes):
        solver.update(batch)
    return solver.fit()


def truth(method: str, train: Grads, query: Grads, damping: oracle.Damping) -> np.ndarray:
    known = "exact" if method in ITERATIVE else method
    return oracle.influence(train, query, known, damping)


def naive(method: str, train: Grads, query: Grads, damping: oracle.Damping) -> np.ndarray:
    """The dense formula in fp32 torch."""
    known = "exact" if method in ITERATIVE else method
    total = 0.0
    for name, grads in train.items():
        W = peer_directions(grads, query[name], known, damping.of(grads, "flat"))
        total = total - (W.flatten(1) @ grads.flatten(1).T).double().numpy()
    return np.asarray(total)


@pytest.mark.parametrize("m", [1, 5, 33], ids="m={}".format)
@pytest.mark.parametrize("method", ["datainf", "exact", "cg", "lissa"])
def test_scores_of_kept_rows_match_the_oracle(method: str, m: int) -> None:
    train, query, rule = gradients(60, 1), gradients(m, 2), oracle.Damping(datainf=0.1)
    scores = hk.influence(train, query, method, **ITERATIVE.get(method, {}))
    want = truth(method, train, query, rule)
    assert all(entry.converged for entry in scores.report)
    if method in ITERATIVE:
        worst = max(entry.residual * entry.condition_bound for entry in scores.report)
        assert np.abs(scores.values.double().numpy() - want).max() <= worst * np.abs(want).max()
        assert max(entry.residual for entry in scores.report) <= 1e-5
    else:
        peer = naive(method, train, query, rule)
        oracle.assert_as_exact_as(scores.values, want, peer, k=K, floor=FLOOR)


def worst_row(E: np.ndarray, V: np.ndarray) -> float:
    return float(np.max(np.linalg.norm(E, axis=1) / np.linalg.norm(V, axis=1)))


@pytest.mark.parametrize("m", [3, 40], ids="m={}".format)
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("method", ["datainf", "exact", "cg", "lissa"])
def test_the_certificate_of_scores_is_true(method: str, damping: float, m: int) -> None:
    """The worst query's error (a closed form's, the exact method's) or residual against fp64."""
    train = {"b": gradients(60, 1)["q.lora_A"]}
    query = {"b": gradients(m, 2)["q.lora_A"]}
    options = {"iterations": 40} if method == "lissa" else {}
    scores = hk.influence(train, query, method, hk.DataInfDamping(damping), **options)
    (entry,) = scores.report
    P, V, S = (oracle.flatten(train["b"]), oracle.flatten(query["b"]), oracle.f64(scores.values))
    L = V @ P.T
    if method in ("datainf", "exact"):
        wanted = oracle.influence(train, query, method, oracle.Damping(datainf=damping))
        true = worst_row(S - wanted, wanted)
        said = entry.residual if method == "datainf" else entry.score_error
        assert true <= 4 * said + EPS32
        assert said <= 1e-4
    if method != "datainf":
        # what 4 probes show; certified is what ten times as much leaves within the tolerance
        true = worst_row(L + S @ (P @ P.T) / 60 + entry.damping * S, L)
        assert true / 4 <= entry.residual + EPS32 <= 3 * true + 2 * EPS32
    assert not entry.converged or true <= 2e-3
    assert method == "lissa" or entry.converged


@pytest.mark.parametrize("damping", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize("m", [2, 20], ids="m={}".format)
def test_datainf_of_nearly_equal_rows_is_certified_honestly(m: int, damping: float) -> None:
    """Their correction removes almost all of a query, which is what cancels in fp32."""
    common = torch.randn(1, 4, 90)
    train = {"b": common * (1 + 0.1 * torch.rand(60, 1, 1)) + 1e-3 * torch.randn(60, 4, 90)}
    query = {"b": common + 1e-3 * torch.randn(m, 4, 90)}
    scores = hk.influence(train, query, "datainf", hk.DataInfDamping(damping))
    (entry,) = scores.report
    P, V = oracle.flatten(train["b"]), oracle.flatten(query["b"])
    want = -oracle.datainf(V, P, entry.damping) @ P.T
    true = np.linalg.norm(oracle.f64(scores.values) - want) / np.linalg.norm(want)
    assert true <= max(4 * entry.residual, 1e-6)
    assert entry.converged
    assert true <= 1e-3


def near(n: int, noise: float, m: int = 4) -> tuple[Grads, Grads]:
    """Gradients around one direction, and queries among them: what they share is nearly removed."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 8, 640, generator=generator)
    size = 1 + 0.3 * torch.randn(n, 1, 1, generator=generator)
    train = size * common + noise * torch.randn(n, 8, 640, generator=generator)
    query = train[:m] + noise * torch.randn(m, 8, 640, generator=generator)
    return {"b": train}, {"b": query}


def closed_form(method: str, train: Tensor, query: Tensor) -> np.ndarray:
    """Scores at the default damping in fp64, by n x n algebra where the oracle would be slow."""
    P, V = oracle.flatten(train), oracle.flatten(query)
    n, lam, K, L = len(P), 0.1 * float(np.mean(P**2)), P @ P.T, V @ P.T
    if method == "datainf":
        return np.asarray((L / (n * (lam + K.diagonal())) @ K - L) / lam)
    return np.asarray(-n * np.linalg.solve(K + n * lam * np.eye(n), L.T).T)


@pytest.mark.parametrize("noise", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("method", ["exact", "cg", "datainf"])
def test_scores_of_queries_among_nearly_equal_rows(method: str, noise: float) -> None:
    train, query = near(60, noise)
    wanted = closed_form(method, train["b"], query["b"])
    scores = hk.influence(train, query, method, **ITERATIVE.get(method, {}))
    limit = 1e-3 if method == "cg" else 2e-5
    assert worst_row(oracle.f64(scores.values) - wanted, wanted) <= limit
    assert scores.certificate()["certified"]
    if method == "exact":
        solver = fitted(hk.Exact(), train, (60,))
        own = closed_form(method, train["b"], train["b"]).diagonal()
        assert np.abs(oracle.f64(solver.own_influence()) / own - 1).max() <= limit


@pytest.mark.parametrize("method", ["lissa", "cg"])
@pytest.mark.parametrize("n", [200, 40], ids="n={}".format)
def test_a_small_query_is_judged_beside_a_large_one(method: str, n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(n, 1, 64, generator=generator) * torch.logspace(0, -1, 64)
    P = train.flatten(1).double()
    mu, U = torch.linalg.eigh(P.mT @ P / n)
    large = U[:, (mu - mu[-1] / 2).abs().argmin()] * 1e4
    query = torch.stack([large, U[:, 20]]).float().view(2, 1, 64)
    capped = {"iterations": 12} if method == "cg" else {}
    scores = hk.influence({"b": train}, {"b": query}, method, 1e-4, **capped)
    (entry,) = scores.report
    A = (P.mT @ P / n + 1e-4 * torch.eye(64, dtype=P.dtype)).numpy()
    S, L = oracle.f64(scores.values), oracle.f64(query.flatten(1)) @ P.mT.numpy()
    gap = L + S @ np.linalg.pinv(P.numpy().T) @ A @ P.numpy().T
    assert not entry.converged or worst_row(gap, L) <= 2e-3
    assert (entry.fallback is None) == entry.converged


@pytest.mark.parametrize("m", [1, 20])
def test_datainf_of_more_rows_than_numbers_is_judged_by_its_scores(m: int) -> None:
    generator = torch.Generator().manual_seed(1)
    few = torch.randn(4, 2, 16, generator=generator)
    train = few[torch.arange(40) % 4] * (1 + 0.01 * torch.randn(40, 1, 1, generator=generator))
    query = few[torch.arange(m) % 4] + 1e-3 * torch.randn(m, 2, 16, generator=generator)
    scores = hk.influence({"b": train}, {"b": query}, "datainf", hk.DataInfDamping(1e-4))
    (entry,) = scores.report
    wanted = truth("datainf", {"b": train}, {"b": query}, oracle.Damping(datainf=1e-4))
    true = worst_row(oracle.f64(scores.values) - wanted, wanted)
    assert true <= 4 * entry.residual + EPS32
    assert true <= 1e-3


@pytest.mark.parametrize("method", ["hyperinf", "datainf", "exact", "cg", "lissa", "ekfac"])
def test_empty_batches_and_no_queries(method: str) -> None:
    train, query = torch.randn(9, 2, 400), torch.randn(3, 2, 400)
    solver = make_solver(method)
    for part in train.split((4, 0, 5)):
        solver.update({"b": part})
    assert solver.fit().n == 9
    assert solver.apply({"b": query[:0]})["b"].shape == (0, 2, 400)
    assert hk.influence({"b": train}, {"b": query[:0]}, method).values.shape == (0, 9)
    assert solver.self_influence({"b": query[:0]}).shape == (0,)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
@pytest.mark.parametrize("method", ["datainf", "exact", "cg", "lissa"])
def test_scores_at_scales_whose_squares_leave_fp32(method: str, scale: float) -> None:
    train, query = gradients(30, 1), gradients(3, 2)
    options = ITERATIVE.get(method, {})
    wanted = hk.influence(train, query, method, **options).values.double()
    large = {name: g * scale for name, g in train.items()}
    scores = hk.influence(large, query, method, **options)
    got = scores.values.double() * scale
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-4
    assert scores.certificate()["certified"]


def test_own_influence_is_the_diagonal_of_the_scores() -> None:
    train = gradients(60, 1)
    for method in (hk.DataInf, hk.Exact, hk.CG, hk.LiSSA):
        solver = fitted(method(), train)
        want = sum(solver.scores(train).values()).diagonal()
        own = solver.own_influence()
        scale = float(want.abs().max())
        assert own.shape == (60,)
        torch.testing.assert_close(own, want, rtol=1e-3, atol=1e-5 * scale)
        some = {name: g[5:9] for name, g in train.items()}
        torch.testing.assert_close(
            solver.self_influence(some), want[5:9], rtol=1e-2, atol=1e-3 * scale
        )


MERGING: dict[str, Any] = {
    "datainf": hk.DataInf, "exact": hk.Exact, "cg": hk.CG, "lissa": hk.LiSSA,
    "grad_dot": hk.GradDot, "hyperinf": hk.HyperINF,
    "hyperinf rows": lambda: hk.HyperINF(side="rows"),
}  # fmt: skip


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING.keys())
def test_three_shards_merge_to_one_pass(make: Any) -> None:
    train, query = gradients(60, 1), gradients(5, 2)
    whole = fitted(make(), train)
    shards = [make() for _ in range(3)]
    for solver, batch in zip(shards, parts(train, (9, 1, 50)), strict=True):
        solver.update(batch)
    empty = make()
    merged = empty.merge(shards[0]).merge(shards[1]).merge(shards[2]).fit()
    assert merged.n == 60
    assert shards[1].n == 1
    want, got = whole.apply(query), merged.apply(query)
    for name, W in want.items():
        limit = 1e-5 * float(W.abs().max())
        torch.testing.assert_close(got[name], W, rtol=1e-4, atol=limit)
    assert [r.damping for r in merged.report()] == pytest.approx(
        [r.damping for r in whole.report()], rel=1e-6
    )


def test_merge_refuses_what_does_not_fit() -> None:
    train = gradients(6, 1)
    solver = fitted(hk.Exact(), train, (6,))
    with pytest.raises(hk.InputError, match="not with DataInf"):
        solver.merge(fitted(hk.DataInf(), train, (6,)))
    with pytest.raises(hk.InputError, match="not with itself"):
        solver.merge(solver)
    with pytest.raises(hk.InputError, match="different damping"):
        solver.merge(fitted(hk.Exact(0.5), train, (6,)))
    with pytest.raises(hk.InputError, match="different options"):
        fitted(hk.CG(), train, (6,)).merge(fitted(hk.CG(tol=1e-3), train, (6,)))
    other = {**train, "head": train["head"][:, :, :3]}
    with pytest.raises(hk.InputError, match=r"different blocks: head \(2, "):
        solver.merge(fitted(hk.Exact(), other, (6,)))
    assert solver.n == 6


@pytest.mark.parametrize("make", MERGING.values(), ids=MERGING.keys())
def test_redamping_is_fitting_anew(make: Any) -> None:
    train, query = gradients(60, 1), gradients(5, 2)
    solver = fitted(make(), train)
    solver.apply(query)
    for damping in (1e-2, hk.DataInfDamping(3), hk.TraceDamping(0.3) + hk.AbsoluteDamping(0.1)):
        got = solver.redamp(damping).apply(query)
        fresh = make()
        fresh.damping = solver.damping
        want = fitted(fresh, train).apply(query)
        for name, W in want.items():
            torch.testing.assert_close(got[name], W, rtol=1e-4, atol=1e-5 * float(W.abs().max()))
        assert [r.damping for r in solver.report()] == [r.damping for r in fresh.report()]


def test_a_refused_damping_leaves_the_old_one() -> None:
    train, query = gradients(60, 1), gradients(5, 2)
    solver = fitted(hk.Exact(0.5), train)
    want = solver.scores(query)
    with pytest.raises(hk.InputError, match="needs a positive one"):
        solver.redamp(0.0)
    got = solver.scores(query)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "make", [hk.GradDot, hk.DataInf, hk.Exact, hk.KFAC, hk.EKFAC], ids=lambda c: c.method
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_halves_multiply_to_influence(make: Any, dtype: torch.dtype) -> None:
    train, query = gradients(60, 1, dtype), gradients(5, 2, dtype)
    solver = fitted(make(), train)
    x, y, W = solver.half(query), solver.half(train), solver.apply(query)
    for name in train:
        want = W[name].flatten(1).double() @ train[name].flatten(1).mT.double()
        got = x[name].double() @ y[name].double().mT
        limit = 1e-10 if dtype == torch.float64 else 1e-4
        assert float((got - want).abs().max()) <= limit * float(want.abs().max())


def test_a_method_without_a_root_names_those_that_have_one() -> None:
    solver = fitted(hk.CG(), gradients(60, 1))
    with pytest.raises(hk.InputError, match=r"cg has no half\(\).*datainf.*ekfac.*exact.*kfac"):
        solver.half(gradients(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [hk.DataInf, hk.Exact, hk.CG, hk.LiSSA], ids=lambda c: c.method)
def test_rows_in_files_are_the_rows_in_memory(
    make: Any, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.solvers.rows.CHUNK_ROWS", 16)
    train, query = gradients(60, 1, dtype), gradients(5, 2, dtype)
    solver, mapped = fitted(make(), train), fitted(make(folder=tmp_path), train)
    want, got = solver.scores(query), mapped.scores(query)
    for name in want:
        assert torch.equal(got[name], want[name])
    mappings = Path("/proc/self/maps").read_text().splitlines()
    mine = [line.split()[0].split("-") for line in mappings if str(tmp_path) in line]
    size = sum(g.numel() * g.element_size() for g in train.values())
    assert sum(int(end, 16) - int(begin, 16) for begin, end in mine) >= size
    # the files have no names, so nothing stays behind even after a kill
    assert list(tmp_path.iterdir()) == []
    del mapped
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("method", ["datainf", "exact", "cg", "lissa"])
def test_gram_matrices_in_files_give_the_scores_of_those_in_memory(
    method: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.solvers.rows.CHUNK_ROWS", 11)
    monkeypatch.setattr("hyperinf_kernels.solvers.flat.GRAM_BYTES", 0)
    train, query = gradients(60, 1, dtype), gradients(20, 2, dtype)
    options = {"tol": 1e-3} if method == "lissa" else ITERATIVE.get(method, {})
    make = {"datainf": hk.DataInf, "exact": hk.Exact, "cg": hk.CG, "lissa": hk.LiSSA}[method]
    solver = fitted(make(folder=tmp_path, **options), train)
    held = fitted(make(**options), train)
    limit = 1e-12 if dtype == torch.float64 and method not in ITERATIVE else 1e-5
    for damping in (hk.DataInfDamping(0.1), hk.DataInfDamping(3.0)):
        want, got = held.redamp(damping).scores(query), solver.redamp(damping).scores(query)
        for name, S in got.items():
            assert float((S - want[name]).norm()) <= limit * float(want[name].norm()), name
        own = solver.own_influence()
        torch.testing.assert_close(own, held.own_influence(), rtol=10 * limit, atol=0)
        applied, directions = held.apply(query), solver.apply(query)
        for name, W in directions.items():
            gap = float((W - applied[name]).norm())
            assert gap <= 10 * limit * float(applied[name].norm()), name
    assert {gram.in_files for gram in solver._grams.values()} == {True}


def test_the_engine_keeps_its_gram_matrices_in_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.solvers.rows.CHUNK_ROWS", 16)
    made: list[str] = []
    solve = BlockGram.solve

    def counting(self: BlockGram, X: Tensor, lam: float) -> Tensor:
        made.extend([self.name] * self.in_files)
        return solve(self, X, lam)

    monkeypatch.setattr(BlockGram, "solve", counting)
    train, query = gradients(60, 1), gradients(5, 2)
    grid = [hk.DataInfDamping(0.1 * 1.1**i) for i in range(60)]
    found = []
    for limit, folder in ((2**30, None), (0, tmp_path)):
        monkeypatch.setattr("hyperinf_kernels.solvers.flat.GRAM_BYTES", limit)
        engine = hk.GramEngine(folder=folder)
        for batch in parts(train, (7, 1, 40, 12)):
            engine.update(batch)
        found.append(engine.scores(query, ("exact", "datainf"), grid))
        # the third block has n > D
        assert set(made) == (set() if folder is None else {*BLOCKS} - {"head"})
    for held, in_files in zip(*found, strict=True):
        torch.testing.assert_close(in_files.values, held.values, rtol=1e-4, atol=1e-9)


def test_a_factor_in_files_names_a_damping_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.solvers.rows.CHUNK_ROWS", 16)
    rows = GradientRows(90)
    rows.append(torch.ones(60, 90))
    gram = BlockGram("q.lora_A", rows, None, Scratch(tmp_path))
    with pytest.raises(hk.InputError, match=r"block q.lora_A: .* not positive definite"):
        gram.solve(torch.ones(2, 60).double(), -1e-3)


def test_memory_need_not_hold_the_gram_matrix(tmp_path: Path) -> None:
    program = """
import resource, sys, torch
import hyperinf_kernels as hk
from hyperinf_kernels.solvers import flat, rows
flat.GRAM_BYTES, rows.CHUNK_ROWS = 2**20, 128
n, d, folder = 6000, 6100, sys.argv[1] or None
solver, generator = hk.Exact(folder=folder), torch.Generator().manual_seed(0)
query = {"b": torch.randn(3, 1, d, generator=generator)}
solver.update({"b": torch.randn(n, 1, d, generator=generator)})
solver.fit()
used = next(int(line.split()[1]) for line in open("/proc/self/status") if "VmData" in line)
# mapped files do not count; K in fp32 and its factor in fp64 take 216 MB
resource.setrlimit(resource.RLIMIT_DATA, (1024 * used + 150 * 2**20,) * 2)
print(float(solver.scores(query)["b"].norm()), solver.report()[0].converged)
"""

    def run(folder: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    outcome = run(str(tmp_path))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.split()[1] == "True"
    assert run("").returncode != 0


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    solver = hk.Exact(folder=tmp_path)
    solver.update({"b": torch.randn(5, 2, 3)})
    with pytest.raises(hk.InputError, match="no room for 1 KiB in .*: No space left on device"):
        solver.fit().apply({"b": torch.randn(1, 2, 3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["datainf", "exact", "cg", "lissa"])
def test_the_plan_names_the_form_that_runs(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()

    def noted(owner: Any, name: str, route: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (ran.add(route), original(*a, **k))[1])

    noted(FlatSolver, "gram", "gram")
    noted(FlatSolver, "moment", "primal")
    noted(GradientRows, "image", "rows")
    noted(datainf, "row_dots", "rows")
    for n in (8, 60):
        for name, shape in BLOCKS.items():
            ran.clear()
            train, query = {name: gradients(n, 1)[name]}, {name: gradients(5, 2)[name]}
            solver = fitted(make_solver(method), train, (n,))
            (planned,) = solver.plan({name: shape}, n, 5).blocks
            solver.scores(query)
            assert ran == {planned.route}, (name, n)


def test_probe_and_image_are_their_products() -> None:
    for scratch_columns in (False, True):
        rows = GradientRows(2500)
        P = torch.randn(37, 2500)
        for part in P.split((20, 1, 16)):
            rows.append(part)
        if scratch_columns:
            rows._chunks = list(P.split((30, 7)))
            rows._pending.clear()
        V, B = torch.randn(3, 2500).double(), torch.randn(3, 37).double()
        Yt, KX = rows.sketch(B.mT)
        torch.testing.assert_close(Yt, B @ P.double(), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(KX, P.double() @ Yt.mT, rtol=1e-12, atol=1e-9)
        dots, image = rows.probe(V, B)
        P64 = P.double()
        torch.testing.assert_close(dots, V @ P64.mT, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(image, B @ P64 @ P64.mT, rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(rows.image(B), image, rtol=1e-12, atol=1e-9)
        close = rows.image(B.float()).double()
        assert float((close - image).norm()) <= 1e-6 * float(image.norm())


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25, 1e-41], ids=str)
def test_squares_hold_at_every_scale(scale: float) -> None:
    rows = (torch.randn(5, 1100) * scale).float()
    rows[1] = 0
    rows[2, 700] *= 1e-8
    want = rows.double().square().sum(1)
    torch.testing.assert_close(squares(rows), want, rtol=1e-6, atol=0)
    rows[3, 4] = float("nan")
    assert not bool(torch.isfinite(squares(rows)[3]))


GRID = [1e-3, hk.DataInfDamping(0.1), hk.TraceDamping(1.0)]


@pytest.mark.parametrize("by_spectrum", [False, True], ids=["cholesky", "eigenvectors"])
def test_the_engine_gives_every_method_at_every_damping(
    by_spectrum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_spectrum:
        monkeypatch.setattr("hyperinf_kernels.solvers.engine.EIGH_PAYS", 2)
    train, query = gradients(60, 1), gradients(33, 2)
    engines = [hk.GramEngine(), hk.GramEngine()]
    for engine, batches in zip(engines, (parts(train, (60,)), []), strict=True):
        for batch in batches:
            engine.update(batch)
    shards = [hk.GramEngine() for _ in range(3)]
    for engine, batch in zip(shards, parts(train, (7, 1, 52)), strict=True):
        engine.update(batch)
    engine = shards[0].merge(shards[1]).merge(shards[2])
    found = engine.scores(query, ("grad_dot", "datainf", "exact", hk.CG(tol=1e-7)), GRID)
    assert [entry.method for entry in found] == ["grad_dot"] + [
        m for m in ("datainf", "exact", "cg") for _ in GRID
    ]
    dot = found[0].values.double().numpy()
    want = oracle.influence(train, query, "grad_dot")
    assert np.abs(dot - want).max() <= 1e-5 * np.abs(want).max()
    for entry in found[1:]:
        alone = hk.influence(train, query, entry.method, entry.damping)
        scale = float(alone.values.abs().max())
        torch.testing.assert_close(entry.values, alone.values, rtol=1e-4, atol=1e-5 * scale)
        assert [r.block for r in entry.report] == list(BLOCKS)
        assert all(r.converged for r in entry.report)


def test_the_engine_takes_one_method_and_any_grid_and_checks_every_score() -> None:
    train, query = gradients(60, 1), gradients(3, 2)
    engine = hk.GramEngine()
    engine.update(train)
    one, *none = engine.scores(query, "exact", np.array([1e-2, 1e-1]))[:1]
    assert (one.method, none) == ("exact", [])
    (plain,) = engine.scores(query, hk.GradDot())
    (named,) = engine.scores(query, "grad_dot")
    assert torch.equal(plain.values, named.values)
    large = {name: g * 1e20 for name, g in query.items()}
    huge = hk.GramEngine()
    huge.update({name: g * 1e20 for name, g in train.items()})
    with pytest.raises(hk.InputError, match=r"block q.lora_A: grad_dot gave NaN or inf"):
        huge.scores(large, "grad_dot")
    mixed = hk.GramEngine()
    mixed.update({"a": train["head"], "b": train["q.lora_A"].double()})
    (found,) = mixed.scores({"a": query["head"], "b": query["q.lora_A"].double()}, "grad_dot")
    assert found.values.dtype == torch.float64


@pytest.mark.parametrize("solver", [hk.HyperINF, hk.Exact], ids=lambda c: c.method)
def test_a_solution_that_only_rounding_keeps_from_its_tolerance_says_so(solver: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(1, 2, 16, generator=generator)
    made = solver(hk.DataInfDamping(1e-6))
    made.update({"b": row.expand(40, 2, 16).clone()})
    made.fit().apply({"b": row + torch.randn(1, 2, 16, generator=generator)})
    (entry,) = made.report()
    assert not entry.converged
    assert "W rounded to fp32" in entry.fallback


def test_the_engine_refuses_what_has_no_gram_form() -> None:
    engine = hk.GramEngine()
    with pytest.raises(hk.InputError, match="zero rows"):
        engine.scores(gradients(2, 1))
    engine.update(gradients(9, 1))
    for method in ("hyperinf", hk.HyperINF()):
        with pytest.raises(ValueError, match="hyperinf.* has no Gram form, only grad_dot, datainf"):
            engine.scores(gradients(2, 1), (method,))
    with pytest.raises(hk.InputError, match="query gradients"):
        engine.scores({"head": gradients(2, 1)["head"]})

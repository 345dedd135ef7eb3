"""K-FAC and EK-FAC against dense fp64 matrices, on layers without a bias."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hyperinf_kernels as hk
from tests import models, oracle
from tests.test_attributor import QUERY, TRAIN

K = 8.0  # times the error of a dense fp32 solve with the same matrix
FLOOR = 32 * torch.finfo(torch.float32).eps
SCALE = 0.7  # of the LoRA branch
Factors = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # grads, rows, cols by block


class Lora(nn.Module):
    """A linear layer with the module names that peft gives its adapters, followed by a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5, bias=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})
        self.head = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.lora_B["default"](self.lora_A["default"](x))
        return self.head(torch.tanh(self.base(x) + SCALE * branch))


BLOCKS = ["lora_A.default.weight", "lora_B.default.weight", "head.weight"]


def squared_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    gap = (model(batch["x"]) - batch["y"]) * batch["mask"][..., None]
    return 0.5 * gap.square().sum((1, 2))


def data(sizes: tuple[int, ...], seed: int) -> list[dict[str, Tensor]]:
    """Batches of four tokens a sample, some of them padding that the loss does not see."""
    torch.manual_seed(seed)
    n = sum(sizes)
    x, y = torch.randn(n, 4, 6), torch.randn(n, 4, 3)
    mask = torch.ones(n, 4)
    mask[::3, 2:] = 0
    parts = {"x": x.split(sizes), "y": y.split(sizes), "mask": mask.split(sizes)}
    return [{key: value[i] for key, value in parts.items()} for i in range(len(sizes))]


def by_hand(model: Lora, batches: list[dict[str, Tensor]]) -> Factors:
    """Gradients and factors of every block from the chain rule written out, token by token."""
    W, A, B, H = (
        oracle.f64(m.weight)
        for m in (model.base, model.lora_A["default"], model.lora_B["default"], model.head)
    )
    sides: dict[str, list[list[tuple[np.ndarray, np.ndarray]]]] = {name: [] for name in BLOCKS}
    for batch in batches:
        for x, y, mask in zip(*(oracle.f64(batch[k]) for k in ("x", "y", "mask")), strict=True):
            tokens: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in BLOCKS}
            for a, target, seen in zip(x, y, mask, strict=True):
                if not seen:
                    continue
                h = np.tanh(W @ a + SCALE * B @ A @ a)
                at_head = H @ h - target
                at_sum = (H.T @ at_head) * (1 - h**2)
                tokens["head.weight"].append((at_head, h))
                tokens["lora_A.default.weight"].append((SCALE * B.T @ at_sum, a))
                # stored with the rank first
                tokens["lora_B.default.weight"].append((A @ a, SCALE * at_sum))
            for name in BLOCKS:
                sides[name].append(tokens[name])
    out = {}
    for name, samples in sides.items():
        grads = np.stack([sum(np.outer(u, v) for u, v in sample) for sample in samples])
        pairs = [pair for sample in samples for pair in sample]
        rows = sum(np.outer(u, u) for u, _ in pairs) / len(samples)
        cols = sum(np.outer(v, v) for _, v in pairs) / len(pairs)
        out[name] = (grads, rows, cols)
    return out


def expected(
    method: str, train: Factors, query: Factors, lam: float | None, dtype: type = np.float64
) -> np.ndarray:
    total = 0.0
    for name, (grads, rows, cols) in train.items():
        if method == "ekfac":
            matrix = oracle.ekfac_matrix(grads, rows, cols)
        else:
            matrix = oracle.kfac_matrix(rows, cols)
        damping = 0.1 * np.mean(grads**2) if lam is None else lam
        total = total + oracle.scores_with(matrix, damping, grads, query[name][0], dtype)
    return np.asarray(total)


@pytest.mark.parametrize("lam", [None, 0.1, 1e-3], ids=["rule", "0.1", "1e-3"])
@pytest.mark.parametrize("options", [{}, {"two_pass": True}], ids=["kept", "two passes"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_model_without_biases_agrees_with_dense_matrices(
    method: str, options: dict[str, bool], lam: float | None
) -> None:
    if method == "kfac" and options:
        options = {}
    torch.manual_seed(3)
    model = Lora()
    train, query = data((7, 1, 12), 4), data((2, 3), 5)
    attributor = hk.Attributor(
        model, loss=squared_loss, blocks=BLOCKS, method=method, damping=lam, **options
    )
    scores = attributor.fit(train).score(query)
    assert all(entry.converged for entry in scores.report)
    factors, of_queries = by_hand(model, train), by_hand(model, query)
    want, peer = (
        expected(method, factors, of_queries, lam, dtype) for dtype in (np.float64, np.float32)
    )
    oracle.assert_as_exact_as(scores.values, want, peer, k=K, floor=FLOOR)
    own, peer = (
        np.diag(expected(method, factors, factors, lam, dtype))
        for dtype in (np.float64, np.float32)
    )
    oracle.assert_as_exact_as(attributor.self_influence(), own, peer, k=K, floor=FLOOR)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(3)
    model = Lora()
    train, query = data((7, 5), 4), data((3,), 5)
    padded = [
        {
            "x": torch.cat([b["x"], torch.randn(len(b["x"]), 3, 6)], 1),
            "y": torch.cat([b["y"], torch.randn(len(b["x"]), 3, 3)], 1),
            "mask": torch.cat([b["mask"], torch.zeros(len(b["x"]), 3)], 1),
        }
        for b in train
    ]
    one, other = (
        hk.Attributor(model, loss=squared_loss, blocks=BLOCKS, method="kfac")
        .fit(batches).score(query).values
        for batches in (train, padded)
    )  # fmt: skip
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def gradients(n: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    return {
        "A": (torch.randn(n, 3, 7, generator=generator, dtype=torch.float64) @ mix).to(dtype),
        "bias": torch.randn(n, 1, 4, generator=generator, dtype=torch.float64).to(dtype),
    }


def update(solver: Any, grads: dict[str, Tensor], sizes: tuple[int, ...]) -> Any:
    for batch in parts(grads, sizes):
        solver.update(batch)
    if solver.second_pass:
        for batch in parts(grads, sizes[::-1]):
            solver.revisit(batch)
    return solver.fit()


def parts(grads: dict[str, Tensor], sizes: tuple[int, ...]) -> Iterator[dict[str, Tensor]]:
    split = {name: g.split(sizes) for name, g in grads.items()}
    for i in range(len(sizes)):
        yield {name: pieces[i] for name, pieces in split.items()}


@pytest.mark.parametrize("lam", [0.1, 1e-3])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_plain_gradients_have_factors_of_their_own(method: str, lam: float) -> None:
    train, query = gradients(20, 1), gradients(5, 1)
    scores = hk.influence(train, query, method, lam)
    want, peer = 0.0, 0.0
    for name, grads in train.items():
        rows, cols = oracle.gradient_factors(grads)
        matrix = (
            oracle.ekfac_matrix(grads, rows, cols)
            if method == "ekfac" else oracle.kfac_matrix(rows, cols)
        )  # fmt: skip
        want = want + oracle.scores_with(matrix, lam, grads, query[name])
        peer = peer + oracle.scores_with(matrix, lam, grads, query[name], np.float32)
    oracle.assert_as_exact_as(scores.values, want, peer, k=K, floor=FLOOR)


@pytest.mark.parametrize(
    "make",
    [hk.KFAC, hk.EKFAC, lambda *a: hk.EKFAC(*a, two_pass=True)],
    ids=["kfac", "ekfac", "ekfac, two passes"],
)
def test_batches_shards_and_dampings_do_not_matter(make: Any) -> None:
    train, query = gradients(20, 1, torch.float64), gradients(5, 2, torch.float64)
    want = update(make(0.1), train, (20,)).apply(query)
    first, second, third = make(0.3), make(0.3), make(0.3)
    for solver, shard in zip((first, second, third), parts(train, (7, 1, 12)), strict=True):
        solver.update(shard)
    merged = first.merge(second).merge(third)
    for batch in parts(train, (3, 17)) if merged.second_pass else ():
        merged.revisit(batch)
    got = merged.fit().redamp(0.1).apply(query)
    for name, W in want.items():
        torch.testing.assert_close(got[name], W, rtol=1e-9, atol=1e-10)


def test_the_default_damping_is_a_tenth_of_the_mean_eigenvalue() -> None:
    train = gradients(20, 1)
    solver = update(hk.EKFAC(), train, (20,))
    for name, grads in train.items():
        E = solver.basis(name).eigenvalues
        assert float(E.mean()) == pytest.approx(float(grads.double().square().mean()), rel=1e-5)
        assert solver.lambdas[name] == pytest.approx(0.1 * float(E.mean()), rel=1e-5)
    trace = update(hk.KFAC(hk.TraceDamping(0.2)), train, (20,))
    for name in train:
        mean = float(trace.basis(name).eigenvalues.mean())
        assert trace.lambdas[name] == pytest.approx(0.2 * mean, rel=1e-9)


def test_rows_in_files_give_the_same_scores(tmp_path: Path) -> None:
    train, query = gradients(20, 1), gradients(5, 2)
    want = hk.influence(train, query, "ekfac").values
    scores = hk.influence(train, query, "ekfac", folder=tmp_path)
    assert torch.equal(scores.values, want)


@pytest.mark.parametrize(
    ("method", "options"),
    [("kfac", {}), ("ekfac", {}), ("ekfac", {"two_pass": True})],
    ids=["kfac", "ekfac", "ekfac, two passes"],
)
def test_a_saved_fit_scores_alike(method: str, options: dict[str, bool], tmp_path: Path) -> None:
    model = models.llama()
    first = hk.Attributor(model, method=method, **options).fit(TRAIN)
    first.save(tmp_path / "fitted")
    second = hk.Attributor.load(tmp_path / "fitted", model)
    want = first.score(QUERY, list(TRAIN)).values
    assert second.solver.second_pass is first.solver.second_pass
    assert torch.equal(second.score(QUERY, list(TRAIN)).values, want)
    # the damping can still be changed
    again = hk.Attributor(model, method=method, damping=0.5).fit(TRAIN).score(QUERY, list(TRAIN))
    second.solver.redamp(0.5)
    got = second.score(QUERY, list(TRAIN)).values
    torch.testing.assert_close(got, again.values, rtol=1e-4, atol=1e-9)


def test_two_passes_over_a_model_equal_kept_gradients() -> None:
    model = models.llama()
    kept = hk.Attributor(model, method="ekfac").fit(TRAIN).score(QUERY)
    for cache in (None, 0):
        twice = hk.Attributor(model, method="ekfac", two_pass=True, cache_bytes=cache)
        got = twice.fit(TRAIN).score(QUERY, TRAIN).values
        scale = float(kept.values.abs().max())
        torch.testing.assert_close(got, kept.values, rtol=1e-4, atol=1e-6 * scale)


def test_what_cannot_be_done_is_said_before_any_work() -> None:
    train = gradients(6, 1)
    solver = hk.EKFAC(two_pass=True)
    solver.update(train)
    with pytest.raises(hk.InputError, match=r"saw 6 training rows in update\(\) and 0 in revisit"):
        solver.fit()
    with pytest.raises(hk.InputError, match="keeps its gradients"):
        hk.EKFAC().revisit(train)
    with pytest.raises(hk.InputError, match="singular"):
        hk.influence({"b": torch.randn(2, 1, 9)}, {"b": torch.randn(1, 1, 9)}, "ekfac", 0.0)
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(hk.InputError, match=r"block 0\.weight: K-FAC.*Conv2d"):
        hk.Attributor(convolution, loss=squared_loss, blocks=["0.weight"], method="kfac")
    tokens = {name: [(torch.zeros(2, g.shape[1]), torch.zeros(2, g.shape[2]))]
              for name, g in train.items()}  # fmt: skip
    mixed = hk.KFAC()
    mixed.update(train)
    with pytest.raises(hk.InputError, match="either every update"):
        mixed.update(train, tokens=tokens)
    with pytest.raises(hk.InputError, match="block bias: no tokens"):
        hk.KFAC().update(train, tokens={"A": tokens["A"]})


@pytest.mark.parametrize("two_pass", [False, True], ids=["kept", "two passes"])
def test_a_restored_ekfac_says_what_it_can_take(two_pass: bool) -> None:
    first, more, query = gradients(20, 1), gradients(7, 2), gradients(5, 3)
    saved, restored, other = (hk.EKFAC(0.1, two_pass=two_pass) for _ in range(3))
    update(saved, first, (20,))
    restored.restore(*saved.state())
    other.update(more)
    want = saved.apply(query)
    if not two_pass:
        for act in (
            restored.update,
            lambda g: restored.merge(other),
            lambda g: other.merge(restored),
        ):
            with pytest.raises(hk.InputError, match="restored from a saved fit.*two_pass=True"):
                act(more)
        assert (restored.n, other.n) == (20, 7)
    else:
        restored.update(more)
        with pytest.raises(hk.InputError, match=r"27 training rows .* and 0 in revisit"):
            restored.fit()
        for batch in (more, first):
            restored.revisit(batch)
        both = {name: torch.cat([g, more[name]]) for name, g in first.items()}
        want = update(hk.EKFAC(0.1, two_pass=True), both, (27,)).apply(query)
    for name, W in restored.apply(query).items():
        torch.testing.assert_close(W, want[name], rtol=1e-4, atol=1e-5)


def test_ekfac_of_one_pass_and_of_two_do_not_merge() -> None:
    one, two = hk.EKFAC(), hk.EKFAC(two_pass=True)
    one.update(gradients(6, 1))
    two.update(gradients(6, 2))
    for mine, theirs in ((one, two), (two, one)):
        with pytest.raises(hk.InputError, match="two_pass"):
            mine.merge(theirs)
    assert one.fit().n == 6


@pytest.mark.parametrize(
    "make",
    [hk.KFAC, hk.EKFAC, lambda: hk.HyperINF(inverse="direct"), lambda: hk.HyperINF(side="both")],
    ids=["kfac", "ekfac", "hyperinf", "hyperinf, both sides"],
)
def test_a_saved_state_is_nobodys_running_sum(make: Any) -> None:
    first, more, query = gradients(20, 1), gradients(7, 2), gradients(5, 3)
    solver, second = make(), make()
    solver.update(first)
    tensors, meta = solver.state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    second.restore(tensors, meta)
    want = second.apply(query)
    third = make()
    third.update(more)
    solver.update(more)
    if not isinstance(second, hk.EKFAC):
        second.merge(third)
        second.update(more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    again = make()
    again.restore(tensors, meta)
    for name, W in again.apply(query).items():
        assert torch.equal(W, want[name])


@pytest.mark.parametrize("merging", [False, True], ids=["update", "merge"])
@pytest.mark.parametrize("make", [hk.Exact, hk.EKFAC], ids=["exact", "ekfac"])
def test_what_finds_no_room_can_be_tried_again(
    make: Any, merging: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.solvers.rows.CHUNK_ROWS", 8)
    first, more, query = gradients(5, 1), gradients(20, 2), gradients(3, 3)
    allocate, left = os.posix_fallocate, [2]

    def nearly_full(*where: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        allocate(*where)

    solver, plain, other = make(0.1, folder=tmp_path), make(0.1), make(0.1)
    solver.update(first)
    other.update(more)
    add = (lambda: solver.merge(other)) if merging else (lambda: solver.update(more))
    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    # the first block finds room for its two chunks, the second none
    with pytest.raises(hk.InputError, match="no room for"):
        add()
    assert left == [0]
    assert solver.n == 5
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    add()
    assert solver.n == 25
    for batch in (first, more):
        plain.update(batch)
    want = plain.apply(query)
    for name, W in solver.apply(query).items():
        torch.testing.assert_close(W, want[name], rtol=1e-5, atol=1e-6)

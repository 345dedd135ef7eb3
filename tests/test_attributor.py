"""Attributor on a LoRA-tuned transformer: plain-tensor scores, streamed, kept and saved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk

from . import models, oracle

METHODS = ("hyperinf", "datainf", "exact", "lissa", "cg", "grad_dot")


def batches(rows: int, sizes: tuple[int, ...], seed: int) -> list[dict[str, Tensor]]:
    """Token batches of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(4, 12, (rows,), generator=generator).tolist())
    whole = models.text_batch("right", lengths)
    whole["input_ids"] = torch.where(
        whole["attention_mask"].bool(),
        torch.randint(1, 61, whole["input_ids"].shape, generator=generator),
        0,
    )
    whole["labels"] = torch.where(whole["labels"] == -100, -100, whole["input_ids"])
    parts = {k: v.split(sizes) for k, v in whole.items()}
    return [{k: v[i] for k, v in parts.items()} for i in range(len(sizes))]


TRAIN = batches(23, (7, 1, 10, 5), seed=5)
QUERY = batches(5, (2, 3), seed=6)


def stacked(model: torch.nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    grads = [hk.per_sample_gradients(model, batch) for batch in data]
    return {name: torch.cat([g[name] for g in grads]) for name in grads[0]}


@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_those_of_plain_tensors(method: str) -> None:
    model = models.llama()
    want = hk.influence(stacked(model, TRAIN), stacked(model, QUERY), method=method)
    attributor = hk.Attributor(model, method=method).fit(TRAIN)
    got = attributor.score(QUERY)
    assert got.values.shape == (5, 23)
    scale = float(want.values.abs().max())
    assert torch.allclose(got.values, want.values, rtol=1e-4, atol=1e-5 * scale)
    assert got.ids == list(range(23))
    assert got.query_ids == list(range(5))
    assert {r.method for r in got.report} == {method}
    assert len(got.report) == 12
    assert all(r.n == 23 for r in got.report)


@pytest.mark.parametrize("method", METHODS)
def test_kept_gradients_and_a_second_pass_agree(method: str) -> None:
    model = models.llama()
    kept = hk.Attributor(model, method=method).fit(TRAIN).score(QUERY)
    again = hk.Attributor(model, method=method, cache_bytes=0).fit(TRAIN).score(QUERY, list(TRAIN))
    # kept rows are scored in Gram space, a second reading through W: two roundings in fp32
    assert torch.allclose(
        again.values, kept.values, rtol=1e-4, atol=1e-5 * float(kept.values.abs().max())
    )


def test_gradients_that_were_not_kept_must_be_readable_again() -> None:
    attributor = hk.Attributor(models.llama(), cache_bytes=0).fit(TRAIN)
    with pytest.raises(hk.InputError, match="not kept.*train_loader"):
        attributor.score(QUERY)
    with pytest.raises(hk.InputError, match="not fitted"):
        hk.Attributor(models.llama()).score(QUERY)
    with pytest.raises(hk.InputError, match="train loader gave no rows"):
        hk.Attributor(models.llama()).fit([])


def test_another_pool_is_scored_with_the_fitted_curvature() -> None:
    model = models.llama()
    pool = batches(9, (4, 5), seed=8)
    got = hk.Attributor(model, method="hyperinf").fit(TRAIN).score(QUERY, pool)
    solver = hk.HyperINF()
    solver.update(stacked(model, TRAIN))
    applied = solver.fit().apply(stacked(model, QUERY))
    grads = stacked(model, pool)
    want = -sum(applied[n].flatten(1) @ grads[n].flatten(1).T for n in grads)
    assert torch.allclose(got.values, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("queries", [(2, 3), (9, 10)], ids=["5 queries", "19 queries"])
def test_a_pool_is_scored_without_its_gradients(queries: tuple[int, ...]) -> None:
    """What streams by is contracted layer by layer, as exactly as from gradients."""
    model, pool = models.llama(), batches(9, (4, 5), seed=8)
    asked = batches(sum(queries), queries, seed=6)
    attributor = hk.Attributor(model).fit(TRAIN)
    with hk.trace_backends() as log:
        got = attributor.score(asked, pool).values
    used = [plan.kernel.rpartition(".")[2] for plan in log]
    assert used.count("per_sample_dot") == 12 * len(pool)
    # the queries' own gradients alone are formed
    assert used.count("per_sample_grad") == 12 * len(asked)
    solver = hk.HyperINF()
    solver.update(stacked(model, TRAIN))
    applied = solver.fit().apply(stacked(model, asked))
    grads = stacked(model, pool)
    peer = -sum(applied[n].flatten(1) @ grads[n].flatten(1).T for n in grads)
    truth = -sum(
        oracle.f64(applied[n].flatten(1)) @ oracle.f64(grads[n].flatten(1)).T for n in grads
    )
    oracle.assert_as_exact_as(got, truth, peer, k=4, floor=16 * torch.finfo().eps)
    # and the certificate is about these scores, of which no gradient was kept
    for entry in attributor.report():
        G, V, P = (stacked(model, rows)[entry.block] for rows in (TRAIN, asked, pool))
        own = -oracle.f64(applied[entry.block].flatten(1)) @ oracle.f64(P.flatten(1)).T
        want = (
            -oracle.hyperinf(V, G, entry.damping).reshape(len(V), -1) @ oracle.f64(P.flatten(1)).T
        )
        assert entry.score_error_by == "estimate"
        error = np.linalg.norm(own - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() / 10 <= entry.score_error <= 1e-4


class Mixed(torch.nn.Module):
    """Layers of every kind: one used twice, one that the loss does not reach."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 6)
        self.twice = torch.nn.Linear(6, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.unused = torch.nn.Linear(6, 2)
        self.head = torch.nn.Linear(6, 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(torch.tanh(self.twice(self.embed(x))))
        return self.head(self.norm(h)).sum(1)


def mixed_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_pool_is_scored_through_every_kind_of_layer(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, 11, (20, 5), generator=generator)
    train, pool, asked = ([{"x": part}] for part in rows.split((8, 7, 5)))
    model = Mixed(dtype)
    options = {"loss": mixed_loss, "blocks": ".", "damping": hk.AbsoluteDamping(0.1)}
    attributor = hk.Attributor(model, **options).fit(train)
    scores = attributor.score(asked, pool, per_block=True)
    grads = {
        name: hk.per_sample_gradients(model, batches[0], loss=mixed_loss, blocks=".")
        for name, batches in (("train", train), ("pool", pool), ("query", asked))
    }
    want = hk.HyperINF(hk.AbsoluteDamping(0.1))
    want.update(grads["train"])
    applied = want.fit().apply(grads["query"])
    assert scores.values.dtype == dtype
    for name, W in applied.items():
        truth = -oracle.f64(W.flatten(1)) @ oracle.f64(grads["pool"][name].flatten(1)).T
        scale = abs(truth).max()
        error = abs(oracle.f64(scores.per_block[name]) - truth).max()
        assert error <= 16 * torch.finfo(dtype).eps * max(scale, 1e-3), name
    assert not scores.per_block["unused.weight"].any()


def test_a_bad_row_of_a_pool_is_named() -> None:
    rows = torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(3))

    def burst(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses, bad = mixed_loss(model, batch), batch["bad"].nonzero().flatten()
        # sqrt(0) has a finite value and an infinite slope
        return losses.index_add(0, bad, (losses[bad] - losses[bad].detach()).sqrt())

    def named(*bad: bool) -> dict[str, Tensor]:
        return {"x": rows[: len(bad)], "bad": torch.tensor(bad)}

    attributor = hk.Attributor(
        Mixed(), loss=burst, blocks=r"head\.weight", damping=hk.AbsoluteDamping(0.1)
    ).fit([named(*[False] * 6)])
    with pytest.raises(hk.InputError, match=r"head\.weight: the gradient of batch row 4"):
        attributor.score([named(False)], [named(False, False), named(False, False, True)])


def test_top_k_keeps_the_ends_of_the_dense_ranking() -> None:
    attributor = hk.Attributor(models.llama(), method="datainf").fit(TRAIN)
    dense = attributor.score(QUERY)
    kept = attributor.score(QUERY, top_k=4)
    assert kept.values.shape == (5, 4)
    for rank in ("proponents", "opponents"):
        want, got = getattr(dense, rank)(4), getattr(kept, rank)(4)
        assert got.ids == want.ids
        assert torch.equal(got.values, want.values)
    assert bool((dense.proponents(4).values <= dense.opponents(4).values.flip(1)[:, :1]).all())
    with pytest.raises(ValueError, match="only the top 4"):
        kept.proponents(5)


def test_the_blocks_sum_to_the_score() -> None:
    attributor = hk.Attributor(models.llama(), method="exact").fit(TRAIN)
    scores = attributor.score(QUERY, per_block=True)
    total = torch.stack(list(scores.per_block.values())).sum(0)
    assert torch.allclose(total, scores.values, rtol=1e-5, atol=1e-6 * float(total.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_self_influence_is_the_diagonal(method: str) -> None:
    attributor = hk.Attributor(models.llama(), method=method).fit(TRAIN)
    got = attributor.self_influence()
    want = attributor.score(TRAIN).values.diagonal()
    assert got.shape == (23,)
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))
    assert bool((got < 0).all())


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_attributors_score_alike(method: str, tmp_path: Path) -> None:
    model = models.llama()
    options = {"iterations": 40} if method == "lissa" else {}
    first = hk.Attributor(
        model, method=method, damping=hk.DataInfDamping(0.2) + hk.AbsoluteDamping(1e-4), **options
    ).fit(TRAIN)
    first.save(tmp_path / "fitted")
    second = hk.Attributor.load(tmp_path / "fitted", model)
    want, got = first.score(QUERY, list(TRAIN)), second.score(QUERY, list(TRAIN))
    assert torch.equal(got.values, want.values)
    assert [r.damping for r in got.report] == [r.damping for r in want.report]
    assert second.solver.options() == first.solver.options()
    with pytest.raises(hk.InputError, match="exists already"):
        first.save(tmp_path / "fitted")
    with pytest.raises(hk.InputError, match="no saved attributor"):
        hk.Attributor.load(tmp_path / "other", model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "attributor.json is damaged"),
        ('{"format": 99}', "has format 99, this version reads 1"),
        ('{"format": 1}', "lacks method, options"),
        ("[]", "attributor.json is damaged"),
    ],
    ids=["cut", "other format", "foreign", "not an object"],
)
def test_a_damaged_folder_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "attributor.json").write_text(text)
    with pytest.raises(hk.InputError, match=message):
        hk.Attributor.load(tmp_path, models.llama())


def test_nothing_is_left_of_a_save_that_fails(tmp_path: Path, monkeypatch) -> None:
    import safetensors.torch

    def fail(*args: object) -> None:
        raise OSError("disk full")

    attributor = hk.Attributor(models.llama()).fit(TRAIN)
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        attributor.save(tmp_path / "fitted")
    assert list(tmp_path.iterdir()) == []


def test_ids_of_the_batches_name_rows() -> None:
    named = [
        {**batch, "id": [f"t{start + i}" for i in range(len(batch["labels"]))]}
        for start, batch in zip((0, 7, 8, 18), TRAIN, strict=True)
    ]
    scores = hk.Attributor(models.llama()).fit(named).score(QUERY)
    assert scores.ids == [f"t{i}" for i in range(23)]


def test_progress_counts_rows_of_both_passes() -> None:
    told = []
    attributor = hk.Attributor(models.llama(), progress=lambda *args: told.append(args))
    attributor.fit(TRAIN).score(QUERY)
    assert [(s, d) for s, d, _ in told] == [
        ("train", 7), ("train", 8), ("train", 18), ("train", 23), ("query", 2), ("query", 5),
    ]  # fmt: skip


def test_untrained_adapter_is_explained() -> None:
    model = models.llama()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    with pytest.raises(hk.InputError, match=r"lora_A.*every training gradient is zero.*train it"):
        hk.Attributor(model).fit(TRAIN)


@pytest.mark.parametrize("where", ["lora_A.default.weight", "embed_tokens.weight"])
def test_nan_weights_are_refused_by_name(where: str) -> None:
    model = models.llama()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if where in n).view(-1)[0] = float("nan")
    with pytest.raises(hk.InputError, match=f"{where}.*NaN or inf"):
        hk.Attributor(model)


def test_shuffled_loader_without_ids_warns() -> None:
    from torch.utils.data import DataLoader

    rows = [{k: v[i] for k, v in batch.items()} for batch in TRAIN[2:3] for i in range(10)]
    with pytest.warns(UserWarning, match="shuffles"):
        hk.Attributor(models.llama()).fit(DataLoader(rows, batch_size=4, shuffle=True))

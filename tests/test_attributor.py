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
    with pytest.raises(hk.InputError, match=r"train row 4 .*block head\.weight"):
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


def rows_of(count: int) -> list[dict[str, Tensor]]:
    return [{k: v[i] for k, v in TRAIN[2].items()} for i in range(count)]


@pytest.mark.parametrize("kind", ["shuffle", "subset", "weighted", "batches"])
def test_a_loader_that_may_reorder_without_ids_warns(kind: str) -> None:
    from torch.utils import data

    rows = rows_of(8)
    options = {
        "shuffle": {"shuffle": True, "batch_size": 4},
        "subset": {"sampler": data.SubsetRandomSampler(range(8)), "batch_size": 4},
        "weighted": {"sampler": data.WeightedRandomSampler([1.0] * 8, 8), "batch_size": 4},
        "batches": {
            "batch_sampler": data.BatchSampler(data.RandomSampler(rows), 4, drop_last=False)
        },
    }
    with pytest.warns(UserWarning, match="shuffles"):
        hk.Attributor(models.llama()).fit(data.DataLoader(rows, **options[kind]))


def test_a_loader_in_order_does_not_warn() -> None:
    import warnings

    from torch.utils import data

    class Stream(data.IterableDataset):
        def __iter__(self):
            return iter(rows_of(8))

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*shuffles.*")
        for rows in (rows_of(8), Stream()):
            hk.Attributor(models.llama()).fit(data.DataLoader(rows, batch_size=4))


def spoiled() -> list[dict[str, object]]:
    """Three named batches; a row of the second has no label."""
    batches = [dict(batch) for batch in TRAIN[:3]]
    for k, batch in enumerate(batches):
        batch["id"] = [f"{k}-{i}" for i in range(len(batch["labels"]))]
        batch["labels"] = batch["labels"].clone()
    batches[2]["labels"][3] = -100
    return batches


@pytest.mark.parametrize("method", ["hyperinf", "datainf", "kfac"])
def test_a_bad_row_is_named_or_left_out(method: str) -> None:
    model, data = models.llama(), spoiled()
    with pytest.raises(hk.InputError, match=r"train row 11 \(id '2-3'\) has no answer token"):
        hk.Attributor(model, method=method).fit(data)
    attributor = hk.Attributor(model, method=method, on_bad_row="skip").fit(data)
    scores = attributor.score(QUERY)
    assert scores.meta["skipped"] == [
        {"stage": "train", "row": 11, "id": "2-3", "what": "has no answer token to score"}
    ]
    kept = [
        {k: [x for i, x in enumerate(v) if i != 3] if k == "id" else
         torch.cat([v[:3], v[4:]]) for k, v in batch.items()} if batch is data[2] else batch
        for batch in data
    ]  # fmt: skip
    want = hk.Attributor(model, method=method).fit(kept).score(QUERY)
    assert scores.ids == want.ids
    assert torch.allclose(
        scores.values, want.values, rtol=1e-3, atol=1e-4 * float(want.values.abs().max())
    )
    data[0]["labels"][:] = -100
    data[1]["labels"][:] = -100
    again = hk.Attributor(model, method=method, on_bad_row="skip").fit(data)
    assert again.train_ids == [f"2-{i}" for i in range(10) if i != 3]
    assert len(again.skipped) == 9


def test_a_bad_row_that_cannot_be_cut_is_not_skipped() -> None:
    def loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return mixed_loss(model, batch) / batch["scale"]

    data = {"x": torch.randint(0, 11, (3, 5)), "scale": torch.tensor([1.0, 0.0, 1.0])}
    attributor = hk.Attributor(Mixed(), loss=loss, blocks="head.weight", on_bad_row="skip")
    with pytest.raises(hk.InputError, match="cannot be skipped.*one_row"):
        attributor.fit([data])
    cut = hk.Attributor(
        Mixed(), loss=loss, blocks="head.weight", on_bad_row="skip", method="grad_dot",
        one_row=lambda batch, i: {k: v[i : i + 1] for k, v in batch.items() if k != "id"},
    )  # fmt: skip
    assert cut.fit([data | {"id": [5, 6, 7]}]).skipped[0].row == 1
    with pytest.raises(ValueError, match="on_bad_row must be error or skip"):
        hk.Attributor(Mixed(), loss=loss, blocks="head.weight", on_bad_row="drop")


@pytest.mark.parametrize("part", ["lora_A.default.weight", "embed_tokens.weight"])
def test_other_weights_than_the_fitted_ones_are_refused(part: str, tmp_path: Path) -> None:
    model = models.llama()
    hk.Attributor(model).fit(TRAIN).save(tmp_path / "fitted")
    hk.Attributor.load(tmp_path / "fitted", models.llama())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if part in n).mul_(1.001)
    what = "attributed weights" if "lora" in part else "base weights"
    with pytest.raises(hk.InputError, match=f"other {what} than these.*insist"):
        hk.Attributor.load(tmp_path / "fitted", model)
    hk.Attributor.load(tmp_path / "fitted", model, insist=True)


def test_another_tokenizer_than_the_fitted_one_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers import models as words
    from transformers import PreTrainedTokenizerFast

    def tokenizer(second: str) -> PreTrainedTokenizerFast:
        known = words.WordLevel({"a": 0, second: 1}, unk_token="a")
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(known), unk_token="a")

    model = models.llama()
    hk.Attributor(model).fit(TRAIN).save(tmp_path / "fitted", tokenizer=tokenizer("b"))
    hk.Attributor.load(tmp_path / "fitted", model, tokenizer=tokenizer("b"))
    with pytest.raises(hk.InputError, match="other tokenizer than"):
        hk.Attributor.load(tmp_path / "fitted", model, tokenizer=tokenizer("c"))


@pytest.mark.parametrize("method", ["grad_dot", "datainf", "hyperinf", "exact", "ekfac"])
def test_scores_keep_no_graph(method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train = {"a": torch.randn(9, 4, 20, requires_grad=True)}
    query = {"a": torch.randn(3, 4, 20, requires_grad=True)}
    scores = hk.influence(train, query, method=method, per_block=True)
    assert not scores.values.requires_grad
    assert not scores.per_block["a"].requires_grad
    scores.to_parquet(tmp_path / "scores.parquet")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_precision_of_gradients_is_told_beside_the_certificate(dtype: torch.dtype) -> None:
    model = models.llama().to(dtype)
    scores = hk.Attributor(model).fit(TRAIN).score(QUERY)
    said = scores.meta["gradients"]
    wide = models.llama().to(dtype).float()
    got, want = (hk.per_sample_gradients(m, TRAIN[0]) for m in (model, wide))
    off = sum(float((got[n][0] - want[n][0]).square().sum()) for n in want)
    whole = sum(float(want[n][0].square().sum()) for n in want)
    assert said["dtype"] == str(dtype).removeprefix("torch.")
    assert said["first row"] == pytest.approx((off / whole) ** 0.5, rel=1e-2)
    assert 1e-5 < said["first row"] < 0.2
    assert all(p.dtype == dtype for p in model.parameters())
    exact = hk.Attributor(models.llama()).fit(TRAIN).score(QUERY)
    assert exact.meta["gradients"] == {"dtype": "float32"}


def test_a_pool_of_an_fp16_model_is_certified_although_passes_are_repeated() -> None:
    """Losses so large that the first scale overflows: what that pass saw is forgotten."""
    model = models.llama().half()

    def loss(m: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return hk.CausalLM()(m, batch) * 2.0**8

    attributor = hk.Attributor(model, loss=loss).fit(TRAIN)
    scores = attributor.score(QUERY, list(TRAIN))
    kept = attributor.score(QUERY)
    scale = float(kept.values.abs().max())
    assert torch.allclose(scores.values, kept.values, rtol=1e-3, atol=1e-4 * scale)
    assert scores.certificate()["certified"]

"""Scores are those of the library, whatever the options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import hyperinf_kernels as hk
from tests import folders

from .command import (
    METHODS,
    OPINIONS,
    SCORE,
    Command,
    assert_close,
    document,
    done,
    gradients,
    records,
    scores,
)


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize(
    ("options", "loss", "cut"),
    [
        ("", hk.CausalLM(), 100),
        ("--batch-size 5 --max-length 8", hk.CausalLM(), 8),
        ("--tokens all --reduction mean", hk.CausalLM("all", "mean"), 100),
        ("--tokens prompt", hk.CausalLM("prompt"), 100),
    ],
)
def test_scores_of_one_method_are_those_of_the_library(
    hyperinf: Command, site: dict[str, Path], options: str, loss: hk.CausalLM, cut: int, device: str
) -> None:
    ran = done(hyperinf(f"{SCORE} {options} --device {device} --output out"))
    assert ran.out == ""
    assert "report: out/report.html" in ran.err
    assert sorted(os.listdir(".")) == ["out"]
    assert sorted(os.listdir("out")) == ["report.html", "report.json", "scores.parquet"]
    found = scores("out/scores.parquet")
    assert found.train_ids == [row["id"] for row in records(site["train"])]
    assert found.query_ids == [row["id"] for row in records(site["query"])]
    train, query = (gradients(site, name, loss, cut) for name in ("train", "query"))
    assert_close(found.values, hk.influence(train, query).values)


def test_scores_of_several_methods_are_those_of_the_library(
    hyperinf: Command, site: dict[str, Path]
) -> None:
    asked = " ".join(f"-m {method}" for method in METHODS)
    done(hyperinf(f"{SCORE} {asked} --damping 0.3+abs:1e-4 --output out"))
    names = ["scores.parquet"] + [
        f"scores-{slug}.parquet" for slug in ("datainf", "lissa", "cg", "exact", "gradient-dot")
    ]
    assert {*os.listdir("out")} == {*names, "report.html", "report.json"}
    train, query = gradients(site, "train"), gradients(site, "query")
    damping = hk.DataInfDamping(0.3) + hk.AbsoluteDamping(1e-4)
    for method, name in zip(METHODS, names, strict=True):
        wanted = hk.influence(train, query, method, damping)
        assert_close(scores(f"out/{name}").values, wanted.values)


def test_scores_of_a_classifier_are_those_of_the_library(
    hyperinf: Command, site: dict[str, Path]
) -> None:
    classifier = f"--model {{bert}} --adapter {{bert_adapter}} {OPINIONS} -m exact"
    done(hyperinf(f"score {classifier} --output out"))
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(site["bert"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(site["bert"])
    model = peft.PeftModel.from_pretrained(base, site["bert_adapter"])
    grads = []
    for name in ("opinions", "opinion_queries"):
        rows = records(site[name])
        batch = dict(tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt"))
        batch["labels"] = torch.tensor([row["label"] for row in rows])
        grads.append(hk.per_sample_gradients(model, batch, loss="sequence_classification"))
    found = scores("out/scores.parquet")
    assert_close(found.values, hk.influence(*grads, "exact").values)
    # the papers' single query is the mean gradient, and influence is linear in the query
    done(hyperinf(f"mislabeled {classifier} --output mean"))
    assert_close(scores("mean/scores.parquet").values, found.values.mean(0, keepdim=True))


def test_one_method_streamed_equals_the_same_among_several(hyperinf: Command) -> None:
    done(hyperinf(f"{SCORE} -m exact --output one"))
    done(hyperinf(f"{SCORE} -m grad_dot -m exact --output two"))
    one, two = scores("one/scores.parquet"), scores("two/scores-exact.parquet")
    assert one.train_ids == two.train_ids
    assert_close(one.values, two.values)


def test_top_k_keeps_both_ends_of_every_query(hyperinf: Command) -> None:
    done(hyperinf(f"{SCORE} --output dense"))
    dense = scores("dense/scores.parquet")
    for methods in ("-m hyperinf", "-m hyperinf -m grad_dot"):
        done(hyperinf(f"{SCORE} {methods} --top-k 2 --output kept"))
        table = pq.read_table("kept/scores.parquet").to_pylist()
        assert len(table) == 4 * len(dense.query_ids)
        for query, row in zip(dense.query_ids, dense.values.tolist(), strict=True):
            order = sorted(range(len(row)), key=row.__getitem__)
            wanted = [dense.train_ids[i] for i in (*order[:2], order[-1], order[-2])]
            assert [entry["train_id"] for entry in table if entry["query_id"] == query] == wanted
        shown = document("kept")["queries"][0]["methods"]["HyperINF converged"]
        assert len(shown["helpful"]) == len(shown["harmful"]) == 2
        os.rename("kept", f"kept{len(methods)}")


@pytest.mark.parametrize("methods", ["-m hyperinf", "-m hyperinf -m exact"])
def test_per_block_columns_add_up(hyperinf: Command, methods: str) -> None:
    done(hyperinf(f"{SCORE} {methods} --per-block --output out"))
    table = pq.read_table("out/scores.parquet")
    blocks = [block["block"] for block in document("out")["methods"][0]["blocks"]]
    assert table.column_names[3:] == blocks
    parts = torch.stack([torch.tensor(table[name].to_pylist()) for name in blocks])
    assert_close(parts.sum(0), torch.tensor(table["influence"].to_pylist()))
    assert float(parts.abs().sum(1).min()) > 0


def test_self_influence_is_the_diagonal(hyperinf: Command, site: dict[str, Path]) -> None:
    done(
        hyperinf(
            "self-influence --model {llama} --adapter {adapter} --train {train} -m exact "
            "-m grad_dot --output out"
        )
    )
    train = gradients(site, "train")
    for method, name in (("exact", "scores"), ("grad_dot", "scores-gradient-dot")):
        found = scores(f"out/{name}.parquet")
        assert found.query_ids == ["itself"]
        assert_close(found.values[0], hk.influence(train, train, method).values.diagonal())
    strongest = scores("out/scores.parquet").values[0].argsort().tolist()
    report = document("out")
    assert [s["id"] for s in report["suspects"]] == [f"t{i}" for i in strongest]
    assert [s["rank"] for s in report["suspects"]] == list(range(1, 13))
    assert report["data"] == {"train": {"source": str(site["train"]), "rows": 12}}


def test_labels_may_be_words(hyperinf: Command) -> None:
    done(
        hyperinf(
            "score --model {bert} --adapter {bert_adapter} --train {words} --query {words} "
            "--output out"
        )
    )
    queries = document("out")["queries"]
    assert [entry["class"] for entry in queries] == ["bad", "good"] * 4


def test_a_draw_that_misses_a_label_keeps_the_classes(hyperinf: Command) -> None:
    score = f"score --model {{bert}} --adapter {{bert_adapter}} {OPINIONS} -m grad_dot"
    done(hyperinf(f"{score} --output all"))
    done(hyperinf(f"{score} --limit 1 --output one"))
    whole, one = scores("all/scores.parquet"), scores("one/scores.parquet")
    column = whole.train_ids.index(one.train_ids[0])
    assert_close(one.values[:, 0], whole.values[:, column])


def test_fields_of_other_names(hyperinf: Command, site: dict[str, Path], tmp_path: Path) -> None:
    names = {"prompt": "question", "answer": "reply", "id": "key", "variation": "sort"}
    for name in ("train", "query"):
        rows = records(site[name])
        renamed = [{names[field]: value for field, value in row.items()} for row in rows]
        folders.write_lines(tmp_path / f"{name}.jsonl", renamed)
    done(
        hyperinf(
            "score --model {llama} --adapter {adapter} --train train.jsonl --query query.jsonl "
            "--prompt-field question --answer-field reply --id-field key --group-field sort "
            "--output renamed"
        )
    )
    done(hyperinf(f"{SCORE} --output plain"))
    one, two = scores("renamed/scores.parquet"), scores("plain/scores.parquet")
    assert one.train_ids == two.train_ids
    assert torch.equal(one.values, two.values)
    assert document("renamed")["queries"][0]["class"] == "add"


def test_several_dampings_have_files_of_their_own(hyperinf: Command) -> None:
    done(hyperinf(f"{SCORE} --damping abs:1e+3 --damping abs:1e-3 --output out"))
    assert sorted(os.listdir("out"))[2:] == [
        "scores-hyperinf-converged-damping-abs-1e-3.parquet", "scores.parquet",
    ]  # fmt: skip
    first, second = (entry["blocks"][0]["damping"] for entry in document("out")["methods"])
    assert (first, second) == (1e3, 1e-3)


def test_a_saved_curvature_gives_the_scores_of_one_run(hyperinf: Command) -> None:
    for number, method in enumerate(("hyperinf", "datainf", "exact", "ekfac")):
        fit = SCORE.replace("score", "fit", 1).replace(" --query {query}", "")
        done(hyperinf(f"{fit} -m {method} --damping trace:0.1 --output fitted{number}"))
        done(hyperinf(f"{SCORE} -m {method} --damping trace:0.1 --output once{number}"))
        ran = done(hyperinf(f"{SCORE} --fitted fitted{number} --output later{number} --json"))
        once, later = (scores(f"{run}{number}/scores.parquet") for run in ("once", "later"))
        assert (later.query_ids, later.train_ids) == (once.query_ids, once.train_ids)
        scale = float(once.values.abs().max())
        assert float((later.values - once.values).abs().max()) <= 1e-5 * scale, method
        (entry,) = json.loads(ran.out)["methods"]
        assert entry["damping"] == str(hk.TraceDamping(0.1))


def test_a_curvature_serves_a_pool_that_it_was_not_fitted_on(
    hyperinf: Command, site: dict[str, Path]
) -> None:
    fit = SCORE.replace("score", "fit", 1).replace(" --query {query}", "")
    done(hyperinf(f"{fit} --output fitted"))
    pool = SCORE.replace("{train}", "{query}")
    done(hyperinf(f"{pool} --fitted fitted --top-k 2 --output pool"))
    assert pq.read_table("pool/scores.parquet").num_rows == 4 * 2 * 2


def test_selection_keeps_the_rows_of_lowest_mean_influence(hyperinf: Command) -> None:
    select = SCORE.replace("score", "select", 1)
    done(hyperinf(f"{select} -m datainf -m grad_dot --share 0.34 --output few"))
    done(hyperinf(f"{SCORE} -m datainf -m grad_dot --output all"))
    for stem, name in (("selected", "scores"), ("selected-gradient-dot", "scores-gradient-dot")):
        rows = records(Path(f"few/{stem}.jsonl"))
        whole = scores(f"all/{name}.parquet")
        mean = whole.values.mean(0)
        best = [whole.train_ids[i] for i in mean.argsort(stable=True)[:4].tolist()]
        assert [row["id"] for row in rows] == best
        assert all(row["prompt"] and row["answer"] for row in rows)
    selected = document("few")["selected"]
    assert [entry["rows"] for entry in selected] == [4, 4]

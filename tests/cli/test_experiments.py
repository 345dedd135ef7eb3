"""The papers' experiments: tuning, metrics, suspects, seeds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .command import (
    IDENTIFY,
    MISLABELED,
    SCORE,
    Command,
    assert_close,
    document,
    done,
    records,
    scores,
)


def auc(score: list[float], positive: list[bool]) -> float:
    """Of all pairs of a positive and another row, the share that the score puts in order."""
    inside = [s for s, p in zip(score, positive, strict=True) if p]
    outside = [s for s, p in zip(score, positive, strict=True) if not p]
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    return sum(won) / len(won)


def recall(score: list[float], positive: list[bool]) -> float:
    """Of the positive rows, the share among as many rows of the highest score."""
    count = sum(positive)
    first = sorted(range(len(score)), key=lambda i: -score[i])[:count]
    return sum(positive[i] for i in first) / count


def mean_sd(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5


def test_identify_metrics_are_those_of_its_scores(hyperinf: Command, site: dict[str, Path]) -> None:
    ran = done(
        hyperinf(
            f"{IDENTIFY} --adapter {{adapter}} -m exact -m grad_dot --tokens answer --tokens all "
            "--output out"
        )
    )
    report = document("out")
    labels = [f"{m}, {t} tokens" for t in ("answer", "all") for m in ("Exact", "Gradient dot")]
    assert [entry["label"] for entry in report["methods"]] == labels
    group = {row["id"]: row["variation"] for name in ("train", "query")
             for row in records(site[name])}  # fmt: skip
    names = ["scores", "scores-gradient-dot-answer-tokens", "scores-exact-all-tokens",
             "scores-gradient-dot-all-tokens"]  # fmt: skip
    for entry, name in zip(report["methods"], names, strict=True):
        found = scores(f"out/{name}.parquet")
        helpful = (-found.values).tolist()
        same = [[group[t] == group[q] for t in found.train_ids] for q in found.query_ids]
        metrics = entry["metrics"]["same class"]
        for metric, measure in (("auc", auc), ("recall", recall)):
            each = [measure(*pair) for pair in zip(helpful, same, strict=True)]
            wanted = mean_sd(each)
            assert (metrics[f"{metric}_mean"], metrics[f"{metric}_sd"]) == pytest.approx(wanted)
        assert f"{metrics['auc_mean']:.3f}" in ran.err
    assert not torch.equal(scores("out/scores.parquet").values,
                           scores("out/scores-exact-all-tokens.parquet").values)  # fmt: skip


def test_mislabeled_finds_the_flipped_rows_it_says_it_finds(
    hyperinf: Command, site: dict[str, Path]
) -> None:
    ran = done(
        hyperinf(
            f"{MISLABELED} --flip 0.25 --epochs 2 --batch-size 4 -m exact -m grad_dot --output out"
        )
    )
    assert sorted(os.listdir(".")) == ["out"]
    rows, source = records(Path("out/train.jsonl")), records(site["opinions"])
    flipped = [row["corrupted"] for row in rows]
    assert sum(flipped) == 4
    assert [r["label"] != s["label"] for r, s in zip(rows, source, strict=True)] == flipped
    report = document("out")
    for entry, name in zip(report["methods"], ("scores", "scores-gradient-dot"), strict=True):
        found = scores(f"out/{name}.parquet")
        assert found.query_ids == ["mean query"]
        assert found.train_ids == [row["id"] for row in rows]
        harm = found.values[0].tolist()
        wanted = {"auc": auc(harm, flipped), "recall": recall(harm, flipped)}
        assert entry["metrics"]["corrupted"] == pytest.approx(wanted)
    assert [entry["name"] for entry in report["baselines"]] == [
        "observed label alone", "training loss",
    ]  # fmt: skip
    assert "accuracy on the queries" in ran.err


def test_mislabeled_without_known_labels_names_suspects(hyperinf: Command) -> None:
    done(hyperinf(f"{MISLABELED} --adapter {{bert_adapter}} --output out"))
    report = document("out")
    assert len(report["methods"]) == 4
    assert all(entry["metrics"] == {} for entry in report["methods"])
    assert "baselines" not in report
    assert {*os.listdir("out")} & {"adapter", "train.jsonl"} == set()
    found = scores("out/scores.parquet")
    order = found.values[0].argsort(descending=True).tolist()
    assert [entry["id"] for entry in report["suspects"]] == [found.train_ids[i] for i in order]
    harms = [entry["score"] for entry in report["suspects"]]
    assert harms == found.values[0, order].double().tolist()


def test_what_was_tuned_here_can_be_scored_again(hyperinf: Command) -> None:
    done(hyperinf(f"{IDENTIFY} --epochs 2 --batch-size 4 -m exact --output tuned"))
    assert sorted(os.listdir(".")) == ["tuned"]
    saved = load_file("tuned/adapter/adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for tensor in saved.values())
    done(
        hyperinf(
            "score --model {llama} --adapter tuned/adapter --train tuned/train.jsonl "
            "--query tuned/query.jsonl -m exact --output again"
        )
    )
    first, again = scores("tuned/scores.parquet"), scores("again/scores.parquet")
    assert (first.query_ids, first.train_ids) == (again.query_ids, again.train_ids)
    assert_close(again.values, first.values)
    done(hyperinf(f"{MISLABELED} --flip 0.25 --epochs 2 -m exact --batch-size 4 --output wrong"))
    done(
        hyperinf(
            "mislabeled --model {bert} --adapter wrong/adapter --train wrong/train.jsonl "
            "--query wrong/query.jsonl -m exact --output wrong-again"
        )
    )
    assert_close(scores("wrong-again/scores.parquet").values, scores("wrong/scores.parquet").values)
    # the file says which rows are flipped, so the metrics come back too
    before, after = (document(folder)["methods"][0] for folder in ("wrong", "wrong-again"))
    assert before["metrics"] == after["metrics"] != {}


def test_a_seed_settles_everything(hyperinf: Command) -> None:
    tuned = f"{IDENTIFY} --epochs 2 --batch-size 4 -m exact"
    drawn = f"{SCORE} --limit 9 --query-limit 3"
    for command, kind in ((tuned, "tuned"), (drawn, "drawn")):
        for seed, name in ((3, "one"), (3, "two"), (4, "other")):
            done(hyperinf(f"{command} --seed {seed} --output {kind}/{name}"))
            assert document(f"{kind}/{name}")["seed"] == seed
        one, two, other = (
            scores(f"{kind}/{name}/scores.parquet") for name in ("one", "two", "other")
        )
        assert one.train_ids == two.train_ids
        assert torch.equal(one.values, two.values)
        assert not torch.equal(one.values, other.values)
        assert (one.train_ids == other.train_ids) == (kind == "tuned")
    assert (len(one.query_ids), len(one.train_ids)) == (3, 9)


@pytest.mark.parametrize("corrupt", [0.0, 0.2])
def test_demo(hyperinf: Command, corrupt: float) -> None:
    done(
        hyperinf(
            f"demo --model {{llama}} --rows 30 --queries 10 --corrupt {corrupt} --epochs 1 "
            "-m exact -m grad_dot"
        )
    )
    assert sorted(os.listdir(".")) == ["demo-output"]
    report = document("demo-output")
    known = {"same class", "corrupted"} if corrupt else {"same class"}
    assert all(set(entry["metrics"]) == known for entry in report["methods"])
    assert ("baselines" in report) == bool(corrupt)

"""The command line as a person meets it: what it prints, what it writes, what it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import hyperinf_kernels as hk
from hyperinf_kernels import cli, files, jobs
from hyperinf_kernels.tasks import models

from . import folders

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("hyperinf", "datainf", "lissa", "cg", "exact", "grad_dot")
GENERATION = "--train {train} --query {query}"
OPINIONS = "--train {opinions} --query {opinion_queries}"
SCORE = f"score --model {{llama}} --adapter {{adapter}} {GENERATION}"
IDENTIFY = f"identify --model {{llama}} {GENERATION}"
MISLABELED = f"mislabeled --model {{bert}} {OPINIONS}"


class Ran(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str


Command = Callable[[str], Ran]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models, adapters and rows by name, good ones and broken ones."""
    root = tmp_path_factory.mktemp("site")
    paths = {name: root / name for name in ("llama", "bert", "adapter", "bert_adapter")}
    folders.save_adapter(paths["adapter"], folders.save_llama(paths["llama"]))
    folders.save_adapter(paths["bert_adapter"], folders.save_bert(paths["bert"]))
    rows = {
        "train": folders.sums(12, "t"),
        "query": folders.sums(4, "q", seed=1),
        "opinions": folders.opinions(16),
        "opinion_queries": folders.opinions(4, seed=1),
        "words": folders.opinions(8, labels=("bad", "good")),
        "empty": [],
        "broken": [*folders.sums(2, "t"), '{"prompt": "add'],
        "wanting": [{"prompt": "add", "answer": "one"}, {"prompt": "add", "reply": "one"}],
        "other_label": [{"text": "good", "label": 0}, {"text": "fine", "label": 7}],
        "long": [{"id": "huge", "prompt": "one " * 50, "answer": "two"}],
        "other_class": [{"prompt": "add", "answer": "one", "variation": "halve"}],
        "classless": [{"prompt": "add", "answer": "one"}],
    }
    for name, records in rows.items():
        paths[name] = folders.write_lines(root / f"{name}.jsonl", records)
    return {"root": root, **paths, **_broken_folders(root, paths)}


def _broken_folders(root: Path, good: dict[str, Path]) -> dict[str, Path]:
    thin = folders.save_llama(root / "one_layer", layers=1)
    wide = folders.save_llama(root / "wide", hidden=24)
    deep = folders.save_llama(root / "three_layers", layers=3)
    made = {
        "untrained": folders.save_adapter(root / "untrained", good["llama"], trained=False),
        "thin_adapter": folders.save_adapter(root / "thin_adapter", thin),
        "deep_adapter": folders.save_adapter(root / "deep_adapter", deep),
        "wide_adapter": folders.save_adapter(root / "wide_adapter", wide),
        "few_words": folders.save_llama(root / "few_words", words=20),
        "endless": folders.save_llama(root / "endless", end=False),
        "three_labels": folders.save_bert(root / "three_labels", labels=3),
        "nan_adapter": _changed(good["adapter"], root / "nan_adapter", _poison),
        "nan_model": _changed(good["llama"], root / "nan_model", _poison),
        "partial": _changed(good["llama"], root / "partial", _drop),
        "no_weights": _changed(good["adapter"], root / "no_weights", Path.unlink),
        "cut_adapter": _changed(good["adapter"], root / "cut_adapter", _cut),
        "cut_model": _changed(good["llama"], root / "cut_model", _cut),
        "bad_config": _changed(good["adapter"], root / "bad_config", _cut_config),
    }
    (root / "bare").mkdir()
    return {**made, "bare": root / "bare"}


def _changed(source: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """A copy of a saved folder with `change` done to its file of weights."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change(next(target.glob("*.safetensors")))
    return target


V_PROJ = "layers.1.self_attn.v_proj"


def _poison(weights: Path) -> None:
    tensors = load_file(weights)
    name = next(n for n in sorted(tensors) if V_PROJ in n)
    tensors[name][1, 1] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})


def _drop(weights: Path) -> None:
    tensors = {n: t for n, t in load_file(weights).items() if V_PROJ not in n}
    save_file(tensors, weights, metadata={"format": "pt"})


def _cut(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100])


def _cut_config(weights: Path) -> None:
    weights.with_name("adapter_config.json").write_text("{")


@pytest.fixture
def hyperinf(
    site: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Run a command in an empty folder; {names} are those of `site`."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["hyperinf", *line.format(**site).split()])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        code = left.value.code
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return run


def done(ran: Ran) -> Ran:
    assert ran.code == 0, ran.err
    return ran


def tree(*roots: Path) -> list[str]:
    return sorted(str(path) for root in roots for path in root.rglob("*"))


def document(folder: str | Path) -> dict[str, Any]:
    """report.json, refused where it is not strict JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (Path(folder) / "report.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


class Scores(NamedTuple):
    """A dense parquet file: ids of both sides and the (m, n) matrix."""

    query_ids: list[str]
    train_ids: list[str]
    values: torch.Tensor


def scores(path: str | Path) -> Scores:
    table = pq.read_table(path)
    assert table.column_names[:3] == ["query_id", "train_id", "influence"]
    queries, train = (table[name].to_pylist() for name in ("query_id", "train_id"))
    query_ids, train_ids = list(dict.fromkeys(queries)), list(dict.fromkeys(train))
    assert list(zip(queries, train, strict=True)) == list(product(query_ids, train_ids))
    values = torch.tensor(table["influence"].to_pylist())
    return Scores(query_ids, train_ids, values.view(len(query_ids), len(train_ids)))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gradients(
    site: dict[str, Path], name: str, loss: str | hk.CausalLM = "causal_lm", cut: int = 100
) -> dict[str, torch.Tensor]:
    """Per-sample gradients of the rows in a file, each row on its own and so without padding."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(site["llama"])
    base = transformers.AutoModelForCausalLM.from_pretrained(site["llama"])
    model = peft.PeftModel.from_pretrained(base, site["adapter"])
    parts = []
    for row in records(site[name]):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
        batch = {
            "input_ids": torch.tensor([prompt + answer])[:, :cut],
            "labels": torch.tensor([[-100] * len(prompt) + answer])[:, :cut],
        }
        parts.append(hk.per_sample_gradients(model, batch, loss=loss))
    return {block: torch.cat([part[block] for part in parts]) for block in parts[0]}


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))


# what it computes


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


# what it writes


def test_the_report_is_strict_json_with_a_certificate_for_every_block(hyperinf: Command) -> None:
    ran = done(hyperinf(f"{SCORE} -m hyperinf -m exact --output out --json"))
    report = document("out")
    assert json.loads(ran.out) == report
    assert ran.out.count("\n") == 1
    assert "Which training examples" in ran.err
    assert report["format"] == 1
    assert report["command"] == "score"
    assert report["model"]["blocks"] == 8
    for entry in report["methods"]:
        assert entry["certificate"]["certified"] is True
        assert len(entry["blocks"]) == 8
        for block in entry["blocks"]:
            assert block["n"] == 12
            assert block["converged"] is True
            assert 0 <= block["residual"] < 1e-4
            assert block["damping"] > 0
            assert block["fallback"] is None
    assert [entry["id"] for entry in report["queries"]] == ["q0", "q1", "q2", "q3"]


class Links(HTMLParser):
    """Everything that a page could fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


@pytest.mark.parametrize(
    "command",
    [
        f"{SCORE} -m hyperinf -m grad_dot",
        "self-influence --model {llama} --adapter {adapter} --train {train}",
        f"{IDENTIFY} --adapter {{adapter}}",
        f"{MISLABELED} --adapter {{bert_adapter}} --flip 0.25",
    ],
)
def test_the_page_stands_alone(hyperinf: Command, command: str) -> None:
    done(hyperinf(f"{command} --output out"))
    page = Path("out/report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.found
    assert all(link.startswith(("#", "data:")) for link in links.found)
    assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", page)
    assert document("out")["title"] in page
    assert "lora_A" in page


@pytest.mark.parametrize("output", [".", "made", "link", "new/a/b", "brackets[/b]"])
def test_any_empty_place_will_do(hyperinf: Command, tmp_path: Path, output: str) -> None:
    (tmp_path / "made").mkdir()
    if output == ".":
        (tmp_path / "made").rmdir()
    elif output == "link":
        (tmp_path / "link").symlink_to("made")
    ran = done(hyperinf(f"{SCORE} --output {output}"))
    assert {*os.listdir(output)} == {"report.html", "report.json", "scores.parquet"}
    assert f"report: {Path(output)}/report.html" in ran.err or output == "."
    hidden = [path for path in tree(tmp_path) if "/." in path.removeprefix(str(tmp_path))]
    assert hidden == []


def test_info(hyperinf: Command) -> None:
    text = done(hyperinf("info")).out
    facts = json.loads(done(hyperinf("info --json")).out)
    assert text.startswith(f"hyperinf_kernels {hk.__version__}, torch {torch.__version__}")
    assert facts["extras"]["hf"]["transformers"] == transformers.__version__
    for op, backends in facts["ops"].items():
        assert backends["torch"] == "yes"
        assert all(answer == "yes" or answer.startswith("no: ") for answer in backends.values())
        assert re.search(rf"^{op} ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "command", ["demo", "score", "self-influence", "identify", "mislabeled", "info"]
)
def test_every_command_has_help(hyperinf: Command, command: str) -> None:
    assert "--json" in done(hyperinf(f"{command} --help")).out


# what it refuses: arguments, and what the one line must name
EARLY = [
    ("score --model {llama} --adapter {adapter} --train {root}/absent.jsonl --query {query}",
     ["absent.jsonl: cannot be read (No such file"]),
    ("score --model {llama} --adapter {adapter} --train {train} --query {root}",
     ["site", "cannot be read (Is a directory)"]),
    ("score --model {llama} --adapter {adapter} --train {empty} --query {query}",
     ["empty.jsonl: the file has no rows"]),
    ("score --model {llama} --adapter {adapter} --train {broken} --query {query}",
     ["broken.jsonl, line 3: not valid JSON"]),
    ("score --model {llama} --adapter {adapter} --train {train} --query {wanting}",
     ["wanting.jsonl, line 2", 'no field "answer"', '"reply"']),
    ("score --model {llama} --adapter {adapter} --train {train} --query {opinions}",
     ["train.jsonl holds generation rows", "opinions.jsonl holds classification rows"]),
    ("score --model {bert} --adapter {bert_adapter} --train {opinions} --query {other_label}",
     ["other_label.jsonl, row 1: label 7 is not among the training labels [0, 1]"]),
    (f"score --model {{root}}/absent --adapter {{adapter}} {GENERATION}",
     ["no model folder at", "/absent", "smollm2"]),
    (f"score --model {{bare}} --adapter {{adapter}} {GENERATION}", ["bare holds no config.json"]),
    (f"score --model {{llama}} --adapter {{root}}/absent {GENERATION}",
     ["absent is no adapter folder: it has no adapter_config.json"]),
    (f"score --model {{llama}} --adapter {{llama}} {GENERATION}", ["llama is no adapter folder"]),
    (f"score --model {{llama}} --adapter {{no_weights}} {GENERATION}",
     ["no_weights", "it has no adapter_model.safetensors"]),
    (f"score --model {{llama}} --adapter {{bad_config}} {GENERATION}",
     ["bad_config/adapter_config.json is not a JSON object"]),
    (f"score --model {{llama}} --adapter {{bert_adapter}} {GENERATION}",
     ["bert_adapter was made for SEQ_CLS, but the rows are for generation"]),
    (f"score --model {{bert}} --adapter {{adapter}} {OPINIONS}",
     ["adapter was made for CAUSAL_LM, but the rows are for classification"]),
    (f"score --model {{llama}} {GENERATION}", ["no LoRA adapter", "--adapter", "--blocks"]),
    (f"{SCORE} -m fisher", ["unknown method 'fisher'", "hyperinf, datainf"]),
    (f"{SCORE} -m hyperinf:mod=paper", ["unknown option 'mod'", "side, mode"]),
    (f"{SCORE} -m datainf:tol=1", ["unknown option 'tol'; known: none"]),
    (f"{SCORE} -m hyperinf:mode=fast", ["mode must be one of converged, paper, got 'fast'"]),
    (f"{SCORE} -m hyperinf:paper", ["'paper' is not key=value"]),
    (f"{SCORE} -m hyperinf:tol=small", ["tol must be a number, got 'small'"]),
    (f"{SCORE} -m lissa:iterations=2.5", ["iterations must be a whole number, got 2.5"]),
    (f"{SCORE} -m lissa:iterations=0", ["iterations must be at least 1, got 0"]),
    (f"{SCORE} -m exact -m exact", ["a method is asked for twice"]),
    (f"{SCORE} --damping much", ["damping 'much'", "abs:NUMBER"]),
    (f"{SCORE} --damping abs:-1", ["damping 'abs:-1'", "at least 0"]),
    (f"{SCORE} --damping 0.1+trace:nan", ["'trace:nan'"]),
    (f"{SCORE} --batch-size 0", ["--batch-size must be at least 1, got 0"]),
    (f"{SCORE} --limit 0", ["--limit must be at least 1, got 0"]),
    (f"{SCORE} --query-limit -2", ["--query-limit must be at least 1, got -2"]),
    (f"{SCORE} --top-k 0", ["--top-k must be at least 1, got 0"]),
    (f"{SCORE} --max-length -1", ["--max-length must be at least 1, got -1"]),
    (f"{SCORE} --top-k 2 --per-block", ["--per-block", "leave --top-k out"]),
    (f"{SCORE} --tokens some", ["--tokens must be one of answer, prompt, all, got 'some'"]),
    (f"{SCORE} --reduction max", ["--reduction must be one of sum, mean, got 'max'"]),
    (f"{SCORE} --seed -1", ["--seed must be at least 0"]),
    (f"{SCORE} --device cuda", ["--device cuda", "sees 0 CUDA devices"]),
    (f"{SCORE} --device abacus", ["--device abacus: choose cpu, cuda or cuda:NUMBER"]),
    (f"{SCORE} --output {{llama}}", ["llama already holds files", "--output"]),
    (f"{SCORE} --output {{train}}", ["train.jsonl is there, but is no folder"]),
    (f"{SCORE} --output {{train}}/out", ["train.jsonl/out cannot be made: Not a directory"]),
    (f"{SCORE} --output /proc/out", ["the output folder /proc/out cannot be made"]),
    ("identify --model {llama} --adapter {adapter} --train {train} --query {other_class}",
     ["query row 0: no training row has its class 'halve'"]),
    ("identify --model {llama} --adapter {adapter} --train {train} --query {classless}",
     ["query row 0 has no class", "--group-field"]),
    (f"{IDENTIFY} --epochs -1", ["--epochs", "got -1.0"]),
    (f"{IDENTIFY} --epochs nan", ["--epochs", "got nan"]),
    (f"{IDENTIFY} --epochs 1 --lora-rank 0", ["--lora-rank", "got 0"]),
    (f"{IDENTIFY} --epochs 1 --learning-rate 0", ["--learning-rate", "got 0.0"]),
    (f"{MISLABELED} --adapter {{bert_adapter}} --flip 1.5", ["in [0, 1], but is 1.5"]),
    ("demo --model {llama} --rows 0", ["--rows must be at least 1, got 0"]),
    ("demo --model {llama} --rows 5", ["no training row has its class 'negation'"]),
    ("demo --model {llama} --queries -1", ["--queries must be at least 1, got -1"]),
]  # fmt: skip
LATE = [
    ("score --model {llama} --adapter {adapter} --train {train} --query {long}",
     ["row huge has 52 tokens, the model takes 32", "--max-length 32"]),
    (f"{SCORE} --max-length 3", ["row t0: cut to 3 tokens it has no answer left", "--max-length"]),
    (f"score --model {{llama}} --adapter {{wide_adapter}} {GENERATION}",
     ["wide_adapter does not fit this model", "size mismatch", "[2, 24]"]),
    (f"score --model {{llama}} --adapter {{thin_adapter}} {GENERATION}",
     ["thin_adapter does not fit this model: it lacks", "layers.1.self_attn.q_proj.lora_A"]),
    (f"score --model {{llama}} --adapter {{deep_adapter}} {GENERATION}",
     ["deep_adapter does not fit this model: it has", "layers.2.self_attn.q_proj.lora_A"]),
    (f"score --model {{llama}} --adapter {{cut_adapter}} {GENERATION}", ["cut_adapter"]),
    (f"score --model {{cut_model}} --adapter {{adapter}} {GENERATION}",
     ["cannot load the model in", "cut_model"]),
    (f"score --model {{partial}} --adapter {{adapter}} {GENERATION}",
     ["partial is no whole causal language model", f"{V_PROJ}.weight"]),
    (f"score --model {{bert}} --blocks query {GENERATION}",
     ["bert is no whole causal language model"]),
    (f"score --model {{three_labels}} --blocks query {OPINIONS}",
     ["three_labels do not fit: classifier.", "the training rows have 2 labels"]),
    (f"score --model {{few_words}} --adapter {{adapter}} {GENERATION}",
     ["row t0 has token number", "the model knows 20", "tokenizer of another model"]),
    (f"score --model {{endless}} --adapter {{adapter}} {GENERATION}",
     ["endless has no end-of-text token"]),
    (f"score --model {{llama}} --adapter {{nan_adapter}} {GENERATION}",
     [f"{V_PROJ}.lora_A", "NaN"]),
    (f"score --model {{llama}} --adapter {{nan_adapter}} -m exact -m datainf {GENERATION}",
     [f"{V_PROJ}.lora_A", "NaN"]),
    (f"mislabeled --model {{llama}} --adapter {{nan_adapter}} {GENERATION}",
     [f"{V_PROJ}.lora_A", "NaN"]),
    ("self-influence --model {llama} --adapter {nan_adapter} --train {train}",
     [f"{V_PROJ}.lora_A", "NaN"]),
    (f"score --model {{nan_model}} --adapter {{adapter}} {GENERATION}", [V_PROJ, "NaN"]),
    (f"score --model {{llama}} --adapter {{untrained}} {GENERATION}",
     ["lora_A", "every training gradient is zero", "untrained"]),
    (f"score --model {{llama}} --adapter {{untrained}} -m exact -m datainf {GENERATION}",
     ["lora_A", "every training gradient is zero", "untrained"]),
    (f"{SCORE} --limit 3 --damping abs:0", ["block ", "singular", "damping"]),
    (f"{SCORE} --damping abs:0 -m exact -m hyperinf", ["block ", "needs a positive one"]),
    (f"{SCORE} --blocks [", ["blocks='[' is not a regular expression"]),
    (f"{SCORE} --blocks absent", ["blocks='absent' matches none"]),
    (f"{IDENTIFY} --epochs 1 --lora-target absent", ["cannot tune this model", "absent"]),
]  # fmt: skip


def refused(hyperinf: Command, line: str, parts: list[str], *watched: Path) -> None:
    """One line that says why, exit code 2, and everything as it was."""
    before = tree(*watched)
    ran = hyperinf(line)
    assert ran.code == 2, ran
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert all(part in ran.err for part in parts), ran.err
    assert tree(*watched) == before


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("the model was loaded for input that is bad on its face")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.mark.parametrize(("line", "parts"), EARLY)
def test_refused_before_the_model_is_loaded(
    hyperinf: Command, site: dict[str, Path], tmp_path: Path, never_loads: None, line: str,
    parts: list[str],
) -> None:  # fmt: skip
    refused(hyperinf, line, parts, tmp_path, site["root"])


@pytest.mark.parametrize(("line", "parts"), LATE)
def test_refused_with_nothing_left_behind(
    hyperinf: Command, site: dict[str, Path], tmp_path: Path, line: str, parts: list[str]
) -> None:
    refused(hyperinf, line, parts, tmp_path, site["root"])


def test_an_unknown_backend_is_refused(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "abacus")
    refused(hyperinf, SCORE, ["HYPERINF_BACKEND='abacus'", "torch"], tmp_path)


def test_ids_with_line_breaks_stay_on_the_one_line(hyperinf: Command, tmp_path: Path) -> None:
    long = {"id": "a\nb", "prompt": "one " * 50, "answer": "two"}
    folders.write_lines(tmp_path / "odd.jsonl", [long])
    refused(
        hyperinf, "score --model {llama} --adapter {adapter} --train {train} --query odd.jsonl",
        ["row a b has 52 tokens"], tmp_path,
    )  # fmt: skip


def test_tuning_without_its_package_names_the_extra(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(name: str) -> object:
        return None if name == "accelerate" else object()

    monkeypatch.setattr(models, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find)))
    refused(
        hyperinf, f"{IDENTIFY} --epochs 1",
        ["accelerate is not installed: pip install 'hyperinf_kernels[hf]'"], tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("line", ["score", "score --nothing", "nothing", f"{SCORE} --top-k two"])
def test_usage_errors(hyperinf: Command, tmp_path: Path, line: str) -> None:
    ran = hyperinf(line)
    assert ran.code == 2
    assert ran.out == ""
    assert "Error" in ran.err
    assert "Traceback" not in ran.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output", ["out", "new/a/out", "made"])
@pytest.mark.parametrize(
    ("trouble", "code", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
    ],
)
def test_trouble_while_writing_leaves_nothing(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str,
    trouble: BaseException, code: int, line: str,
) -> None:  # fmt: skip
    (tmp_path / "made").mkdir()

    def write(path: Path, document: Any) -> None:
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise trouble

    monkeypatch.setattr(jobs, "write_json", write)
    ran = hyperinf(f"{SCORE} --output {output}")
    assert ran.code == code
    assert ran.err == f"{line}\n"
    assert tree(tmp_path) == [str(tmp_path / "made")]


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_the_longest_input_that_is_let_through_runs(family: str) -> None:
    config = getattr(transformers, f"{family}Config")(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=20, pad_token_id=1,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    longest = models.position_limit(model)
    assert longest == {"Bert": 20, "Roberta": 18}[family]
    assert model(torch.full((1, longest), 3)).logits.shape == (1, 2)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 3))


# in a process of its own


def start(line: str, site: dict[str, Path], folder: Path, stderr: int, **more: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "hyperinf_kernels", *line.format(**site).split()],
        cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment,
    )  # fmt: skip


def test_stdout_is_one_json_document_whatever_the_libraries_say(
    site: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{**row, "id": f"é{i}"} for i, row in enumerate(folders.sums(8, "t"))]
    folders.write_lines(tmp_path / "train.jsonl", rows)
    line = "identify --model {llama} --train train.jsonl --query {query} --epochs 2 --batch-size 4"
    process = start(
        f"{line} -m exact --output out --json", site, tmp_path, subprocess.PIPE,
        PYTHONIOENCODING="ascii:backslashreplace",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out) == document(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "train.jsonl"]
    assert "Warning" not in err


def test_stderr_is_one_line_whatever_the_libraries_say(
    site: dict[str, Path], tmp_path: Path
) -> None:
    line = f"score --model {{llama}} --adapter {{thin_adapter}} {GENERATION}"
    process = start(line, site, tmp_path, subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"error: the adapter in \S+ does not fit this model: it lacks \S+\n", err)
    assert os.listdir(tmp_path) == []


def terminal_text(handle: int) -> Iterator[str]:
    """What has come to a terminal so far, again after every piece, until it is closed."""
    text = ""
    while True:
        try:
            piece = os.read(handle, 4096)
        except OSError:  # how Linux tells that the other side is closed
            return
        if not piece:
            return
        text += piece.decode(errors="replace")
        yield text


def test_an_interrupt_in_the_middle(site: dict[str, Path], tmp_path: Path) -> None:
    folders.write_lines(tmp_path / "train.jsonl", folders.sums(20_000, "t"))
    near, far = pty.openpty()
    process = start(
        "score --model {llama} --adapter {adapter} --train train.jsonl --query {query} "
        "--batch-size 1 --output new/out",
        site, tmp_path, far, TERM="xterm", COLUMNS="120",
    )  # fmt: skip
    os.close(far)
    signalled, text = False, ""
    for text in terminal_text(near):
        if not signalled and re.search(r"training gradients.* \d+/20000", text):
            process.send_signal(signal.SIGINT)
            signalled = True
    os.close(near)
    assert signalled, text
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    assert "interrupted; nothing was written" in text
    assert "Traceback" not in text
    assert os.listdir(tmp_path) == ["train.jsonl"]

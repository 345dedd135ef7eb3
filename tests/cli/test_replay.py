"""A finished run once more, and options from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import folders

from .command import GENERATION, IDENTIFY, MISLABELED, SCORE, Command, document, done, records


@pytest.mark.parametrize(
    "line",
    [
        f"{SCORE} -m hyperinf:mode=paper -m exact --damping 0.3 --batch-size 5 --limit 9 --seed 4 "
        "--tokens answer --tokens all",
        f"{SCORE} --top-k 3",
        f"{IDENTIFY} --epochs 1 --lora-rank 3 --lora-alpha 7 --seed 5 -m datainf",
        f"{MISLABELED} --flip 0.25 --epochs 1 --no-rslora -m grad_dot",
        "self-influence --model {llama} --adapter {adapter} --train {train} -m exact",
        f"{SCORE.replace('score', 'select', 1)} --share 0.3",
        "demo --model {llama} --rows 20 --queries 10 --epochs 1 -m grad_dot",
    ],
)
def test_a_run_comes_out_the_same(hyperinf: Command, line: str) -> None:
    done(hyperinf(f"{line} --output first"))
    before = sorted(os.listdir("."))
    ran = done(hyperinf("replay first --json"))
    assert sorted(os.listdir(".")) == before
    found = json.loads(ran.out)
    assert found["changed"] == []
    names = sorted(path.name for path in Path("first").glob("*.parquet"))
    assert [entry["file"] for entry in found["scores"]] == names
    for entry in found["scores"]:
        assert entry["pairs"] == pq.read_table(Path("first") / entry["file"]).num_rows > 0
        assert (entry["differing"], entry["largest"]) == (0, 0.0)
        assert f"{entry['file']}: all {entry['pairs']} scores are the same" in ran.err


def test_what_differs_is_said(hyperinf: Command, site: dict[str, Path], tmp_path: Path) -> None:
    rows = records(site["train"])
    folders.write_lines(tmp_path / "mine.jsonl", rows)
    line = SCORE.replace("{train}", "mine.jsonl")
    done(hyperinf(f"{line} -m grad_dot --output first"))
    # one score of the file, changed by hand
    path = Path("first/scores.parquet")
    table = pq.read_table(path)
    values = table["influence"].to_pylist()
    largest = max(map(abs, values))
    values[7] += 2 * largest
    changed = table.set_column(2, "influence", pa.array(values, pa.float32()))
    pq.write_table(changed, path)
    ran = hyperinf("replay first --json")
    assert ran.code == 1
    (entry,) = json.loads(ran.out)["scores"]
    assert (entry["pairs"], entry["differing"], entry["missing"]) == (48, 1, 0)
    assert entry["largest"] == pytest.approx(2 * largest, rel=1e-6)
    assert "1 of 48 scores differ" in ran.err
    # a row more, and another first one
    pq.write_table(table, path)
    rows[0]["answer"] = "seven seven seven"
    folders.write_lines(tmp_path / "mine.jsonl", [*rows, {**rows[1], "id": "more"}])
    ran = hyperinf("replay first --output second --json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["changed"] == ["train mine.jsonl: changed since then"]
    assert "train mine.jsonl: changed since then" in ran.err
    (entry,) = found["scores"]
    # every query meets the changed row and the new one
    assert (entry["differing"], entry["missing"]) == (8, 4)
    assert document("second")["data"]["train"]["rows"] == 13


def test_the_request_is_whole(hyperinf: Command, site: dict[str, Path]) -> None:
    done(hyperinf(f"{SCORE} -m exact --damping abs:2 --batch-size 3 --output out"))
    report = document("out")
    request = report["request"]
    wanted = {"model": str(site["llama"]), "adapter": str(site["adapter"]), "method": ["exact"],
              "train": [str(site["train"])], "query": [str(site["query"])], "damping": ["abs:2"],
              "batch_size": 3, "output": "out", "top_k": None}  # fmt: skip
    assert {name: request[name] for name in wanted} == wanted
    prints = report["fingerprints"]
    assert set(prints) == {"model", "adapter", f"train {site['train']}", f"query {site['query']}"}
    assert len(set(prints.values())) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "report.json: cannot be read (No such file"),
        ("{", "report.json is damaged"),
        ('{"format": 1}', "does not hold its run's request"),
        ('{"command": "score", "request": {"modle": 1}}', "has no option 'modle'"),
        (
            '{"command": "score", "request": {"train": ["-"], "output": "x"}}',
            "the rows of old came from standard input",
        ),
    ],
)
def test_what_cannot_be_run_again(
    hyperinf: Command, tmp_path: Path, content: str | None, said: str
) -> None:
    (tmp_path / "old").mkdir()
    if content is not None:
        (tmp_path / "old/report.json").write_text(content)
    ran = hyperinf("replay old")
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert said in ran.err


def test_a_file_of_options_is_as_good_as_typing(
    hyperinf: Command, site: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model: {site['llama']}\nadapter: {site['adapter']}\ntrain: {site['train']}\n"
        f"query: [{site['query']}]\nmethod:\n- exact\n- datainf\nbatch-size: 5\ntop_k: 2\n"
        "damping: 0.3\noutput: named\n"
    )
    done(hyperinf("score --config run.yaml"))
    done(
        hyperinf(
            f"{SCORE} -m exact -m datainf --batch-size 5 --top-k 2 --damping 0.3 --output typed"
        )
    )
    assert pq.read_table("named/scores.parquet") == pq.read_table("typed/scores.parquet")
    named, typed = (document(folder)["request"] for folder in ("named", "typed"))
    assert named | {"output": "typed"} == typed
    # what is typed wins
    done(hyperinf("score --config run.yaml -m grad_dot --output again"))
    assert [entry["method"] for entry in document("again")["methods"]] == ["Gradient dot"]
    assert document("again")["request"]["batch_size"] == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "run.yaml: cannot be read (No such file"),
        ("modle: x", "run.yaml: score has no option 'modle'; its options: adapter, answer_field"),
        ("epochs: 3", "score has no option 'epochs'"),
        ("config: other.yaml", "score has no option 'config'"),
        ("- a", "run.yaml: give one option a line"),
        ("a: [", "run.yaml: not YAML"),
    ],
)
def test_files_of_options_that_are_refused(
    hyperinf: Command, tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    ran = hyperinf(f"score --model x {GENERATION} --config run.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert said in ran.err


def test_a_value_of_the_wrong_kind_is_a_usage_error(hyperinf: Command, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("top_k: two")
    ran = hyperinf(f"{SCORE} --config run.yaml")
    assert ran.code == 2
    assert "Invalid value for '--top-k'" in ran.err

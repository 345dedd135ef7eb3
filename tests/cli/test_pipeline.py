"""Rows from pipes, output to places that take none, names with markup and terminal escapes."""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from hyperinf_kernels.cli import app as commands
from hyperinf_kernels.workloads import files as row_files
from hyperinf_kernels.workloads.files import same_source
from hyperinf_kernels.workloads.rows import Fields
from tests import folders

from .command import GENERATION, ROOT, SCORE, Command, document, done, scores

HOSTILE = "\x1b[31m\x07</script><script>alert(1)</script>\x9b2J"
MODEL = "--model {llama} --adapter {adapter}"


def process(line: str, site: dict[str, Path]) -> list[str]:
    return [sys.executable, "-m", "hyperinf_kernels", *line.format(**site).split()]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_rows_from_a_pipe_are_read_once_and_kept(
    site: dict[str, Path], tmp_path: Path, hyperinf: Command, name: str
) -> None:
    done(hyperinf(f"self-influence {MODEL} --train {{train}} --output file"))
    ran = subprocess.run(
        process(f"self-influence {MODEL} --train {name} --output pipe", site),
        input=site["train"].read_bytes(), capture_output=True, cwd=tmp_path, env=environment(),
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    wanted, found = (scores(tmp_path / folder / "scores.parquet") for folder in ("file", "pipe"))
    assert found.train_ids == wanted.train_ids
    assert found.values.equal(wanted.values)


def test_a_named_pipe_on_both_sides_is_one_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows")
    (tmp_path / "link").symlink_to("rows")
    assert same_source(str(tmp_path / "rows"), str(tmp_path / "link"))
    assert same_source("-", "/dev/stdin")
    assert not same_source(str(tmp_path / "rows"), str(tmp_path / "absent"))


def test_an_empty_pipe_is_refused_by_name(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "open", lambda *_, **__: io.BytesIO(), raising=False)
    ran = hyperinf(f"show {MODEL} --train -")
    assert (ran.code, ran.err) == (2, "error: standard input: it has no rows\n")


def test_every_command_that_reads_rows_has_the_same_options() -> None:
    readers = {}
    for command in commands.app.registered_commands:
        assert command.callback is not None
        names = set(inspect.signature(command.callback).parameters)
        if "train" in names:
            readers[command.callback.__name__] = names
    assert {"score", "fit", "self_influence", "plan", "show", "mislabeled"} <= set(readers)
    fields = {f"{name}_field" for name in Fields.__dataclass_fields__}
    for command_name, names in readers.items():
        assert fields | {"limit", "max_length"} <= names, command_name
        assert ("query" in names) == ("query_limit" in names), command_name


def test_renamed_fields_reach_self_influence(hyperinf: Command, tmp_path: Path) -> None:
    renamed = [{"q": r["prompt"], "a": r["answer"], "n": r["id"]} for r in folders.sums(6, "t")]
    folders.write_lines(tmp_path / "rows.jsonl", renamed)
    names = "--prompt-field q --answer-field a --id-field n"
    done(hyperinf(f"self-influence {MODEL} --train rows.jsonl {names} --output out"))
    assert scores("out/scores.parquet").train_ids == [f"t{i}" for i in range(6)]


def test_show_prints_what_the_model_sees(hyperinf: Command) -> None:
    (row,) = json.loads(done(hyperinf(f"show {MODEL} --train {{train}} --row t1 --json")).out)[
        "rows"
    ]
    assert row["id"] == "t1"
    assert row["tokens"][:2] == ["take", row["tokens"][1]]
    given = len(folders.sums(2, "t")[1]["prompt"].split())
    assert row["loss"] == [False] * given + [True] * (len(row["tokens"]) - given)
    assert row["tokens"][-1] == "<end>"
    text = done(hyperinf(f"show {MODEL} --train {{train}} --limit 2 --tokens all")).out
    assert text.count("row t") == 2
    assert "  LOSS  [" in text
    ran = hyperinf(f"show {MODEL} --train {{train}} --row absent")
    assert ran.code == 2
    assert "has no row of this id" in ran.err


def test_the_tokenizer_of_the_adapter_is_taken_first(
    hyperinf: Command, site: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(site["adapter"], tmp_path / "tuned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(site["llama"])
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "tuned")
    line = "show --model {llama} --adapter tuned --train {train} --limit 1 --json"
    (row,) = json.loads(done(hyperinf(line)).out)["rows"]
    assert row["tokens"][-1] == "[SEP]"
    done(hyperinf(f"score --model {{llama}} --adapter tuned {GENERATION} --output out"))
    done(hyperinf(f"{SCORE} --output plain"))
    assert not scores("out/scores.parquet").values.equal(scores("plain/scores.parquet").values)


def test_the_terminal_shows_no_escape_of_a_row(hyperinf: Command, tmp_path: Path) -> None:
    rows = [
        {"id": f"{HOSTILE}{i}", "prompt": HOSTILE + " add", "answer": HOSTILE} for i in range(3)
    ]
    folders.write_lines(tmp_path / "odd.jsonl", rows)
    long = [{"id": HOSTILE, "prompt": "one " * 50, "answer": "two"}]
    folders.write_lines(tmp_path / "long.jsonl", long)
    for line in (
        f"score {MODEL} --train {{train}} --query odd.jsonl --output out",
        f"show {MODEL} --train odd.jsonl",
        f"score {MODEL} --train {{train}} --query long.jsonl",
    ):
        ran = hyperinf(line)
        assert not {"\x1b", "\x07", "\x9b"} & set(ran.out + ran.err), line
    assert "\\x1b[31m" in ran.err
    assert [q["id"] for q in document("out")["queries"]] == [r["id"] for r in rows]


@pytest.mark.parametrize(
    "command", [f"show {MODEL} --train {{train}}", f"plan {MODEL} {GENERATION} --json"]
)
def test_a_full_device_is_one_line(site: dict[str, Path], tmp_path: Path, command: str) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            process(command, site), stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=tmp_path, env=environment(), check=False,
        )  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("error: No space left on device")
    assert "Traceback" not in ran.stderr


def test_output_closed_early_is_no_traceback(site: dict[str, Path], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(
        process(f"show {MODEL} --train {{train}} --limit 12", site), stdout=writing,
        stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment(), check=False,
    )  # fmt: skip
    os.close(writing)
    assert ran.returncode != 0
    assert "Traceback" not in ran.stderr
    assert "Exception ignored" not in ran.stderr


def test_another_locale_and_forty_columns(site: dict[str, Path], tmp_path: Path) -> None:
    rows = [{**row, "id": f"é天{i}"} for i, row in enumerate(folders.sums(6, "t"))]
    folders.write_lines(tmp_path / "zeilen-ü.jsonl", rows)
    line = f"score {MODEL} --train zeilen-ü.jsonl --query {{query}} --output out-é"
    ran = subprocess.run(
        process(line, site), capture_output=True, cwd=tmp_path, check=False,
        stdin=subprocess.DEVNULL,
        env=environment(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0", COLUMNS="40"),
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert scores(tmp_path / "out-é" / "scores.parquet").train_ids == [r["id"] for r in rows]
    assert document(tmp_path / "out-é")["data"]["train"]["source"] == "zeilen-ü.jsonl"
    assert max(len(text) for text in ran.stderr.splitlines() if b"report:" not in text) <= 120

"""What a command writes and prints."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import hyperinf_kernels as hk
from hyperinf_kernels.ops import native
from hyperinf_kernels.ops.triton import aot

from .command import (
    IDENTIFY,
    MISLABELED,
    SCORE,
    Command,
    document,
    done,
    tree,
)


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
    "command",
    ["demo", "score", "fit", "plan", "self-influence", "identify", "mislabeled", "select", "info"],
)
def test_every_command_has_help(hyperinf: Command, command: str) -> None:
    assert "--json" in done(hyperinf(f"{command} --help")).out


def test_bench_lists_every_gpu_kernel_as_compiled(
    hyperinf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "kernel": "product", "arch": "sm_90", "config": {"precision": "tf32"}, "registers": 90,
        "spill_bytes": 0, "shared_bytes": 4096, "compile_s": 0.5, "instructions": {},
    }  # fmt: skip
    monkeypatch.setattr(aot, "rows", lambda: iter([row]))
    monkeypatch.setattr(aot, "total", lambda: 1)
    built = native.build_info()
    compiled = [] if isinstance(built, str) else built["cuda_kernels"]
    ran = done(hyperinf("bench --aot --json"))
    kernels = json.loads(ran.out)["kernels"]
    assert kernels[0] == {"backend": "triton", **row}
    assert [entry["kernel"] for entry in kernels[1:]] == [entry["kernel"] for entry in compiled]
    assert all(set(row) <= set(entry) for entry in kernels)
    assert "product" in ran.err


def test_the_plan_is_printed_before_anything_runs(
    hyperinf: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyperinf_kernels.attribution.stream.gradient_batches", None)
    monkeypatch.setattr("hyperinf_kernels.runs.scoring.gradient_batches", None)
    methods = "-m hyperinf -m datainf -m exact -m cg -m lissa -m grad_dot"
    ran = done(hyperinf(SCORE.replace("score", "plan", 1) + f" {methods} --json"))
    plan = json.loads(ran.out)
    assert (plan["command"], plan["train"], plan["queries"]) == ("plan", 12, 4)
    assert [len(entry["blocks"]) for entry in plan["methods"]] == [8] * 6
    routes = {entry["label"]: {b["route"] for b in entry["blocks"]} for entry in plan["methods"]}
    # 12 rows of rank 4 and 4 queries
    assert routes["DataInf"] == routes["Exact"] == routes["CG"] == routes["LiSSA"] == {"gram"}
    assert routes["Gradient dot"] == {"rows"}
    assert "12 training rows, 4 queries" in ran.err
    for entry in plan["methods"]:
        assert entry["seconds"] == pytest.approx(sum(b["seconds"] for b in entry["blocks"]))
        assert entry["seconds"] > 0
        assert entry["kept_bytes"] >= sum(4 * 12 * r * d for r, d in _shapes(entry)) * (
            entry["label"] != "HyperINF converged"
        )
    assert not list(Path().iterdir())


def _shapes(entry: dict[str, Any]) -> list[list[int]]:
    return [block["shape"] for block in entry["blocks"]]


def test_a_method_without_a_cost_model_has_no_plan(hyperinf: Command) -> None:
    ran = hyperinf(SCORE.replace("score", "plan", 1) + " -m ekfac")
    assert ran.code == 2
    assert ran.err.splitlines()[-1] == "error: ekfac has no cost model, so no plan"

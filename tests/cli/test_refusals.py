"""What is refused: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from hyperinf_kernels.jobs import results
from hyperinf_kernels.store import files
from hyperinf_kernels.workloads import models
from tests import folders

from .command import (
    GENERATION,
    IDENTIFY,
    MISLABELED,
    OPINIONS,
    SCORE,
    V_PROJ,
    Command,
    tree,
)

# arguments, and what the one line must name
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
    ("plan --model {llama} --adapter {adapter} --train {train} --query {query} -m lissa:tol=0",
     ["tol must be positive and finite, got 0"]),
    (f"{SCORE} -m exact -m exact", ["a method is asked for twice"]),
    (f"{SCORE} --damping much", ["damping 'much'", "abs:NUMBER"]),
    (f"{SCORE} --damping abs:-1", ["damping 'abs:-1'", "at least 0"]),
    (f"{SCORE} --damping 0.1+trace:nan", ["'trace:nan'"]),
    (f"{SCORE} --batch-size 0", ["--batch-size must be at least 1, got 0"]),
    (f"{SCORE} --limit 0", ["--limit must be at least 1, got 0"]),
    (f"{SCORE} --query-limit -2", ["--query-limit must be at least 1, got -2"]),
    (f"{SCORE} --top-k 0", ["--top-k must be at least 1, got 0"]),
    (f"{SCORE} --max-length -1", ["--max-length must be at least 1, got -1"]),
    (f"{SCORE} --fitted {{root}}/absent", ["absent holds no saved attributor"]),
    (f"{SCORE} --fitted {{llama}} -m exact", ["--fitted brings its method", "leave --method"]),
    (f"{SCORE} --fitted {{llama}} --damping 1", ["--fitted brings its method, damping"]),
    (f"{SCORE.replace('score', 'select', 1)} --share 0", ["--share must be over 0", "got 0"]),
    (f"{SCORE.replace('score', 'select', 1)} --share 1.5", ["at most 1, got 1.5"]),
    ("fit --model {llama} --adapter {adapter} --train {train} --output {llama}",
     ["llama exists already; choose a new folder"]),
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
    ("bench --tune", ["tuning needs a CUDA device"]),
    ("bench --tune --aot", ["choose one of --calibrate, --aot and --tune"]),
    ("bench --write", ["--write goes with --tune"]),
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

    monkeypatch.setattr(results, "write_json", write)
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

"""Models, adapters and rows on disk, and a command that runs beside them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from hyperinf_kernels import cli
from tests import folders

from .command import (
    V_PROJ,
    Command,
    Ran,
)


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

"""Command lines, and readers of what a command left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pyarrow.parquet as pq
import torch
import transformers

import hyperinf_kernels as hk

ROOT = Path(__file__).resolve().parents[2]
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

V_PROJ = "layers.1.self_attn.v_proj"


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

"""Sequence to sequence: `{"source": ..., "target": ...}` for a model with encoder and decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..gradients import Loss
from ..gradients.losses import IGNORED, widened
from . import tokens as token_rows
from .protocol import Example, ModelKind, Workload
from .rows import Record, Row, shown


class TargetLoss:
    """Cross-entropy of every target token, summed or averaged over the tokens of one row.

    The model makes its decoder's inputs from the labels, as it does in training.
    """

    def __init__(self, reduction: str = "sum") -> None:
        if reduction not in ("sum", "mean"):
            raise InputError(f"--reduction must be one of sum, mean, got {reduction!r}")
        self.reduction = reduction

    def __str__(self) -> str:
        return f"sequence to sequence, {self.reduction} per example"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        names = ("input_ids", "attention_mask", "labels")
        logits = widened(model(**{name: batch[name] for name in names}, use_cache=False).logits)
        labels = batch["labels"]
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        total = losses.sum(1)
        return total / (labels != IGNORED).sum(1) if self.reduction == "mean" else total


@dataclass(frozen=True)
class Seq2Seq:
    """A source text for the encoder and the target that the decoder is to write."""

    name = "seq2seq"
    forms = (("source", "target"),)
    unit = "accuracy on the queries"
    model = ModelKind("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "sequence-to-sequence model")

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"source": record.text("source"), "target": record.text("target", numbers=True)}

    def settled(self, train: Sequence[Row]) -> Workload:
        return self

    def check(self, rows: Sequence[Row]) -> None:
        """Any row goes with any other."""

    def losses(self, tokens: Sequence[str], reduction: str) -> dict[str, Loss]:
        for t in tokens:
            if t != "answer":
                raise InputError(f"--tokens {t}: the loss of these rows is on the target (answer)")
        return {"answer": TargetLoss(reduction)}

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        model: nn.Module | None = None,
        max_length: int | None = None,
    ) -> list[Example]:
        limits, examples = token_rows.Limits.of(model, max_length), []
        for row in rows:
            ids = limits.cut(row.id, tokenizer(row.content["source"])["input_ids"])
            labels = tokenizer(text_target=row.content["target"])["input_ids"]
            if labels[-1:] != [tokenizer.eos_token_id]:
                labels = [*labels, tokenizer.eos_token_id]
            labels = limits.cut(row.id, labels)
            columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            examples.append(Example(row.id, columns, len(ids) + len(labels)))
        return examples

    def seen(self, example: Example, tokenizer: Any, loss: Loss) -> dict[str, Any]:
        target = token_rows.named(example.columns["labels"], tokenizer)
        return {**token_rows.seen(example, tokenizer), "target": target}

    def collate(self, examples: Sequence[Example], pad_token: int) -> dict[str, Any]:
        return token_rows.pad(examples, pad_token)

    def cut(self, batch: Mapping[str, Any], row: int) -> dict[str, Any]:
        return token_rows.cut(batch, row)

    def observed(self, row: Row) -> int | str | None:
        return row.group

    @torch.no_grad()
    def skill(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """Share of rows of which every target token is the likeliest after those before it."""
        return token_rows.answered_right(model, batches, shift=False)

    def show(self, row: Row) -> dict[str, str | None]:
        return shown(row, row.content["source"], row.content["target"])

"""Classification: `{"text": ..., "label": ...}`, a label being a whole number or text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..gradients import Loss, SequenceClassification
from . import tokens as token_rows
from .encoding import Encoder
from .protocol import Example, ModelKind
from .rows import Record, Row, shown


@dataclass(frozen=True)
class Classification:
    """A text of one class; `classes` are the labels of all training rows, in order."""

    classes: tuple[int | str, ...] = ()

    name = "classification"
    forms = (("text", "label"),)
    unit = "accuracy on the queries"

    @property
    def model(self) -> ModelKind:
        """A classifier's head may be new."""
        return ModelKind("AutoModelForSequenceClassification", "SEQ_CLS", None, "pad_token",
                         len(self.classes) or 2)  # fmt: skip

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        label = record.label()
        if first is not None and type(label) is not type(first["label"]):
            raise record.refused("label", "is text in one row, a number in another")
        return {"text": record.text("text"), "label": label}

    def settled(self, train: Sequence[Row]) -> Classification:
        found = {row.content["label"] for row in train}
        return replace(self, classes=tuple(sorted(found, key=_by_type)))

    def check(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.content["label"] not in self.classes:
                raise InputError(
                    f"row {row.id}: label {row.content['label']!r} is not among the training "
                    f"labels {list(self.classes)[:10]}"
                )

    def losses(self, tokens: Sequence[str], reduction: str) -> dict[str, Loss]:
        """One: a row has one label, and no tokens to choose among."""
        for t in tokens:
            if t != "answer":
                raise InputError(f"--tokens {t}: the loss of these rows is on the label (answer)")
        return {"": SequenceClassification()}

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        model: nn.Module | None = None,
        max_length: int | None = None,
    ) -> list[Example]:
        limits, encoder = token_rows.Limits.of(model, max_length), Encoder(tokenizer)
        class_of = {label: i for i, label in enumerate(class_order(model, self.classes))}
        examples = []
        for row in rows:
            ids = limits.cut(row.id, encoder.text(row.content["text"]).ids)
            columns = {"input_ids": ids, "attention_mask": [1] * len(ids),
                       "labels": class_of[row.content["label"]]}  # fmt: skip
            examples.append(Example(row.id, columns, len(ids)))
        return examples

    def seen(self, example: Example, tokenizer: Any, loss: Loss) -> dict[str, Any]:
        return {**token_rows.seen(example, tokenizer), "class": example.columns["labels"]}

    def collate(self, examples: Sequence[Example], pad_token: int) -> dict[str, Any]:
        return token_rows.pad(examples, pad_token)

    def cut(self, batch: Mapping[str, Any], row: int) -> dict[str, Any]:
        return token_rows.cut(batch, row)

    def observed(self, row: Row) -> int | str | None:
        return row.content["label"]

    @torch.no_grad()
    def skill(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """Share of rows whose label is the likeliest."""
        model.eval()
        right = total = 0
        for batch in batches:
            inputs = token_rows.to_device(batch, model)
            labels = inputs.pop("labels")
            hits = model(**inputs).logits.argmax(-1) == labels
            right, total = right + int(hits.sum()), total + len(hits)
        return right / total

    def show(self, row: Row) -> dict[str, str | None]:
        return shown(row, row.content["text"], row.content["label"])


def class_order(model: nn.Module | None, labels: Sequence[int | str]) -> Sequence[int | str]:
    """The labels in the order of the model's own `label2id` where it names these very labels."""
    known = getattr(getattr(model, "config", None), "label2id", None) or {}
    if labels and set(map(str, known)) == set(map(str, labels)):
        place = {str(name): index for name, index in known.items()}
        return sorted(labels, key=lambda label: place[str(label)])
    return labels


def _by_type(label: int | str) -> tuple[bool, Any]:
    return isinstance(label, str), label

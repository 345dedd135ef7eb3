"""Prompted text: `{"prompt": ..., "answer": ...}`, the loss on the answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..gradients.losses import IGNORED
from .causal import Causal, Labelled
from .encoding import Encoder, warn_of_difference, warn_of_merged
from .rows import Record, Row, shown

# rows whose tokens are compared with those that the tokenizer makes of their text
COMPARED = 16


@dataclass(frozen=True)
class Prompted(Causal):
    """Prompt, blank, answer and end of text, tokenised as one; a label names the class."""

    name = "generation"
    forms = (("prompt", "answer"),)

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        label = record.get("label")
        labelled = {} if label is None else {"label": record.label()}
        return {"prompt": record.text("prompt"), "answer": record.text("answer", numbers=True),
                **labelled}  # fmt: skip

    def labelled(self, rows: Sequence[Row], tokenizer: Any) -> Iterator[Labelled]:
        encoder = Encoder(tokenizer, tokenizer.eos_token_id)
        merged: dict[str, int] = {}
        first: list[list[int]] = []
        for row in rows:
            try:
                tokens = encoder.pair(row.content["prompt"], row.content["answer"])
            except InputError as error:
                raise InputError(f"row {row.id}: {error}") from None
            ids, start = tokens.ids, tokens.answer
            if tokens.merged:
                merged[row.id] = ids[start]
            if len(first) < COMPARED:
                first.append(ids)
            yield Labelled(ids, [IGNORED] * start + ids[start:])
        if merged:
            (token,) = tokenizer.convert_ids_to_tokens([next(iter(merged.values()))])
            warn_of_merged(list(merged), str(token))
        texts = [(row.id, row.content["prompt"], row.content["answer"]) for row in rows[:COMPARED]]
        warn_of_difference(encoder, texts, first)

    def show(self, row: Row) -> dict[str, str | None]:
        return shown(row, row.content["prompt"], row.content["answer"])

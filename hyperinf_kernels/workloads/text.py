"""Plain text: `{"text": ...}`, as in continued pretraining; the loss is on all tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..gradients import CausalLM
from .causal import Causal, Labelled
from .encoding import Encoder
from .rows import Record, Row, shown
from .tokens import to_device


@dataclass(frozen=True)
class Text(Causal):
    """The text's tokens and the end of text, each predicted from those before it."""

    name = "text"
    forms = (("text",),)
    unit = "perplexity on the queries"
    choices = ("answer", "all")  # the same tokens

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"text": record.text("text")}

    def labelled(self, rows: Sequence[Row], tokenizer: Any) -> Iterator[Labelled]:
        encoder = Encoder(tokenizer)
        for row in rows:
            ids = encoder.text(row.content["text"]).ids
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            yield Labelled(ids, ids)

    @torch.no_grad()
    def skill(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """exp of the mean loss over all predicted tokens."""
        model.eval()
        loss = CausalLM("all")
        total, count = 0.0, 0
        for batch in batches:
            inputs = to_device(batch, model)
            total += float(loss(model, inputs).double().sum())
            count += int(loss.targets(inputs)[1].sum())
        return math.exp(total / count)

    def show(self, row: Row) -> dict[str, str | None]:
        return shown(row, row.content["text"], None)

"""What rows for a causal language model have in common: prompted text, plain text, chat."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from ..errors import InputError
from ..gradients import CausalLM, Loss
from . import tokens as token_rows
from .protocol import Example, ModelKind, Workload
from .rows import Row


class Labelled(NamedTuple):
    """Tokens of a row, and its labels: -100 where there is no answer."""

    ids: list[int]
    labels: list[int]


class Causal:
    """Tokens of one row with labels where an answer is; a token is predicted from those before."""

    unit = "accuracy on the queries"
    model = ModelKind("AutoModelForCausalLM", "CAUSAL_LM", "causal language model")
    choices: tuple[str, ...] = ("answer", "prompt", "all")

    @abstractmethod
    def labelled(self, rows: Sequence[Row], tokenizer: Any) -> Iterator[Labelled]:
        """The tokens and labels of every row."""

    def settled(self, train: Sequence[Row]) -> Workload:
        return self  # type: ignore[return-value]

    def check(self, rows: Sequence[Row]) -> None:
        """Any row goes with any other."""

    def losses(self, tokens: Sequence[str], reduction: str) -> dict[str, Loss]:
        try:
            losses: dict[str, Loss] = {
                t: CausalLM(t, reduction)  # type: ignore[arg-type]
                for t in tokens
            }
        except ValueError as error:
            raise InputError(f"--{error}") from None
        for t in tokens:
            if t not in self.choices:
                raise InputError(f"--tokens {t}: these rows have {', '.join(self.choices)} tokens")
        return losses

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        model: nn.Module | None = None,
        max_length: int | None = None,
    ) -> list[Example]:
        limits = token_rows.Limits.of(model, max_length)
        examples = []
        for row, (ids, labels) in zip(rows, self.labelled(rows, tokenizer), strict=True):
            if max_length is not None:
                labels = limits.cut_labels(row.id, labels)
            ids = limits.cut(row.id, ids)
            columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
            examples.append(Example(row.id, columns, len(ids)))
        return examples

    def seen(self, example: Example, tokenizer: Any, loss: Loss) -> dict[str, Any]:
        assert isinstance(loss, CausalLM)
        scored = loss.targets(token_rows.pad([example], 0))[1][0].tolist()
        # the first token is predicted from nothing
        return {**token_rows.seen(example, tokenizer), "loss": [False, *scored]}

    def collate(self, examples: Sequence[Example], pad_token: int) -> dict[str, Any]:
        return token_rows.pad(examples, pad_token)

    def cut(self, batch: Mapping[str, Any], row: int) -> dict[str, Any]:
        return token_rows.cut(batch, row)

    def observed(self, row: Row) -> int | str | None:
        return row.group

    def skill(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        return token_rows.answered_right(model, batches)

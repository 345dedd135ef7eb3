"""What a kind of row must say of itself; jobs, experiments and reports know only this."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import nn

from ..gradients import Loss
from .rows import Record, Row


@dataclass(frozen=True)
class ModelKind:
    """The model that a kind of row is for.

    Attributes:
        maker: the transformers class that loads it, as "AutoModelForCausalLM".
        task: peft's name of the task, as "CAUSAL_LM".
        words: what it is, in words; None where parts of it may be new, to be trained.
        token: the special token that its tokenizer must have.
        labels: outputs of a classifier.
    """

    maker: str
    task: str
    words: str | None
    token: str = "eos_token"
    labels: int | None = None


class Loaded(NamedTuple):
    """A model with its tokenizer."""

    model: nn.Module
    tokenizer: Any


@dataclass(frozen=True)
class Example:
    """One row as the model takes it.

    Attributes:
        columns: what `collate` makes a batch of. Whatever is drawn at random for a row (a timestep,
            noise) is drawn here, once, so that every pass sees the same row.
        size: by which rows are sorted into batches of similar length.
    """

    id: str
    columns: Mapping[str, Any]
    size: int


class Workload(Protocol):
    """One kind of row.

    Attributes:
        name: what messages call it.
        forms: the fields of a row, by our names; several where people write it in several ways.
        unit: what `skill` measures.
    """

    @property
    def name(self) -> str: ...
    @property
    def forms(self) -> tuple[tuple[str, ...], ...]: ...
    @property
    def unit(self) -> str: ...
    @property
    def model(self) -> ModelKind: ...

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        """The checked fields of one record; `first` is what the file's first row gave.

        Raises:
            InputError: by file and line, a field that cannot be used.
        """
        ...

    def settled(self, train: Sequence[Row]) -> Workload:
        """This kind once all training rows are known: a classifier's labels are theirs."""
        ...

    def check(self, rows: Sequence[Row]) -> None:
        """Raise InputError naming the first row that does not go with the training rows."""
        ...

    def losses(self, tokens: Sequence[str], reduction: str) -> dict[str, Loss]:
        """The loss of each choice of tokens, by the choice's name.

        Raises:
            InputError: a choice that this kind does not have.
        """
        ...

    def encode(
        self,
        rows: Sequence[Row],
        tokenizer: Any,
        *,
        model: nn.Module | None = None,
        max_length: int | None = None,
    ) -> list[Example]:
        """Rows as examples, cut to `max_length` tokens; without `model` its limits are not held.

        Raises:
            InputError: naming a row that the model cannot take.
        """
        ...

    def seen(self, example: Example, tokenizer: Any, loss: Loss) -> dict[str, Any]:
        """The row as the model sees it: {"id", "text", "tokens", "input_ids"}, and what is scored:
        "loss" (a bool a token), "class" or "target" (tokens)."""
        ...

    def collate(self, examples: Sequence[Example], pad_token: int) -> dict[str, Any]:
        """A batch: "id" (list of B) and whatever the model takes, in whatever shape it takes it."""
        ...

    def cut(self, batch: Mapping[str, Any], row: int) -> dict[str, Any]:
        """Row number `row` of a batch as a batch of its own."""
        ...

    def skill(self, model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
        """How well the model does on rows, in `unit`."""
        ...

    def observed(self, row: Row) -> int | str | None:
        """The class that a row claims to be of, all that the most trivial detector knows."""
        ...

    def show(self, row: Row) -> dict[str, str | None]:
        """The row for a person: {"prompt", "answer", "class"}."""
        ...

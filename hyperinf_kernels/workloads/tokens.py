"""Rows of tokens: limits of a model, padding, cutting, and how often its first choice is right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..gradients.losses import IGNORED
from .models import position_limit, vocabulary_size
from .protocol import Example


@dataclass(frozen=True)
class Limits:
    """How many tokens a row may have and how many the model knows; rows are cut to `max_length`."""

    positions: int | None
    vocabulary: int | None
    max_length: int | None

    @classmethod
    def of(cls, model: nn.Module | None, max_length: int | None) -> Limits:
        if model is None:
            return cls(None, None, max_length)
        return cls(position_limit(model), vocabulary_size(model), max_length)

    def cut(self, row: str, ids: list[int]) -> list[int]:
        """The tokens of row `row`, cut and checked.

        Raises:
            InputError: none, too many, or one that the model does not know.
        """
        ids = ids[: self.max_length]
        if self.positions is not None and len(ids) > self.positions:
            raise InputError(
                f"row {row} has {len(ids)} tokens, the model takes {self.positions}; shorten it or "
                f"cut rows with --max-length {self.positions}"
            )
        if not ids:
            raise InputError(f"row {row} has no tokens")
        if self.vocabulary is not None and max(ids) >= self.vocabulary:
            raise InputError(
                f"row {row} has token number {max(ids)}, the model knows {self.vocabulary}; its "
                "folder holds the tokenizer of another model"
            )
        return ids

    def cut_labels(self, row: str, labels: list[int]) -> list[int]:
        """The labels cut likewise; InputError where none is left."""
        labels = labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise InputError(
                f"row {row}: cut to {self.max_length} tokens it has no answer left; "
                "raise --max-length"
            )
        return labels


def pad(examples: Sequence[Example], pad_token: int) -> dict[str, Any]:
    """A batch padded on the right, with the rows' ids: lists become (B, T), numbers (B,)."""
    batch: dict[str, Any] = {"id": [example.id for example in examples]}
    for name in examples[0].columns:
        values = [example.columns[name] for example in examples]
        if not isinstance(values[0], list):
            batch[name] = torch.tensor(values)
            continue
        fill = {"labels": IGNORED, "attention_mask": 0}.get(name, pad_token)
        batch[name] = torch.full((len(values), max(map(len, values))), fill)
        for i, value in enumerate(values):
            batch[name][i, : len(value)] = torch.tensor(value)
    return batch


def cut(batch: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of a batch whose every column has a row per sample."""
    return {name: column[row : row + 1] for name, column in batch.items()}


def seen(example: Example, tokenizer: Any) -> dict[str, Any]:
    """The tokens of a row, and the text that they are."""
    ids = example.columns["input_ids"]
    return {
        "id": example.id,
        "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        "tokens": named(ids, tokenizer),
        "input_ids": ids,
    }


def named(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Tokens by their names."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(ids))]


def to_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a batch where the model is."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}


@torch.no_grad()
def answered_right(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, shift: bool = True
) -> float:
    """Share of rows of which every labelled token is the likeliest one.

    With `shift` a token is predicted from the one before it; else at its own place, as a decoder
    does that gets the labels and moves them itself.
    """
    model.eval()
    right = total = 0
    for batch in batches:
        inputs = to_device(batch, model)
        labels = inputs["labels"]
        if shift:
            del inputs["labels"]
        # greedy decoding reproduces the answer iff each of its tokens is the likeliest next one
        likeliest = model(**inputs).logits.argmax(-1)
        if shift:
            likeliest, labels = likeliest[:, :-1], labels[:, 1:]
        hits = ((likeliest == labels) | (labels == IGNORED)).all(1)
        right, total = right + int(hits.sum()), total + len(hits)
    return right / total

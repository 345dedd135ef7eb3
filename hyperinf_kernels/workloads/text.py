"""Rows of text as padded batches of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..gradients.losses import IGNORED
from .encoding import Encoder, warn_of_merged
from .rows import Row


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; `labels` is a list for generation rows, a class for the others."""

    id: str
    input_ids: list[int]
    labels: list[int] | int


def encode(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    classes: Sequence[int | str] = (),
    limit: int | None = None,
    max_length: int | None = None,
    vocabulary: int | None = None,
) -> list[Encoded]:
    """Tokens of every row: prompt, a blank, answer, end of text; or the text alone.

    Prompt and answer are tokenised as one text. A token with letters of both carries loss with the
    answer, and one warning says so.

    Args:
        classes: the labels of classification rows, in order.
        limit: positions the model has; a longer row is an error.
        max_length: cut rows to this many tokens at the end instead.
        vocabulary: tokens the model knows.

    Raises:
        InputError: a row that is too long, loses all of its answer to the cut, has a label that is
            not among the classes, has a token that the model does not know, or none at all; an
            answer that cannot be told from the prompt.
    """
    check_labels(rows, classes)
    class_of = {label: i for i, label in enumerate(classes)}
    encoder = Encoder(tokenizer, tokenizer.eos_token_id)
    encoded, merged = [], {}
    for row in rows:
        if row.answer is None:
            assert row.label is not None
            ids = encoder.text(row.prompt).ids
            labels: list[int] | int = class_of[row.label]
        else:
            try:
                tokens = encoder.pair(row.prompt, row.answer)
            except InputError as error:
                raise InputError(f"row {row.id}: {error}") from None
            ids, start = tokens.ids, tokens.answer
            labels = [IGNORED] * start + ids[start:]
            if tokens.merged:
                merged[row.id] = ids[start]
        if max_length is not None:
            ids = ids[:max_length]
            if isinstance(labels, list):
                labels = labels[:max_length]
                if all(label == IGNORED for label in labels):
                    raise InputError(
                        f"row {row.id}: cut to {max_length} tokens it has no answer left; "
                        "raise --max-length"
                    )
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"row {row.id} has {len(ids)} tokens, the model takes {limit}; shorten it or cut "
                f"rows with --max-length {limit}"
            )
        if not ids:
            raise InputError(f"row {row.id} has no tokens")
        if vocabulary is not None and max(ids) >= vocabulary:
            raise InputError(
                f"row {row.id} has token number {max(ids)}, the model knows {vocabulary}; its "
                "folder holds the tokenizer of another model"
            )
        encoded.append(Encoded(row.id, ids, labels))
    if merged:
        first = next(iter(merged.values()))
        warn_of_merged(list(merged), str(tokenizer.convert_ids_to_tokens(first)))
    return encoded


def check_labels(rows: Sequence[Row], classes: Sequence[int | str]) -> None:
    """Raise InputError naming the first classification row whose label is not a class."""
    for row in rows:
        if row.answer is None and row.label not in classes:
            raise InputError(
                f"row {row.id}: label {row.label!r} is not among the training labels "
                f"{list(classes)[:10]}"
            )


def pad(encoded: Sequence[Encoded], pad_token: int) -> dict[str, Any]:
    """A batch padded on the right to its longest row, with the rows' ids."""
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.full((len(encoded), width), pad_token)
    mask = torch.zeros(len(encoded), width, dtype=torch.long)
    for i, row in enumerate(encoded):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        mask[i, : len(row.input_ids)] = 1
    labels: Tensor
    if isinstance(encoded[0].labels, int):
        labels = torch.tensor([row.labels for row in encoded])
    else:
        labels = torch.full((len(encoded), width), IGNORED)
        for i, row in enumerate(encoded):
            assert isinstance(row.labels, list)
            labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return {
        "id": [row.id for row in encoded],
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }


class Batches:
    """Padded batches of rows of similar length, longest first, the same in every pass.

    Rows come out of order; their ids travel with them.
    """

    def __init__(self, dataset: Sequence[Encoded], pad_token: int, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        self.dataset, self.pad_token, self.batch_size = dataset, pad_token, batch_size
        self._ordered = sorted(dataset, key=lambda row: -len(row.input_ids))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for start in range(0, len(self._ordered), self.batch_size):
            yield pad(self._ordered[start : start + self.batch_size], self.pad_token)

"""A row of any kind, what its fields are called in a file, and how one record is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

__all__ = ["Fields", "Record", "Row", "show", "shown"]


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        content: what its kind reads, by our names of the fields, as {"prompt": ..., "answer": ...}.
        group: the class of the question, for experiments that ask whether a query finds its kind.
        corrupted: True where the answer or label was made wrong on purpose, False where it is known
            to be right, None where unknown.
    """

    id: str
    content: Mapping[str, Any]
    group: str | None = None
    corrupted: bool | None = None


def shown(row: Row, prompt: str, answer: object) -> dict[str, str | None]:
    """A row for a person: what was asked, what was answered, of which class."""
    group = row.group if row.group is not None else row.content.get("label")
    return {
        "prompt": prompt,
        "answer": None if answer is None else str(answer),
        "class": None if group is None else str(group),
    }


@dataclass(frozen=True)
class Fields:
    """What the fields are called in the file; `id`, `group` and `corrupted` may be absent."""

    prompt: str = "prompt"
    answer: str = "answer"
    text: str = "text"
    label: str = "label"
    group: str = "variation"
    id: str = "id"
    source: str = "source"
    target: str = "target"
    messages: str = "messages"
    completion: str = "completion"
    tools: str = "tools"
    corrupted: str = "corrupted"

    def named(self, name: str) -> str:
        """The file's name of one of our fields."""
        return getattr(self, name)


@dataclass(frozen=True)
class Record:
    """One object of a file, read by our names of its fields; every refusal names the place."""

    values: Mapping[str, Any]
    fields: Fields
    at: str

    def has(self, name: str) -> bool:
        return self.fields.named(name) in self.values

    def get(self, name: str) -> Any:
        return self.values.get(self.fields.named(name))

    def text(self, name: str, *, numbers: bool = False) -> str:
        """A text that is not blank; a number becomes one where `numbers` may stand for text."""
        value = self.get(name)
        # NaN, by which some writers mark a missing value, is refused below.
        if numbers and type(value) in (int, float) and value == value:
            return str(value)
        if not isinstance(value, str):
            raise self.wrong(name, "text or a number" if numbers else "text")
        if not value.strip():
            raise self.refused(name, "is empty")
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise self.refused(name, "has half of a surrogate pair, which is not text")
        return value

    def label(self) -> int | str:
        """The class of the row: a whole number or text."""
        label = self.get("label")
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise self.wrong("label", "a whole number or text")
        return self.text("label") if isinstance(label, str) else label

    def wrong(self, name: str, need: str, found: object = ...) -> InputError:
        """The error for a value of the wrong kind."""
        value = self.get(name) if found is ... else found
        return self.refused(name, f"must be {need}, but is {show(value)}")

    def refused(self, name: str, why: str) -> InputError:
        """The error for a field, by file and line."""
        return InputError(f"{self.at}: {show(self.fields.named(name))} {why}")


def show(value: object) -> str:
    """A name or value as short JSON on one line, safe to print anywhere."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."

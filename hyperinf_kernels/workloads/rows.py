"""Rows of text: read from and written to JSON Lines, with one clear line for every bad input."""

from __future__ import annotations

import json
import os
import random
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from hyperinf_kernels.errors import InputError

__all__ = ["Fields", "Kind", "Row", "flip_labels", "read_rows", "write_rows"]

Kind = Literal["generation", "classification"]


@dataclass(frozen=True)
class Row:
    """One example. A generation row has an answer, a classification row has none but a label.

    `prompt` is the text that the model reads. `group` names the class of the question, for
    experiments that ask whether a query finds its own kind. `corrupted` is True where the answer
    or label was made wrong on purpose, False where it is known to be right, None where unknown.
    """

    id: str
    prompt: str
    answer: str | None = None
    label: int | str | None = None
    group: str | None = None
    corrupted: bool | None = None

    @property
    def kind(self) -> Kind:
        """What the model is asked to produce: an answer where there is one, else a label."""
        return "classification" if self.answer is None else "generation"

    def shown(self) -> dict[str, str | None]:
        """The row as a person sees it: what was asked, what was answered, of which class."""
        answer = self.answer if self.answer is not None else self.label
        group = self.group if self.group is not None else self.label
        return {
            "prompt": self.prompt,
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
    corrupted: str = "corrupted"

    def needed(self, kind: Kind) -> tuple[str, str]:
        """The two fields that every row of this kind must have."""
        return (self.prompt, self.answer) if kind == "generation" else (self.text, self.label)


def read_rows(
    path: str | os.PathLike[str], *, fields: Fields | None = None, kind: Kind | None = None
) -> list[Row]:
    """Read a UTF-8 JSON Lines file: one object a line, blank lines only at the end.

    The path "-" is standard input. A pipe can be read once only: see `same_source`.

    Rows with prompt and answer are generation rows, rows with text and label are classification
    rows. All rows of a file are of one kind; `kind` settles it where both pairs are there. A
    number given as answer, group or id becomes text. Without an id field the ids are "0", "1", ...

    Raises InputError, one line with file and line number, for anything that cannot be used.
    """
    fields = fields or Fields()
    rows: list[Row] = []
    line_of: dict[str, int] = {}
    has_id = False
    name = "standard input" if os.fspath(path) == "-" else os.fspath(path)
    for number, record in _records(os.fspath(path), name):
        at = f"{name}, line {number}"
        found = _kind(record, fields, kind, at)
        if rows and found != rows[0].kind:
            raise InputError(f"{at}: a {found} row, but line 1 is a {rows[0].kind} row")
        if rows and (fields.id in record) != has_id:
            raise InputError(f"{at}: give {_show(fields.id)} in every row or in none")
        has_id = fields.id in record
        row = _row(record, fields, found, at, str(len(rows)))
        if row.id in line_of:
            raise InputError(f"{at}: id {_show(row.id)} is already used in line {line_of[row.id]}")
        if rows and type(row.label) is not type(rows[0].label) and found == "classification":
            raise InputError(f"{at}: {_show(fields.label)} is text in one row, a number in another")
        line_of[row.id] = number
        rows.append(row)
    if not rows:
        what = "it" if os.fspath(path) == "-" else "the file"
        raise InputError(f"{name}: {what} has no rows")
    return rows


def same_source(a: str, b: str) -> bool:
    """Whether two paths, "-" being standard input, lead to one file or to one pipe."""
    first, second = ("/dev/stdin" if path == "-" else path for path in (a, b))
    try:
        return first == second or os.path.samefile(first, second)
    except OSError:
        return False


def write_rows(
    rows: Sequence[Row], path: str | os.PathLike[str], *, fields: Fields | None = None
) -> None:
    """Write rows so that `read_rows` gives them back equal; fields that are None are left out.

    The file appears whole or not at all: it is written under a temporary name in the same folder
    and renamed. Raises InputError where that fails, and ValueError for rows that could not be
    read back: none at all, two kinds, or neither answer nor label.
    """
    fields = fields or Fields()
    if len({row.kind for row in rows}) != 1:
        raise ValueError("write_rows needs at least one row, and rows of one kind only")
    lines = [json.dumps(_record(row, fields), ensure_ascii=False) + "\n" for row in rows]
    target = Path(path)
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    try:
        with open(partial, "xb") as file:
            file.writelines(line.encode() for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def flip_labels(rows: Sequence[Row], fraction: float, seed: int) -> list[Row]:
    """Give exactly round(fraction * n) rows another label that occurs in the data.

    Rows and labels are drawn uniformly by `random.Random(seed)`; `corrupted` tells what was done.
    Raises InputError for a fraction outside [0, 1], fewer than two labels, or an unfit row.
    """
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"the fraction of labels to flip must be in [0, 1], but is {fraction}")
    for row in rows:
        if row.label is None or row.corrupted:
            raise InputError(f"row {row.id} has no label, or a corrupted one: it cannot be flipped")
    present = {row.label for row in rows if row.label is not None}
    labels = sorted(present, key=lambda label: (isinstance(label, str), label))
    count = round(fraction * len(rows))
    if count and len(labels) < 2:
        raise InputError(f"flipping labels needs at least two labels, but there is {len(labels)}")
    rng = random.Random(seed)
    flipped = [replace(row, corrupted=False) for row in rows]
    for i in rng.sample(range(len(rows)), count):
        other = rng.choice([label for label in labels if label != rows[i].label])
        flipped[i] = replace(rows[i], label=other, corrupted=True)
    return flipped


def _records(path: str, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line; lines end at LF only, as JSON Lines says."""
    blank = 0
    try:
        # by number, since a process may have no name for the pipe it was given
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    blank = blank or number
                    continue
                if blank:
                    raise InputError(f"{name}, line {blank}: blank, but rows follow")
                yield number, _parse(line, f"{name}, line {number}")
    except OSError as error:
        raise InputError(f"{name}: cannot be read ({error.strerror})") from error


def _parse(line: bytes, at: str) -> dict[str, Any]:
    try:
        # Some editors put a byte order mark in front of the first line.
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{at}: not UTF-8 text (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{at}: not valid JSON: {error.msg}, column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{at}: not usable JSON: {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{at}: one JSON object a line is needed, but this is {_show(record)}")
    return record


def _kind(record: dict[str, Any], fields: Fields, wanted: Kind | None, at: str) -> Kind:
    """The kind of one record, or an InputError that says which field is missing."""
    kinds: tuple[Kind, ...] = (wanted,) if wanted else ("generation", "classification")
    complete = [k for k in kinds if all(name in record for name in fields.needed(k))]
    if len(complete) == 1:
        return complete[0]
    if complete:
        raise InputError(f"{at}: has prompt and answer as well as text and label; choose one kind")
    partial = [k for k in kinds if any(name in record for name in fields.needed(k))]
    wanting = [[_show(n) for n in fields.needed(k) if n not in record] for k in partial or kinds]
    missing = ", or ".join(" and ".join(names) for names in wanting)
    there = ", ".join([*map(_show, record)][:8] + ["..."] * (len(record) > 8)) or "none"
    raise InputError(f"{at}: no field {missing}; the fields there are: {there}")


def _row(record: dict[str, Any], fields: Fields, kind: Kind, at: str, position: str) -> Row:
    has_group = record.get(fields.group) is not None
    label, corrupted = record.get(fields.label), record.get(fields.corrupted)
    absent_is_fine = label is None and kind == "generation"
    if isinstance(label, bool) or not (isinstance(label, int | str) or absent_is_fine):
        _wrong(fields.label, "a whole number or text", label, at)
    if isinstance(label, str):
        _text(record, fields.label, at)
    if not isinstance(corrupted, bool | None):
        _wrong(fields.corrupted, "true, false or null", corrupted, at)
    return Row(
        id=_text(record, fields.id, at, numbers=True) if fields.id in record else position,
        prompt=_text(record, fields.needed(kind)[0], at),
        answer=_text(record, fields.answer, at, numbers=True) if kind == "generation" else None,
        label=label,
        group=_text(record, fields.group, at, numbers=True) if has_group else None,
        corrupted=corrupted,
    )


def _text(record: dict[str, Any], name: str, at: str, *, numbers: bool = False) -> str:
    value = record[name]
    # NaN, by which some writers mark a missing value, is refused below.
    if numbers and isinstance(value, int | float) and type(value) is not bool and value == value:
        return str(value)
    if not isinstance(value, str):
        _wrong(name, "text or a number" if numbers else "text", value, at)
    if not value.strip():
        raise InputError(f"{at}: {_show(name)} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise InputError(f"{at}: {_show(name)} has half of a surrogate pair, which is not text")
    return value


def _wrong(name: str, need: str, value: object, at: str) -> NoReturn:
    raise InputError(f"{at}: {_show(name)} must be {need}, but is {_show(value)}")


def _show(value: object) -> str:
    """A name or value as short JSON on one line, safe to print anywhere."""
    text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    return text if len(text) <= 60 else text[:57] + "..."


def _record(row: Row, fields: Fields) -> dict[str, Any]:
    if row.answer is None and row.label is None:
        raise ValueError(f"row {row.id} has neither answer nor label")
    record = {
        fields.id: row.id,
        fields.needed(row.kind)[0]: row.prompt,
        fields.answer: row.answer,
        fields.label: row.label,
        fields.group: row.group,
        fields.corrupted: row.corrupted,
    }
    return {name: value for name, value in record.items() if value is not None}

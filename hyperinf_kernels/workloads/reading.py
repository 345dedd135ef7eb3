"""Rows of one kind from files and back: which kind a record is of, and what all must agree in."""

from __future__ import annotations

import ast
import json
import os
import secrets
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from . import KINDS, Workload
from .files import Place, records
from .rows import Fields, Record, Row, show


class RowSet(NamedTuple):
    """Rows and their kind."""

    workload: Workload
    rows: list[Row]


def parse_kind(text: str) -> Workload:
    """Read `chat`, or `chat:turns=last`: a kind of row and how it is taken.

    Raises:
        InputError: an unknown kind or option.
    """
    name, _, rest = text.partition(":")
    known = {kind.name: kind for kind in KINDS}
    if name not in known:
        raise InputError(f"--kind {text}: unknown, choose one of {', '.join(known)}")
    options = dict(part.partition("=")[::2] for part in filter(None, rest.split(",")))
    try:
        return type(known[name])(**{key: _value(value) for key, value in options.items()})
    except (TypeError, InputError) as error:
        raise InputError(f"--kind {text}: {error}") from None


def read_rows(
    *sources: str | os.PathLike[str], fields: Fields | None = None, kind: Workload | None = None
) -> RowSet:
    """Read files of one kind of row; see `files` for their formats.

    The kind is the one whose fields are there, the one of most fields if several are; `kind`
    settles it. A number given as answer, group or id becomes text. Without an id field the ids are
    "0", "1", ...

    Raises:
        InputError: one line with file and line number, for anything that cannot be used.
    """
    fields = fields or Fields()
    rows: list[Row] = []
    place_of: dict[str, Place] = {}
    workload, first, has_id = kind, Place("", ""), False
    for at, values in records([os.fspath(source) for source in sources]):
        record = Record(values, fields, str(at))
        found = kind_of(values.keys(), fields, (kind,) if kind else KINDS, str(at))
        if rows and found != workload:
            assert workload is not None
            raise InputError(
                f"{at}: a {found.name} row, but {first.seen_from(at)} is a {workload.name} row"
            )
        if rows and record.has("id") != has_id:
            raise InputError(f"{at}: give {show(fields.id)} in every row or in none")
        if not rows:
            workload, first, has_id = found, at, record.has("id")
        row = _row(record, found, rows[0] if rows else None, str(len(rows)))
        if row.id in place_of:
            where = place_of[row.id].seen_from(at)
            raise InputError(f"{at}: id {show(row.id)} is already used in {where}")
        place_of[row.id] = at
        rows.append(row)
    assert workload is not None
    return RowSet(workload, rows)


def kind_of(names: Collection[str], fields: Fields, kinds: Sequence[Workload], at: str) -> Workload:
    """The kind whose fields are among `names`, or an InputError that says which one is missing."""

    def share(form: tuple[str, ...]) -> float:
        return sum(fields.named(name) in names for name in form) / len(form)

    complete = [(kind, form) for kind in kinds for form in kind.forms if share(form) == 1]
    most = max((len(form) for _, form in complete), default=0)
    best = [(kind, form) for kind, form in complete if len(form) == most]
    if len(best) == 1:
        return best[0][0]
    if best:
        both = " as well as ".join(" and ".join(form) for _, form in best)
        raise InputError(f"{at}: has {both}; choose one kind")
    main = [kind.forms[0] for kind in kinds]
    partial = [form for form in main if share(form)] or main
    wanting = [[show(fields.named(n)) for n in form if fields.named(n) not in names]
               for form in partial]  # fmt: skip
    missing = ", or ".join(" and ".join(each) for each in wanting)
    there = ", ".join([*map(show, names)][:8] + ["..."] * (len(names) > 8)) or "none"
    raise InputError(f"{at}: no field {missing}; the fields there are: {there}")


def write_rows(
    rows: Sequence[Row], path: str | os.PathLike[str], *, fields: Fields | None = None
) -> None:
    """Write rows so that `read_rows` gives them back equal; fields that are None are left out.

    The file appears whole or not at all: it is written under a temporary name in the same folder
    and renamed. Raises InputError where that fails, and ValueError for rows that could not be
    read back: none at all, or of two kinds.
    """
    fields = fields or Fields()
    written = [_record(row, fields) for row in rows]
    try:
        kinds = {kind_of(record.keys(), fields, KINDS, "").name for record in written}
    except InputError as error:
        raise ValueError(f"write_rows needs at least one row of a known kind{error}") from None
    if len(kinds) != 1:
        raise ValueError("write_rows needs at least one row, and rows of one kind only")
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in written]
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


def _row(record: Record, kind: Workload, first: Row | None, position: str) -> Row:
    corrupted = record.get("corrupted")
    content = kind.content(record, None if first is None else first.content)
    if not isinstance(corrupted, bool | None):
        raise record.wrong("corrupted", "true, false or null")
    return Row(
        id=record.text("id", numbers=True) if record.has("id") else position,
        content=content,
        group=None if record.get("group") is None else record.text("group", numbers=True),
        corrupted=corrupted,
    )


def _record(row: Row, fields: Fields) -> dict[str, Any]:
    named = {fields.named(name): value for name, value in row.content.items()}
    record = {fields.id: row.id, **named, fields.group: row.group, fields.corrupted: row.corrupted}
    return {name: value for name, value in record.items() if value is not None}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

"""Records from files: JSON Lines (plain or compressed), Parquet, a `datasets` folder; globs too."""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from .rows import show

PACKED = (".gz", ".zst", ".bz2", ".lz4")


class Place(NamedTuple):
    """Where a record stands: its file, and "line 3" or "row 3" of it."""

    path: str
    spot: str

    def __str__(self) -> str:
        return f"{self.path}, {self.spot}"

    def seen_from(self, other: Place) -> str:
        """The same, without the file where that is the other's."""
        return self.spot if self.path == other.path else str(self)


def records(sources: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Every record of every file in order, numbered from 1 in each; "-" is standard input.

    A pipe can be read once only: see `same_source`.

    Raises:
        InputError: nothing there, nothing in it, or what cannot be read, by file and line.
    """
    for source in sources:
        for path in _matching(source):
            empty = True
            for place, record in _file(path):
                empty = False
                yield place, record
            if empty:
                what = "it" if path == "-" else "the file"
                raise InputError(f"{_name(path)}: {what} has no rows")


def same_source(a: str, b: str) -> bool:
    """Whether two paths, "-" being standard input, lead to one file or to one pipe."""
    first, second = ("/dev/stdin" if path == "-" else path for path in (a, b))
    try:
        return first == second or os.path.samefile(first, second)
    except OSError:
        return False


def _name(path: str) -> str:
    return "standard input" if path == "-" else path


def _matching(source: str) -> list[str]:
    """The files that a pattern matches, sorted; a name that exists stands for itself."""
    if not any(c in source for c in "*?[") or Path(source).exists():
        return [source]
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise InputError(f"{source}: no file matches")
    return found


def _file(path: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    try:
        if path.endswith(".parquet"):
            yield from _table(path, _parquet(path))
        elif (Path(path) / "state.json").is_file():
            yield from _table(path, _saved(Path(path)))
        else:
            yield from _lines(path)
    except OSError as error:
        # pyarrow's own errors carry no strerror
        raise InputError(f"{_name(path)}: cannot be read ({error.strerror or error})") from error


def _lines(path: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Lines end at LF only, as JSON Lines says; blank ones may stand at the end."""
    blank = 0
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise InputError(f"{_name(path)}, line {blank}: blank, but rows follow")
            place = Place(_name(path), f"line {number}")
            yield place, _parsed(line, place)


def _opened(path: str) -> Any:
    if not path.endswith(PACKED):
        # by number, since a process may have no name for the pipe it was given
        return open(0 if path == "-" else path, "rb", closefd=path != "-")
    return io.BufferedReader(_arrow().input_stream(path))


def _parsed(line: bytes, at: Place) -> dict[str, Any]:
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
        raise InputError(f"{at}: one JSON object a line is needed, but this is {show(record)}")
    return record


def _table(path: str, batches: Iterator[Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    number = 0
    for batch in batches:
        for record in batch.to_pylist():
            number += 1
            yield Place(path, f"row {number}"), record


def _parquet(path: str) -> Iterator[Any]:
    pa = _arrow()
    import pyarrow.parquet as pq

    # a message of pyarrow's for a file that is no Parquet at all is its own class
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches()
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: not a Parquet file ({error})") from error


def _saved(folder: Path) -> Iterator[Any]:
    """What `datasets.Dataset.save_to_disk` writes: Arrow streams, listed in state.json."""
    pa = _arrow()
    state: Any = {}
    with suppress(ValueError):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    names = [entry.get("filename") for entry in state.get("_data_files", [])]
    if not names:
        raise InputError(f"{folder}: its state.json names no data files")
    for name in names:
        with pa.memory_map(str(folder / name)) as source:
            yield from pa.ipc.open_stream(source)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            "reading these rows needs pyarrow: pip install 'hyperinf_kernels[cli]'"
        ) from None
    return pyarrow

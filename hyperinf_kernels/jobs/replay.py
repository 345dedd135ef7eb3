"""A finished run once more, from its report.json, and which of its scores differ."""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attribution.stream import Progress
from ..errors import InputError
from ..report.document import environment
from .request import Request
from .results import fingerprints


def run(folder: Path, output: Path | None, progress: Progress | None) -> dict[str, Any]:
    """Run again into `output`, or into a folder that is forgotten, and compare every score.

    Returns:
        {"changed": what the run read or ran on that is not as it was, "scores": one entry per file
        of scores with its pairs, how many differ, by how much at most}.

    Raises:
        InputError: no report.json with a request, rows that came from standard input, or what the
            job raises.
    """
    before = _document(folder)
    request = Request.from_plain(before["request"])
    if "-" in (*request.train, *request.query):
        raise InputError(f"the rows of {folder} came from standard input, which is gone")
    command = str(before["command"]).replace("-", "_")
    with tempfile.TemporaryDirectory() as scratch:
        place = output or Path(scratch) / "again"
        request = replace(request, output=place, progress=progress)
        changed = _changes(before, request)
        importlib.import_module(f"{__package__}.{command}").run(request)
        files = sorted(path.name for path in folder.glob("*.parquet"))
        scores = [_compared(name, folder / name, place / name) for name in files]
    return {
        "format": 1,
        "command": "replay",
        "folder": str(folder),
        "output": None if output is None else str(output),
        "changed": changed,
        "scores": scores,
    }


def _document(folder: Path) -> dict[str, Any]:
    path = folder / "report.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(document, dict) or "request" not in document:
        raise InputError(f"{path} does not hold its run's request, so it cannot be run again")
    return document


def _changes(before: dict[str, Any], request: Request) -> list[str]:
    """What differs from the first run, before anything is computed."""
    now = environment(request.device)
    found = [
        f"{name}: {before['environment'].get(name)} then, {now[name]} now"
        for name in ("hyperinf_kernels", "torch", "device", "threads")
        if before["environment"].get(name) != now[name]
    ]
    prints = fingerprints(request)
    for role, value in before.get("fingerprints", {}).items():
        if prints.get(role) != value:
            found.append(f"{role}: {'changed' if role in prints else 'gone'} since then")
    return found


def _compared(name: str, old: Path, new: Path) -> dict[str, Any]:
    """How the scores of one file differ; a pair that is in one of them only counts as differing."""
    if not new.exists():
        raise InputError(f"the run wrote no {name} this time")
    first, second = _scores(old), _scores(new)
    pairs = first.keys() | second.keys()
    apart = [pair for pair in pairs if first.get(pair) != second.get(pair)]
    both = [pair for pair in apart if pair in first and pair in second]
    largest = max((abs(first[pair] - second[pair]) for pair in both), default=0.0)
    scale = max(map(abs, first.values()), default=0.0)
    return {
        "file": name,
        "pairs": len(first),
        "differing": len(apart),
        "missing": len(apart) - len(both),
        "largest": largest,
        "relative": largest / scale if scale else 0.0 if largest == 0 else math.inf,
    }


def _scores(path: Path) -> dict[tuple[Any, Any], float]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["query_id", "train_id", "influence"])
    queries, train, values = (column.to_pylist() for column in table.columns)
    return dict(zip(zip(queries, train, strict=True), values, strict=True))

"""A row as the model sees it, in lines for a person: each token as text, and which carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import printable

__all__ = ["as_text"]


def as_text(entry: dict[str, Any]) -> str:
    """A few lines of what `Workload.seen` gives, with control characters escaped."""
    head = f"row {printable(entry['id'])}: {len(entry['tokens'])} tokens"
    if "class" in entry:
        head += f", class {entry['class']}"
    if "loss" in entry:
        head += f", {sum(entry['loss'])} with loss"
    lines = [head, f"  text  {printable(entry['text'])}"]
    runs = _runs(entry["tokens"], entry.get("loss") or [False] * len(entry["tokens"]))
    if "target" in entry:
        runs.append((True, entry["target"]))
    for carries, tokens in runs:
        lines.append(f"  {'LOSS ' if carries else 'given'} {' '.join(map(_quoted, tokens))}")
    return "\n".join(lines)


def _runs(tokens: Sequence[str], loss: Sequence[bool]) -> list[tuple[bool, list[str]]]:
    """Neighbouring tokens that carry loss, or do not, together."""
    runs: list[tuple[bool, list[str]]] = []
    for token, carries in zip(tokens, loss, strict=True):
        if not runs or runs[-1][0] != carries:
            runs.append((carries, []))
        runs[-1][1].append(token)
    return runs


def _quoted(token: str) -> str:
    return f"[{printable(token)}]"

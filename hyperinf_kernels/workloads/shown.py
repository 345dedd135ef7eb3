"""Rows as the model sees them: each token as text, and which of them carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import printable
from ..gradients import CausalLM
from .text import Encoded, pad

__all__ = ["as_text", "shown"]


def shown(
    encoded: Sequence[Encoded], tokenizer: Any, loss: CausalLM | None
) -> list[dict[str, Any]]:
    """One dictionary per row: `id`, `text` (the tokens decoded), `tokens`, `input_ids`, and `loss`,
    for each token whether the model is scored on predicting it, or `class` for rows with a label.

    Args:
        loss: of generation rows, whose own choice of tokens is shown.
    """
    rows = []
    for row in encoded:
        ids = row.input_ids
        entry: dict[str, Any] = {
            "id": row.id,
            "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
            "tokens": [str(token) for token in tokenizer.convert_ids_to_tokens(ids)],
            "input_ids": ids,
        }
        if loss is None:
            entry["class"] = row.labels
        else:
            # the first token is predicted from nothing
            entry["loss"] = [False, *loss.targets(pad([row], 0))[1][0].tolist()]
        rows.append(entry)
    return rows


def as_text(entry: dict[str, Any]) -> str:
    """A few lines for a person, with control characters escaped."""
    lines = [f"row {printable(entry['id'])}: {len(entry['tokens'])} tokens"]
    if "class" in entry:
        lines[0] += f", class {entry['class']}"
    else:
        lines[0] += f", {sum(entry['loss'])} with loss"
    lines.append(f"  text  {printable(entry['text'])}")
    for carries, tokens in _runs(entry["tokens"], entry.get("loss")):
        lines.append(f"  {'LOSS ' if carries else 'given'} {' '.join(map(_quoted, tokens))}")
    return "\n".join(lines)


def _runs(tokens: list[str], loss: list[bool] | None) -> list[tuple[bool, list[str]]]:
    """Neighbouring tokens that carry loss, or do not, together."""
    runs: list[tuple[bool, list[str]]] = []
    for token, carries in zip(tokens, loss or [False] * len(tokens), strict=True):
        if not runs or runs[-1][0] != carries:
            runs.append((carries, []))
        runs[-1][1].append(token)
    return runs


def _quoted(token: str) -> str:
    return f"[{printable(token)}]"

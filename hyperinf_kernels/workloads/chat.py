"""Chat: `{"messages": [...]}`, or `{"prompt": [...], "completion": [...]}`, with tool calls.

The tokenizer's chat template turns messages into text. The loss is on what the assistant says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..gradients.losses import IGNORED
from .causal import Causal, Labelled
from .rows import Record, Row, shown

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Chat(Causal):
    """Turns of a conversation, each with a role.

    Attributes:
        turns: "all" takes the loss on every turn of the assistant, "last" on the last one. A row
            of prompt and completion has it on the completion.
    """

    turns: str = "all"

    name = "chat"
    forms = (("messages",), ("prompt", "completion"))

    def __post_init__(self) -> None:
        if self.turns not in ("all", "last"):
            raise InputError(f"turns must be all or last, got {self.turns!r}")

    def content(self, record: Record, first: Mapping[str, Any] | None) -> dict[str, Any]:
        tools = record.get("tools")
        if isinstance(tools, str):
            # a column of a table holds them as JSON
            tools = _json(tools)
        if not isinstance(tools, list | None):
            raise record.wrong("tools", "a list")
        extra = {"tools": tools} if tools else {}
        if record.has("messages"):
            found = {"messages": _messages(record, "messages")}
        else:
            found = {name: _messages(record, name) for name in ("prompt", "completion")}
        said = found.get("completion", found.get("messages", []))
        if not any(message["role"] == "assistant" for message in said):
            place = "completion" if "completion" in found else "messages"
            raise record.refused(place, "has no turn of the assistant")
        return {**found, **extra}

    def labelled(self, rows: Sequence[Row], tokenizer: Any) -> Iterator[Labelled]:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                "chat rows need a tokenizer that knows where its tokens are; save a fast one "
                "(tokenizer.json)"
            )
        for row in rows:
            text, spans = self.rendered(row, tokenizer)
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            # a token with letters of both sides is counted on the assistant's
            inside = [
                start < end and any(start < high and end > low for low, high in spans)
                for start, end in found["offset_mapping"]
            ]
            if not any(inside):
                raise InputError(f"row {row.id}: its assistant says nothing")
            ids = found["input_ids"]
            yield Labelled(ids, [i if x else IGNORED for i, x in zip(ids, inside, strict=True)])

    def rendered(self, row: Row, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
        """The text that the model reads, and where in it the assistant speaks.

        Raises:
            InputError: no chat template, one that fails on the row, or one that writes earlier
                turns differently once there are later ones.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("chat rows need a tokenizer with a chat template, and this has none")
        content = row.content

        def render(messages: Messages, **more: Any) -> str:
            try:
                return tokenizer.apply_chat_template(
                    messages, tools=content.get("tools"), tokenize=False, **more
                )
            # a template is a program of its own, and raises what it likes
            except Exception as error:
                raise InputError(f"row {row.id}: its chat template refuses it: {error}") from error

        prompt = content.get("prompt", [])
        messages = [*prompt, *content.get("completion", content.get("messages", []))]
        whole = render(messages)
        if "completion" in content:
            starts = [(len(prompt), len(messages))]
        else:
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            starts = [(i, i + 1) for i in (turns if self.turns == "all" else turns[-1:])]
        spans = []
        for start, stop in starts:
            before = render(messages[:start], add_generation_prompt=True) if start else ""
            through = whole if stop == len(messages) else render(messages[:stop])
            if not whole.startswith(through) or not through.startswith(before):
                raise InputError(
                    f"row {row.id}: the chat template writes turn {start + 1} differently in the "
                    "whole conversation; take --kind chat:turns=last, or split it into prompt and "
                    "completion"
                )
            spans.append((len(before), len(through)))
        return whole, spans

    def show(self, row: Row) -> dict[str, str | None]:
        content = row.content
        messages = [*content.get("prompt", []), *content.get("completion", [])]
        messages = messages or content["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        said = "\n".join(f"{m['role']}: {_spoken(m)}" for m in messages[:last])
        return shown(row, said, _spoken(messages[last]))


def _messages(record: Record, name: str) -> Messages:
    value = record.get(name)
    if isinstance(value, str):
        raise record.wrong(name, "a list of messages (for text, see --answer-field)")
    if not isinstance(value, list) or not value:
        raise record.wrong(name, "a list of messages")
    return [_message(record, name, message) for message in value]


def _message(record: Record, name: str, message: Any) -> dict[str, Any]:
    """One message, its tool calls' arguments as objects even where an API writes them as text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise record.wrong(name, "messages, each with a role", message)
    # a table fills the fields that other messages have
    kept = {key: value for key, value in message.items() if value is not None}
    spoken = kept.setdefault("content", "")
    if isinstance(spoken, list):
        if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in spoken):
            raise record.wrong(name, "text; images are not read here", spoken)
    elif not isinstance(spoken, str):
        raise record.wrong(name, "messages whose content is text", spoken)
    calls = kept.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise record.wrong(name, "messages whose tool calls are a list", calls)
        kept["tool_calls"] = [_call(call) for call in calls]
    return kept


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    return {**call, "function": {**function, "arguments": _json(function["arguments"])}}


def _json(text: str) -> Any:
    """What is written as JSON inside a text; the text itself where it is something else."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _spoken(message: Mapping[str, Any]) -> str:
    """What a message says: its text, and its tool calls as name(arguments)."""
    content = message.get("content") or ""
    text = content if isinstance(content, str) else " ".join(part["text"] for part in content)
    calls: Sequence[Mapping[str, Any]] = message.get("tool_calls") or ()
    named = [call.get("function", call) for call in calls]
    written = [f"{c.get('name')}({json.dumps(c.get('arguments'))})" for c in named]
    return "\n".join(filter(None, [text, *written]))

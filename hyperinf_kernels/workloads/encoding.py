"""Tokens of one text as a tokenizer makes them, and where in them the answer starts.

Prompt and answer are tokenised together, as the text that a model was tuned on: a tokenizer may
join letters across the boundary, mark the start of every text it is given, or put special tokens
around it, so that two lists of tokens put end to end are another text than the joined one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError

BLANK = "\u0120"  # how byte-level tokens write a blank
SHOWN = 24  # tokens of a list in a warning, from a little before the first difference


@dataclass(frozen=True)
class Tokens:
    """Tokens of a whole text.

    `answer` is the place of the first token that has a letter of the answer (the end where the
    text has none); `merged` says that this token has letters of the prompt as well.
    """

    ids: list[int]
    answer: int
    merged: bool = False


class Encoder:
    """A tokenizer with the special tokens that it puts around a text, each of them once.

    Args:
        end: token that ends an answer, put there unless the tokenizer has done so.
    """

    def __init__(self, tokenizer: Any, end: int | None = None) -> None:
        self.tokenizer, self.end = tokenizer, end
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._strip_right = {number for number, token in added.items() if token.rstrip}
        self._around: tuple[list[int], list[int]] | None = None

    def text(self, text: str) -> Tokens:
        """Tokens of a text that has no answer."""
        ids, _ = self._marked(text, self._bare(text))
        return Tokens(ids, len(ids))

    def pair(self, prompt: str, answer: str) -> Tokens:
        """Tokens of prompt, blank and answer; the blank is on the answer's side.

        A token with letters of both sides is counted on the answer's.

        Raises:
            InputError: the answer has no token, or the tokenizer tells no character offsets and
                does not tokenise the prompt as it does before an answer.
        """
        text = joined(prompt, answer)
        if getattr(self.tokenizer, "is_fast", False):
            found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            bare = list(found["input_ids"])
            start, merged = self._boundary(bare, found["offset_mapping"], text, len(prompt))
        else:
            bare, merged = self._bare(text), False
            start = self._boundary_without_offsets(bare, prompt)
        if start == len(bare):
            raise InputError("its answer has no token")
        ids, before = self._marked(text, bare)
        if self.end is not None and ids[-1] != self.end:
            ids.append(self.end)
        return Tokens(ids, before + start, merged)

    def plain(self, prompt: str, answer: str | None) -> list[int]:
        """What the tokenizer makes of the joined text by itself."""
        return list(self.tokenizer(joined(prompt, answer))["input_ids"])

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _boundary(
        self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], text: str, boundary: int
    ) -> tuple[int, bool]:
        """Place of the answer's first token, and whether the prompt has a part of it."""
        pieces = self.tokenizer.convert_ids_to_tokens(list(ids))
        for place, (piece, span) in enumerate(zip(pieces, offsets, strict=True)):
            start, end = _with_blanks(str(piece), *span, text)
            if end > boundary:
                # one that strips the blank after it has no letter of the answer
                stripped = ids[place] in self._strip_right and text[boundary:end].isspace()
                if not (start < boundary and stripped):
                    return place, start < boundary
        return len(ids), False

    def _boundary_without_offsets(self, ids: list[int], prompt: str) -> int:
        alone = self._bare(prompt)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        # unknown letters on both sides may have become one token
        fused = bool(alone) and unknown is not None and alone[-1] == unknown
        if ids[: len(alone)] != alone or fused:
            raise InputError(
                f"the tokenizer {type(self.tokenizer).__name__} tells no character offsets, and "
                "its tokens do not show where the answer starts; save a fast one (tokenizer.json)"
            )
        return len(alone)

    def _marked(self, text: str, bare: list[int]) -> tuple[list[int], int]:
        """The tokens with those that the tokenizer puts around, and how many go before."""
        first, last = self._around or self._find_around(text, bare)
        head = first[: len(first) - _overlap(first, bare)]
        return [*head, *bare, *last[_overlap(bare, last) :]], len(head)

    def _find_around(self, text: str, bare: list[int]) -> tuple[list[int], list[int]]:
        """The tokens put before and after every text, found on this one."""
        marked = list(self.tokenizer(text)["input_ids"])
        for place in range(len(marked) - len(bare) + 1):
            if marked[place : place + len(bare)] == bare:
                found = marked[:place], marked[place + len(bare) :]
                # a text of special tokens alone may fit in two places, the next one does not
                if not set(bare) <= set(self.tokenizer.all_special_ids):
                    self._around = found
                return found
        raise InputError(
            f"the tokenizer {type(self.tokenizer).__name__} makes other tokens of a text when it "
            "adds its special tokens, so the answer cannot be found among them"
        )


def joined(prompt: str, answer: str | None) -> str:
    """The text that a model reads: prompt, blank, answer; or the prompt alone."""
    return prompt if answer is None else f"{prompt} {answer}"


def _with_blanks(piece: str, start: int, end: int, text: str) -> tuple[int, int]:
    """Offsets with the blanks at a token's ends, which byte-level tokenizers may leave out."""
    first, last = (len(piece) - len(s) for s in (piece.lstrip(BLANK), piece.rstrip(BLANK)))
    if first == len(piece):
        return min(start, end - first), end
    if first and text[start] not in (" ", BLANK):
        start -= first
    if last and text[end - 1] not in (" ", BLANK):
        end += last
    return start, end


def _overlap(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens end `left` and start `right`, at most."""
    shorter = min(len(left), len(right))
    return next((n for n in range(shorter, 0, -1) if left[-n:] == right[:n]), 0)


def warn_of_merged(names: Sequence[str], token: str) -> None:
    """One line on the rows whose boundary lies inside a token; `token` is that of the first."""
    warnings.warn(
        f"{len(names)} rows have a token across the boundary of prompt and answer, counted with "
        f"the answer; the first is row {names[0]}: {token!r}",
        stacklevel=3,
    )


def warn_of_difference(
    encoder: Encoder, rows: Sequence[tuple[str, str, str | None]], ids: Sequence[list[int]]
) -> None:
    """Compare tokens with what the tokenizer makes of the joined text; warn in one line if other.

    An end token more, or a cut at the end, is no difference.

    Args:
        rows: (id, prompt, answer or None) of each row.
        ids: the tokens that the model gets, a list per row.
    """
    different = []
    for (name, prompt, answer), got in zip(rows, ids, strict=True):
        plain = encoder.plain(prompt, answer)
        ended = plain if answer is None or encoder.end is None else [*plain, encoder.end]
        if got != plain[: len(got)] and got != ended[: len(got)]:
            different.append((name, got, plain))
    if not different:
        return
    name, got, plain = different[0]
    same = next((i for i, (a, b) in enumerate(zip(got, plain, strict=False)) if a != b), 0)
    warnings.warn(
        f"{len(different)} of the first {len(rows)} rows get other tokens than the tokenizer makes "
        f"of their text; the first is row {name}: the model gets {_window(encoder, got, same)}, "
        f"the tokenizer makes {_window(encoder, plain, same)}",
        stacklevel=2,
    )


def _window(encoder: Encoder, ids: list[int], place: int) -> str:
    """The tokens as text, a long list cut around `place`."""
    start = max(0, place - SHOWN // 4) if len(ids) > SHOWN else 0
    shown = encoder.tokenizer.convert_ids_to_tokens(ids[start : start + SHOWN])
    before, after = "... " * (start > 0), " ..." * (start + SHOWN < len(ids))
    return before + str([str(token) for token in shown]) + after

"""Markup that is safe by construction: plain text is always escaped, only `tag` makes elements.

A `str` is text, whatever it contains. A `Markup` is the result of `tag` and friends. Mixing the two
in an f-string gives a `str`, so a mistake shows up as visible markup and never as an injection.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

# Control characters have no glyph and NUL is a parse error in HTML; tab and newline stay.
_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
_VOID = frozenset({"meta", "input", "br"})

HEAD_CHARACTERS = 280  # shown at once; the rest of a passage folds away behind "more"
PASSAGE_CHARACTERS = 2_000  # beyond this a passage is cut and the page says by how much


class Markup(str):
    """A piece of HTML or SVG that is safe to put into element content as it is."""

    __slots__ = ()


Child = object  # Markup stays, None vanishes, a list or tuple holds children, the rest is text


def escape(value: object) -> Markup:
    """`value` as text that is safe in element content and in quoted attributes; None gives ''."""
    text = "" if value is None else str(value).replace("\r\n", "\n")
    text = text.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
    return Markup(html.escape(text, quote=True))


def join(children: Iterable[Child]) -> Markup:
    """The children one after the other, escaping every one that is not Markup."""
    return Markup("".join(_content(child) for child in children))


def tag(selector: str, *children: Child, **attributes: object) -> Markup:
    """One element. `selector` is a name with classes, such as ``"span.chip.bad"``.

    Attribute names take ``_`` for ``-``; a trailing one is dropped (``for_``). A value of True is
    a bare attribute, None and False are none; floats are written with two decimals. Raises
    ValueError for a float that is not finite, so that no NaN ever reaches a drawing.
    """
    name, *classes = selector.split(".")
    if classes:
        attributes = {"class": " ".join(filter(None, classes)), **attributes}
    text = "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(
        f"<{name}{text}>" if name in _VOID else f"<{name}{text}>{join(children)}</{name}>"
    )


def chip(value: object, kind: str = "", mark: str = "") -> Markup:
    """A small label; `mark` says in a character what the colour of `kind` says."""
    return tag(f"span.chip.{kind}", f"{mark} " if mark else None, tag("bdi", value))


def passage(value: object, kind: str = "text") -> Markup:
    """A paragraph of untrusted text: own writing direction, folded when long, cut when huge."""
    full = "" if value is None else str(value)
    if not full.strip():
        return tag(f"p.{kind}.empty", "(empty)")
    if len(full) <= HEAD_CHARACTERS + 60:  # folding away a few words would only annoy
        return tag(f"p.{kind}", full, dir="auto")
    space = full.rfind(" ", HEAD_CHARACTERS // 2, HEAD_CHARACTERS)
    cut = space + 1 if space > 0 else HEAD_CHARACTERS
    lost = len(full) - PASSAGE_CHARACTERS
    note = tag("em.quiet", f" ({lost:,} more characters not shown)") if lost > 0 else None
    rest = tag("details.more", tag("summary", "more"), full[cut:PASSAGE_CHARACTERS], note)
    return tag(f"div.{kind}", full[:cut], rest, dir="auto")


def meter(value: float | None, largest: float, kind: str) -> Markup:
    """A bar as long as |value| is of `largest`."""
    share = min(abs(value) / largest, 1.0) if value is not None and largest > 0 else 0.0
    return tag("div.rail", tag(f"i.{kind}", style=f"width:{share:.1%}"))


def table(kind: str, head: Iterable[Child], rows: Iterable[Markup]) -> Markup:
    """A table that scrolls sideways on its own where the window is narrow."""
    cells = [tag("th", h, scope="col") for h in head]
    top = tag("thead", tag("tr", cells)) if cells else None
    return tag("div.scroll", tag(f"table.{kind}", top, tag("tbody", list(rows))))


def _content(child: Child) -> str:
    if isinstance(child, Markup):
        return child
    if isinstance(child, (list, tuple)):
        return join(child)
    return escape(child)


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"attribute {name} is not a finite number: {value}")
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    return f' {name}="{escape(value)}"'

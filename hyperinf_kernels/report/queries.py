"""The queries of the HTML report: each beside the training examples that moved it most.

The method is chosen with plain radio buttons that stand before the list, so that choosing works
with style sheets alone; the script only adds a search box on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .charts import METHOD_STYLES
from .markup import Markup, chip, join, meter, passage, table, tag
from .text import count, finite, mapping, mappings, number

_SUMMARY_CHARACTERS = 160  # of the query in its closed state: one line
_CORRUPTED = ("corrupted", "bad", "\u26a0\ufe0e")
Named = Sequence[tuple[str, str]]  # (key, label) of every method in display order


def queries_section(queries: Sequence[Any], methods: Named) -> Markup:
    """All queries; a query may lack some of the methods."""
    found = mappings(queries)
    radios = [
        tag("input.pick", type="radio", name="method", id=f"pick{i}", checked=i == 0)
        for i in range(len(methods))
    ]
    labels = [
        tag("label", tag(f"span.key.c{i % METHOD_STYLES}"), tag("bdi", name), for_=f"pick{i}")
        for i, (_, name) in enumerate(methods)
    ]
    bar = tag("div.bar", tag("div.tabs", labels), _tools(found))
    cards = [_query(q, methods, first=i == 0) for i, q in enumerate(found)]
    return join([radios, bar, tag("div.queries", cards)])


def tab_styles(n: int) -> str:
    """Style rules that show method i exactly while its radio button is chosen."""
    if not n:
        return ""
    shown = ",".join(f"#pick{i}:checked~.queries .v{i}" for i in range(n))
    chosen = ",".join(f"#pick{i}:checked~.bar label[for=pick{i}]" for i in range(n))
    focused = ",".join(f"#pick{i}:focus-visible~.bar label[for=pick{i}]" for i in range(n))
    return (
        f"{shown}{{display:block}}{chosen}{{background:var(--ink);color:var(--paper)}}"
        f"{focused}{{outline:3px solid var(--focus);outline-offset:2px}}"
    )


def suspects_section(suspects: Sequence[Any]) -> Markup:
    """Training rows by how suspicious their label is, with a bar for the score."""
    rows = mappings(suspects)
    if not rows:
        return tag("p", "No training row was listed.")
    known = [bool(s["corrupted"]) for s in rows if s.get("corrupted") is not None]
    words: list[object] = ["Nobody told the program which labels are really wrong: look at them."]
    if known:
        right = tag("strong", f"{sum(known):,} ({sum(known) / len(known):.0%})")
        listed = count(len(known), "listed row")
        words = [f"Of {listed} whose truth is known, ", right, " really carry a corrupted label."]
    largest = max((abs(v) for s in rows if (v := finite(s.get("score"))) is not None), default=0.0)
    head = ("rank", "train", "score", "text", "label", "truth")
    body = [_suspect(s, largest) for s in rows]
    return join([tag("p", words), table("suspects", head, body)])


def _tools(queries: Sequence[Mapping[str, Any]]) -> Markup:
    """Search and unfold; hidden until the script takes charge of them."""
    classes = sorted({str(q["class"]) for q in queries if q.get("class") is not None})
    options = [
        tag("option", "all classes", value=""),
        *(tag("option", c, value=c) for c in classes),
    ]
    search = tag(
        "input",
        type="search",
        id="query-filter",
        placeholder="Search",
        aria_label="Search the queries",
    )
    return tag(
        "div.tools",
        search,
        tag("select", options, id="class-filter", aria_label="Class") if classes else None,
        tag("button", "Open all", type="button", id="open-all"),
        tag("button", "Close all", type="button", id="close-all"),
        tag("output", id="shown"),
        id="tools",
        hidden=True,
    )


def _query(query: Mapping[str, Any], methods: Named, *, first: bool) -> Markup:
    own = query.get("class")
    views = [mapping(mapping(query.get("methods")).get(key)) for key, _ in methods]
    summary = tag(
        "summary",
        tag("span.id", "query ", query.get("id")),
        tag("span.line", str(query.get("prompt") or "")[:_SUMMARY_CHARACTERS], dir="auto"),
        [_tally(view, own, i) for i, view in enumerate(views)],
        chip(own) if own is not None else None,
    )
    asked = tag("div.asked", tag("h4", "The query"), _texts(query))
    lists = [_view(view, own, i, methods[i][1]) for i, view in enumerate(views)]
    pair = tag("div.pair", asked, lists)
    return tag(
        "details.card.query",
        summary,
        pair,
        data_class=None if own is None else str(own),
        open=first,
    )


def _texts(example: Mapping[str, Any]) -> list[Markup]:
    texts = [passage(example.get("prompt"))]
    if example.get("answer") is not None:
        texts.append(passage(example["answer"], "answer"))
    return texts


def _tally(view: Mapping[str, Any], own: object, index: int) -> Markup | None:
    """One square per most helpful example, filled where it shares the class of the query."""
    same = [e.get("class") == own for e in mappings(view.get("helpful"))]
    if own is None or not same:
        return None
    words = f"{sum(same)} of the {len(same)} most helpful examples share the query's class"
    squares = [tag("i.on" if s else "i.off") for s in same]
    return tag(f"span.view.v{index}.tally", squares, role="img", aria_label=words, title=words)


def _view(view: Mapping[str, Any], own: object, index: int, name: str) -> Markup:
    """The two lists of one method; bar lengths are relative to the largest influence in both."""
    helpful, harmful = mappings(view.get("helpful")), mappings(view.get("harmful"))
    values = [finite(e.get("influence")) for e in (*helpful, *harmful)]
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    columns = [
        tag("div", tag(f"h4.{kind}", title), _examples(examples, own, largest))
        for kind, title, examples in (
            ("helps", "Most helpful training examples", helpful),
            ("harms", "Most harmful training examples", harmful),
        )
    ]
    by = tag("p.by", "ranked by ", tag("bdi", name))
    return tag(f"div.view.v{index}", by, tag("div.lists", columns))


def _examples(examples: Sequence[Mapping[str, Any]], own: object, largest: float) -> Markup:
    if not examples:
        return tag("p.quiet", "None listed.")
    return tag("ol.examples", [_example(e, own, largest) for e in examples])


def _example(example: Mapping[str, Any], own: object, largest: float) -> Markup:
    value = finite(example.get("influence"))
    kind = "plain" if not value else "helps" if value < 0 else "harms"
    same = own is not None and example.get("class") == own
    facts = tag(
        "div.marks",
        tag(f"span.value.{kind}", number(example.get("influence"))),
        _class_chip(example.get("class"), same),
        chip(*_CORRUPTED) if example.get("corrupted") else None,
        tag("span.id", "train ", example.get("id")),
    )
    item = "li.same" if same else "li"
    return tag(item, meter(value, largest, kind), facts, _texts(example))


def _class_chip(value: object, same: bool) -> Markup | None:
    if value is None:
        return None
    return chip(value, "same", "\u2713") if same else chip(value)


def _suspect(row: Mapping[str, Any], largest: float) -> Markup:
    bar = meter(finite(row.get("score")), largest, "plain")
    truth = row.get("corrupted")
    judged = (
        chip(*_CORRUPTED) if truth else tag("span.quiet", "unknown" if truth is None else "clean")
    )
    return tag(
        "tr",
        tag("td", row.get("rank")),
        tag("td.id", row.get("id")),
        tag("td.score", number(row.get("score")), bar),
        tag("td", passage(row.get("prompt"))),
        tag("td", chip(row["label"]) if row.get("label") is not None else None),
        tag("td", judged),
    )

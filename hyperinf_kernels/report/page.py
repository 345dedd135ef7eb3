"""report.json as one HTML page that stands alone: no network, no library, readable without scripts.

Training texts are untrusted. All markup is built by `markup.tag`, which escapes
everything else; no data is ever put into a script, and the page's own content security policy
forbids every script but the one shipped here.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import datetime
from importlib import resources
from typing import Any

from ..errors import InputError
from .certificate import certificate_card
from .markup import Markup, join, tag
from .queries import queries_section, suspects_section, tab_styles
from .results import (
    Contender,
    contenders,
    curves_section,
    histograms_section,
    results_section,
    run_section,
)
from .text import count, finite, mapping, number, sequence

__all__ = ["FORMAT", "render_html"]

FORMAT = 1


def render_html(document: Mapping[str, Any]) -> str:
    """Turn a report.json document (format 1) into one self-contained HTML page.

    Optional keys may be missing or null; their part of the page is then left out. Numbers that are
    not finite are named as such and never drawn. Raises InputError for any other format.
    """
    found = document.get("format") if isinstance(document, Mapping) else type(document).__name__
    if found != FORMAT:
        raise InputError(f"the page needs a report.json of format {FORMAT}, not {found!r}")
    rows = contenders(document)
    candidates = [
        ("reading", "How to read this", _reading()),
        ("results", "Results", results_section(document, rows)),
        ("curves", "Curves", curves_section(rows)),
        ("scores", "All scores", histograms_section(document, rows)),
        ("suspects", "Suspects", _suspects(document)),
        ("queries", "Queries", _queries(document, rows)),
        ("certificate", "How exact were the solves?", _certificates(rows)),
        ("run", "How it ran", run_section(document, rows)),
    ]
    sections = [(key, title, body) for key, title, body in candidates if body]
    links = [tag("a", title, href=f"#{key}") for key, title, _ in sections]
    main = tag("main", [tag("section", tag("h2", t), body, id=key) for key, t, body in sections])
    script = Markup(_asset("page.js"))
    page = tag(
        "html",
        _head(document, script, len(rows)),
        tag("body", _header(document, links), main, _footer(document), tag("script", script)),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _asset(name: str) -> str:
    folder = resources.files(__package__)
    return folder.joinpath(name).read_text(encoding="utf-8")


def _title(document: Mapping[str, Any]) -> str:
    return str(document.get("title") or "Influence report")


def _head(document: Mapping[str, Any], script: str, tabs: int) -> Markup:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", _title(document)),
        tag("style", Markup(_asset("page.css") + tab_styles(tabs))),
    )


def _header(document: Mapping[str, Any], links: list[Markup]) -> Markup:
    model, data = mapping(document.get("model")), mapping(document.get("data"))
    facts = {
        "model": model.get("name"),
        "adapter": model.get("adapter"),
        "blocks": _whole(model.get("blocks")),
        "parameters": _whole(model.get("parameters")),
        "loss": model.get("loss"),
        "training data": mapping(data.get("train")).get("source"),
        "query data": mapping(data.get("query")).get("source"),
        "seed": document.get("seed"),
        "made": _moment(document.get("created")),
    }
    items = [
        tag("div", tag("dt", name), tag("dd", tag("bdi", value)))
        for name, value in facts.items()
        if value is not None
    ]
    return tag(
        "header",
        tag("p.eyebrow", "hyperinf \u00b7 ", document.get("command") or "report"),
        tag("h1", _title(document), dir="auto"),
        tag("p.lead", _question(document)),
        tag("dl.facts", items) if items else None,
        tag("nav", links, aria_label="Sections"),
    )


def _moment(value: object) -> str | None:
    """An ISO time without its seconds; anything else as it is."""
    if value is None:
        return None
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(value)


def _whole(value: object) -> str | None:
    return None if value is None else number(value, 9)


def _question(document: Mapping[str, Any]) -> list[object]:
    """What was asked, as one sentence."""
    name = mapping(document.get("model")).get("name")
    model = tag("b", tag("bdi", name)) if name else "the model"
    data = mapping(document.get("data"))
    rows = [finite(mapping(data.get(side)).get("rows")) for side in ("train", "query")]
    n, m = (None if r is None else int(r) for r in rows)
    train, query = tag("b", count(n, "training example")), tag("b", count(m, "query", "queries"))
    command = document.get("command")
    if command == "mislabeled":
        about = [" carry a wrong label, judged by how they move the loss of ", model]
        return ["Which of ", train, *about, " on ", query, "?"]
    if command == "self-influence":
        return ["How strongly does each of ", train, " move its own loss under ", model, "?"]
    ask: list[object] = ["For each of ", query, ", which of ", train, " make the answer of ", model]
    ask.append(" better, and which make it worse?")
    if command == "identify":
        ask.append(" And do the helpful ones share the query's class?")
    return ask


def _reading() -> Markup:
    influence = tag(
        "p",
        tag("strong", "Influence"),
        " is the predicted change of a query's loss when one training example counts for a little "
        "more. A ",
        tag("strong", "negative"),
        " number means that the loss falls: the example helps and is called a proponent. A ",
        tag("strong", "positive"),
        " number means that it rises: the example harms and is called an opponent. Near zero, it "
        "hardly matters.",
    )
    sizes = tag(
        "p",
        "Sizes compare within one method, never between methods: each has its own unit. What "
        "counts is the order. Influence is a linear prediction about small changes, not the "
        "outcome of training the model anew.",
    )
    poles = tag(
        "div.poles",
        tag("span.helps", "\u2212 helps, proponent"),
        tag("i"),
        tag("span.harms", "harms, opponent +"),
        aria_hidden="true",
    )
    return join([tag("div.columns", influence, sizes), poles])


def _suspects(document: Mapping[str, Any]) -> Markup | None:
    listed = document.get("suspects")
    return None if listed is None else suspects_section(sequence(listed))


def _queries(document: Mapping[str, Any], rows: list[Contender]) -> Markup | None:
    if document.get("queries") is None:
        return None
    queries = sequence(document["queries"])
    if not queries:
        return tag("p", "This document lists no query.")
    named = [(str(r.data.get("method")), r.name) for r in rows if not r.baseline]
    words = "Bars compare sizes within one query and one method."
    if any(mapping(q).get("class") is not None for q in queries):
        words += (
            " The small squares count how many of the most helpful examples share the query's "
            "class; in the lists those examples are tinted and ticked."
        )
    return join([tag("p", words), queries_section(queries, named)])


def _certificates(rows: list[Contender]) -> Markup | None:
    cards = [
        certificate_card(row.name, row.style, row.data)
        for row in rows
        if not row.baseline and (row.data.get("certificate") is not None or row.data.get("blocks"))
    ]
    words = (
        "Most methods solve one linear system per block, W A = V, with V the query gradients and A "
        "the damped curvature of the training gradients. The residual ||V \u2212 W A|| / ||V|| is "
        "what is left over after the solve. It speaks about arithmetic only: how well influence "
        "describes the model is a question for the results above."
    )
    return join([tag("p", words), cards]) if cards else None


def _footer(document: Mapping[str, Any]) -> Markup:
    version = mapping(document.get("environment")).get("hyperinf_kernels")
    name = f"hyperinf_kernels {version}" if version is not None else "hyperinf_kernels"
    return tag("footer", tag("p", f"Made by {name} from report.json, which holds every figure."))

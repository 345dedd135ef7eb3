"""Hostile and broken report.json documents: nothing becomes markup, nothing undrawable is drawn."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest

from hyperinf_kernels.errors import InputError
from hyperinf_kernels.report.certificate import state
from hyperinf_kernels.report.markup import Markup, escape, join, passage, tag
from hyperinf_kernels.report.page import render_html
from tests.report_document import Document, Page, make_document

ATTACKS = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "--></title></style></textarea><svg onload=alert(1)>",
    "<!--<script>",
    "]]><a href=javascript:alert(1)>x</a>",
    "&lt;script&gt; &#x3c;b&#x3e;",
)
FREE_KEYS = ("seconds", "backends", "metrics")  # dictionaries whose keys are free text


def poison(value: Any, attack: str, *, keys: bool = False) -> Any:
    """A copy in which every string and every free key is `attack`."""
    if isinstance(value, dict):
        return {
            f"{k}{attack}" if keys else k: poison(v, attack, keys=k in FREE_KEYS)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [poison(v, attack) for v in value]
    return attack if isinstance(value, str) else value


def structure(html: str) -> list[tuple[str, tuple[str, ...]]]:
    """The elements of a page with the names of their attributes: what an injection would change."""
    return [(name, tuple(attributes)) for name, attributes in Page(html).elements]


@pytest.fixture(scope="module")
def hostile() -> Document:
    document = make_document(blocks=3, queries=2)
    document["environment"]["extra"] = "text"
    row = {"rank": "1", "id": "a", "score": 0.9, "prompt": "p", "label": "x", "corrupted": True}
    return {**document, "suspects": [row]}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_string_of_the_document_becomes_markup(hostile: Document, attack: str) -> None:
    html = render_html(poison(hostile, attack))
    assert structure(html) == structure(render_html(poison(hostile, "harmless words")))
    page = Page(html)
    shown = page.text.count(attack)
    assert shown > 100  # as text, character by character
    assert not [k for _, a in page.elements for k in a if k.startswith("on")]


def test_injection_in_the_example_lists_themselves() -> None:
    document = make_document(blocks=1, queries=1)
    example = document["queries"][0]["methods"]["hyperinf"]["helpful"][0]
    example.update(
        {"prompt": ATTACKS[0], "answer": ATTACKS[1], "class": ATTACKS[2], "id": ATTACKS[3]}
    )
    document["methods"][0]["blocks"][0]["block"] = ATTACKS[0]
    page = Page(render_html(document))
    for attack in ATTACKS[:4]:
        assert attack in page.text
    assert [n for n, _ in page.elements].count("script") == 1


def assert_drawable(html: str) -> None:
    """Every number in every SVG is finite, no box has a negative size."""
    for drawing in re.findall(r"<svg.*?</svg>", html, re.S):
        bare = re.sub(
            r"<title>.*?</title>|<text.*?</text>|aria-label=\".*?\"", "", drawing, flags=re.S
        )
        assert not re.search(r"\b(nan|inf|infinity|none)\b", bare.replace("dot none", ""), re.I)
        for size in re.findall(r'(?:width|height|r)="([^"]*)"', bare):
            assert float(size) >= 0


def test_an_ordinary_page_is_drawable() -> None:
    assert_drawable(render_html(make_document()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "0.5", 10**400])
def test_bad_numbers_anywhere_are_named_but_never_drawn(bad: Any) -> None:
    document = make_document(blocks=4, queries=1, methods=("hyperinf",))
    method = document["methods"][0]
    for key in ("residual", "condition_bound", "collapse_angle", "damping"):
        method["blocks"][1][key] = bad
    method["certificate"]["worst_residual"] = bad
    method["certificate"]["tolerance"] = bad
    method["metrics"]["same class"]["auc_mean"] = bad
    method["metrics"]["corrupted"] = {"auc": 0.7, "recall": bad}
    method["curves"][0]["x"][3] = bad
    method["histogram"]["counts"][2] = bad
    method["seconds"]["fit"] = bad
    document["queries"][0]["methods"]["hyperinf"]["helpful"][0]["influence"] = bad
    document["model"]["blocks"] = bad
    document["data"]["train"]["rows"] = bad
    document["seconds"]["gradients"] = bad
    document["suspects"] = [{"rank": 1, "id": 3, "score": bad, "prompt": "p"}]
    assert_drawable(render_html(document))


def test_residual_none_is_drawn_as_unreported_and_not_as_a_failure() -> None:
    document = make_document(blocks=4, queries=1, methods=("hyperinf",))
    blocks = document["methods"][0]["blocks"]
    blocks[2]["residual"] = None
    assert [state(b) for b in blocks] == ["good", "good", "none", "good"]
    page = Page(render_html(document))
    assert "no residual reported" in page.text
    assert "flagged block" not in page.text
    blocks[2]["residual"] = math.nan
    page = Page(render_html(document))
    assert state(blocks[2]) == "miss"
    assert "1 flagged block" in page.text


@pytest.mark.parametrize(
    "drop",
    [
        *("title", "command", "created", "seed", "environment", "model", "data", "seconds"),
        *("methods", "baselines", "queries", "suspects"),
    ],
)
def test_any_top_level_key_may_be_missing_null_or_empty(drop: str) -> None:
    document = make_document(blocks=2, queries=2)
    missing = {k: v for k, v in document.items() if k != drop}
    for other in (missing, {**missing, drop: None}, {**missing, drop: {}}, {**missing, drop: []}):
        page = Page(render_html(other))
        assert "How to read this" in page.text


def test_any_nested_key_may_be_missing() -> None:
    base = make_document(blocks=2, queries=1, methods=("hyperinf",))
    base["suspects"] = [
        {"rank": 1, "id": 5, "score": 0.9, "prompt": "p", "label": "x", "corrupted": None}
    ]
    paths: list[tuple[Any, ...]] = []

    def walk(value: Any, path: tuple[Any, ...]) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value[:1])
        for key, child in inner:
            if not isinstance(key, int):
                paths.append((*path, key))
            if isinstance(child, (dict, list)):
                walk(child, (*path, key))

    walk(base, ())
    assert len(paths) > 80
    for path in paths:
        if path == ("format",):
            continue
        document = copy.deepcopy(base)
        place: Any = document
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        Page(render_html(document))
        place[path[-1]] = None
        Page(render_html(document))


def test_the_smallest_document_and_the_wrong_format() -> None:
    page = Page(render_html({"format": 1}))
    assert "Influence report" in page.text
    assert "No method was run." in page.text
    for wrong in ({}, {"format": 2}, {"format": None}):
        with pytest.raises(InputError, match="format 1"):
            render_html(wrong)
    with pytest.raises(InputError, match="list"):
        render_html([1])  # type: ignore[arg-type]


def test_long_right_to_left_and_odd_texts_are_kept_and_folded() -> None:
    arabic, odd = "\u0645\u0631\u062d\u0628\u0627 " * 10, "a\x00b\x1b[31m\ud800 \U0001f600\u202eabc"
    document = make_document(blocks=1, queries=1)
    query = document["queries"][0]
    query.update({"prompt": arabic, "answer": odd, "class": "\u05e9\u05dc\u05d5\u05dd"})
    page = Page(html := render_html(document))
    assert arabic in page.text
    assert 'dir="auto"' in html
    html.encode("utf-8")  # a lone surrogate would raise here
    assert "\x00" not in html
    assert "\x1b" not in html
    assert "\U0001f600" in page.text
    long = "word " * 700
    folded = Page(passage(long))
    assert [n for n, _ in folded.elements].count("details") == 1
    assert "(1,500 more characters not shown)" in folded.text
    middling = "x" * 900  # one word, nothing to cut at
    assert Page(passage(middling)).text.replace("more", "") == middling


def test_only_tag_makes_markup() -> None:
    bold = tag("b", "x < y")
    assert bold == "<b>x &lt; y</b>"
    assert join([bold, "<i>", None, [1]]) == f"{bold}&lt;i&gt;1"
    assert not isinstance(f"{bold}", Markup)
    assert "&lt;b&gt;" in tag("p", f"{bold}")
    assert (
        tag("i.a.b", title='"<', hidden=True, id=None)
        == '<i class="a b" title="&quot;&lt;" hidden></i>'
    )
    assert escape("a\r\nb\x07") == "a\nb\ufffd"
    with pytest.raises(ValueError, match="not a finite number"):
        tag("rect", x=math.nan)

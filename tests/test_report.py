"""The HTML page of a report: complete, self-contained, usable without scripts, honest in words."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest

from hyperinf_kernels.cli.terminal import _verdict
from hyperinf_kernels.report.certificate import picture, verdict
from hyperinf_kernels.report.charts import Series, curves, histogram, ticks
from hyperinf_kernels.report.page import render_html
from hyperinf_kernels.report.text import number, read_metrics, seconds
from tests.report_document import URL_ATTRIBUTES, Document, Page, make_document


@pytest.fixture(scope="module")
def document() -> Document:
    return make_document()


@pytest.fixture(scope="module")
def html(document: Document) -> str:
    return render_html(document)


def test_page_is_balanced_with_unique_ids_and_living_links(html: str) -> None:
    page = Page(html)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    links = [str(a["href"]) for n, a in page.elements if n == "a"]
    assert links
    assert all(h.startswith("#") and h[1:] in ids for h in links)
    labels = [str(a["for"]) for n, a in page.elements if n == "label"]
    assert labels == ["pick0", "pick1", "pick2"]
    assert set(labels) <= set(ids)


def test_every_query_example_and_block_is_on_the_page(document: Document, html: str) -> None:
    page = Page(html)
    assert len(page.having("query")) == 20
    for query in document["queries"]:
        assert query["prompt"] in page.text
        for lists in query["methods"].values():
            for example in (*lists["helpful"], *lists["harmful"]):
                assert example["prompt"] in page.text
                assert number(example["influence"]) in page.text
    solved = document["methods"][0]["blocks"]
    for block in solved:  # once in the picture, once per method in a table, flagged ones in a list
        assert page.text.count(block["block"]) == 4 + (block["fallback"] is not None)
    assert len(page.having("hit")) == 120  # methods without a residual get no picture


def test_hovering_a_block_names_every_field_of_its_report(document: Document) -> None:
    block = document["methods"][0]["blocks"][17]
    drawn = Page(picture([block], None)).text
    assert block["block"] in drawn
    assert "shape: 8 \u00d7 576" in drawn
    assert "precision: fp64" in drawn
    assert "converged: yes" in drawn
    assert "fallback: residual 3e-4 missed the tolerance" in drawn
    for key in ("damping", "condition_bound", "residual"):
        assert number(block[key], 4) in drawn


def test_methods_are_chosen_by_style_rules_alone(html: str) -> None:
    page = Page(html)
    radios = [a for n, a in page.elements if n == "input" and a.get("type") == "radio"]
    assert [("checked" in a) for a in radios] == [True, False, False]
    for i in range(3):
        assert f"#pick{i}:checked~.queries .v{i}" in html
        assert len([a for a in page.having(f"v{i}") if "tally" not in str(a["class"])]) == 20
    assert (
        next(a for a in page.having("tools"))["hidden"] is None
    )  # a bare attribute: JS removes it


def test_page_asks_the_network_for_nothing(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|<object|<img", html, re.I)
    for name, attributes in Page(html).elements:
        for key in URL_ATTRIBUTES & attributes.keys():
            assert name == "a"
            assert str(attributes[key]).startswith("#")


def test_policy_allows_exactly_the_shipped_script(html: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    assert len(scripts) == 1
    assert html.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = next(a["content"] for n, a in Page(html).elements if "http-equiv" in a)
    assert policy is not None
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none';")


def test_flagged_blocks_are_listed_with_name_and_reason() -> None:
    document = make_document(blocks=30, queries=0)
    method = document["methods"][0]
    method["blocks"][5].update({"converged": False, "residual": 0.02, "fallback": None})
    method["certificate"] = {
        "certified": False,
        "worst_residual": 0.02,
        "summary": "1 block failed",
    }
    page = Page(render_html(document))
    assert "\u2717 Not certified. 1 block failed." in page.text
    assert "2 flagged blocks" in page.text
    assert len(page.having("flagged")) == 1
    assert f"{method['blocks'][5]['block']} did not converge; residual 0.02" in page.text
    assert "reason: residual 3e-4 missed the tolerance, solved directly in fp64" in page.text
    assert "1 part in 50, about 1 digit" in page.text


def test_a_certificate_that_its_blocks_contradict_is_called_out() -> None:
    blocks = make_document(blocks=3)["methods"][0]["blocks"]
    claim = {"certified": True, "worst_residual": 1e-7, "summary": "fine"}
    assert "But" not in verdict(claim, blocks)
    blocks[1]["converged"] = False
    assert "But 1 block below did not converge." in verdict(claim, blocks)
    assert "No certificate." in verdict({}, [])


def test_the_figure_in_words_is_the_scores_where_there_are_scores() -> None:
    claim = {"certified": False, "worst_residual": 1e-7, "worst_score_error": 0.02, "summary": "x"}
    words = verdict(claim, [])
    assert "scores are off by 0.02 of their size: beside the method in exact arithmetic" in words
    assert "right to 1 part in 50, about 1 digit." in words
    assert _verdict({"certificate": claim}) == "NOT CONVERGED, scores off by 2e-02"
    # a method whose scores come without a direction
    alone = claim | {"certified": True, "worst_residual": None}
    assert "unchecked" not in verdict(alone | {"certified": False}, [])
    assert _verdict({"certificate": alone}) == "certified, scores off by 2e-02"
    assert _verdict({"certificate": alone | {"worst_score_error": None}}) == "certified"


def test_collapsed_blocks_are_counted() -> None:
    blocks = make_document(blocks=6)["methods"][0]["blocks"]
    blocks[0]["collapse_angle"] = blocks[4]["collapse_angle"] = 0.2
    assert "In 2 blocks of 6" in verdict({"certified": True}, blocks)
    assert picture(blocks, None).count('class="dot low"') == 2


def test_six_methods_a_hundred_queries_and_many_blocks() -> None:
    methods = tuple(f"method {i}" for i in range(6))
    document = make_document(blocks=200, queries=100, methods=("hyperinf", *methods[1:]))
    page = Page(html := render_html(document))
    assert len(page.having("query")) == 100
    assert len(page.having("hit")) == 200
    assert "#pick5:checked~.queries .v5" in html
    assert "method 5" in page.text
    assert {f"c{i}" for i in range(6)} <= {
        c for a in page.having("mark") for c in str(a["class"]).split()
    }


def test_bars_measure_influence_against_the_largest_of_both_lists() -> None:
    document = make_document(blocks=1, queries=1, methods=("hyperinf",))
    lists = document["queries"][0]["methods"]["hyperinf"]
    lists["helpful"] = [{"id": 1, "influence": -50.0, "prompt": "a"}]
    lists["harmful"] = [
        {"id": 2, "influence": 200.0, "prompt": "b"},
        {"id": 3, "influence": -20, "prompt": "least"},
    ]
    cut = render_html(document).split('class="queries"')[1].split("</section>")[0]
    bars = re.findall(r'<i class="(\w+)" style="width:([\d.]+)%">', cut)
    # Colour follows the sign, not the list: the least helpful example can still help.
    assert bars == [("helps", "25.0"), ("harms", "100.0"), ("helps", "10.0")]


def test_same_class_examples_are_marked_in_words_shape_and_tally() -> None:
    document = make_document(blocks=1, queries=1, methods=("hyperinf",))
    query = document["queries"][0]
    query["class"] = "uppercase"
    helpful = query["methods"]["hyperinf"]["helpful"]
    for example, kind in zip(helpful, ["uppercase"] * 3 + ["pig latin"] * 2, strict=True):
        example.update({"class": kind, "corrupted": kind == "pig latin"})
    query["methods"]["hyperinf"]["harmful"] = []
    page = Page(render_html(document))
    assert len([a for n, a in page.elements if n == "li" and a.get("class") == "same"]) == 3
    assert (
        page.having("tally")[0]["title"]
        == "3 of the 5 most helpful examples share the query's class"
    )
    assert len(page.having("on")) == 3
    assert len(page.having("off")) == 2
    assert len(page.having("bad")) == 2
    assert page.text.count("\u2713 uppercase") == 3
    assert "None listed." in page.text


def test_suspects_table_says_how_many_were_really_wrong() -> None:
    rows = [
        {
            "rank": i,
            "id": 100 + i,
            "score": 1 / i,
            "prompt": f"row {i}",
            "label": "spam",
            "corrupted": c,
        }
        for i, c in enumerate([True, True, False, None], 1)
    ]
    document = {"format": 1, "command": "mislabeled", "suspects": rows}
    page = Page(render_html(document))
    assert "Of 3 listed rows whose truth is known, 2 (67%) really carry" in page.text
    assert all(f"row {i}" in page.text for i in range(1, 5))
    assert "unknown" in page.text
    assert "Which of training examples carry a wrong label" in page.text
    empty = Page(render_html({**document, "suspects": []}))
    assert "No training row was listed." in empty.text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("identify", "And do the helpful ones share the query's class?"),
        ("score", "For each of 20 queries, which of 900 training examples make the answer"),
        ("mislabeled", "Which of 900 training examples carry a wrong label, judged by how they"),
        ("self-influence", "How strongly does each of 900 training examples move its own loss"),
    ],
)
def test_the_question_is_asked_in_plain_words(document: Document, command: str, words: str) -> None:
    assert words in Page(render_html({**document, "command": command})).text


def test_a_baseline_that_wins_and_a_model_that_learned_nothing_are_said_aloud() -> None:
    document = make_document(blocks=1, queries=0)
    warnings = ("No method beats this baseline", "Tuning did not improve it")
    text = Page(render_html(document)).text
    assert not any(w in text for w in warnings)
    assert (
        "Best method: HyperINF (converged), AUC 0.981. Best baseline: token overlap, 0.713." in text
    )
    document["baselines"][0]["metrics"]["same class"]["auc_mean"] = 0.99
    document["model"]["skill"]["tuned"] = 0.01
    text = Page(render_html(document)).text
    assert all(w in text for w in warnings)


def test_chance_diagonal_only_where_both_axes_are_shares() -> None:
    def drawn(points: list[tuple[float, float]]) -> str:
        return curves(
            [Series("a", "c0", tuple(points)), Series("b", "b0", ((0, 0), (1, 1)))], "x", "y"
        )

    assert 'class="chance"' in drawn([(0, 0), (0.5, 1)])
    assert 'class="chance"' not in drawn([(0, 0), (7, 1)])
    assert 'class="line b0"' in drawn([(0, 0)])
    assert 'class="mark b0"' not in drawn([(0, 0)])
    assert "no points" in curves([Series("a", "c0")], "x", "y")
    long = Series.of("a", "c0", range(5001), range(5001))
    assert len(long.points) <= 402
    assert long.points[0] == (0, 0)
    assert long.points[-1] == (5000, 5000)


def test_histogram_colours_by_sign_and_refuses_what_does_not_fit() -> None:
    drawn = histogram([-2, -1, 0, 1], [4, 0, 2], signed=True)
    assert drawn.count("fill helps") == 2
    assert drawn.count("fill harms") == 1
    assert "fill plain" in histogram([0, 1], [3], signed=False)
    assert "log scale" in histogram([0, 1, 2, 3], [1, 1, 1000], signed=True)
    for edges, counts in (([0, 1], [1, 2]), ([], []), ([1, 1], [3]), ([0, 1], [-1])):
        assert "No histogram" in histogram(edges, counts, signed=True)


def test_text_helpers() -> None:
    shown: dict[Any, str] = {
        0.9816: "0.982",
        12_345: "12,345",
        -3.0: "\u22123",
        0: "0",
        1e-6: "10\u207b\u2076",
    }
    shown |= {
        999.6: "1,000",
        1.25e9: "1.25\u00d710\u2079",
        None: "\u2013",
        float("nan"): "not finite",
    }
    assert {k: number(k) for k in shown} == shown
    spans = {0.21: "210 ms", 31.04: "31.0 s", 179.8: "3 min 00 s", 7384: "2 h 03 min", -1: "\u2013"}
    assert {k: seconds(k) for k in spans} == spans
    metrics = read_metrics({"found": 0.2, "recall": 0.5, "auc_mean": 0.9, "auc_sd": 0.1})
    assert metrics == {"auc": (0.9, 0.1), "recall": (0.5, None), "found": (0.2, None)}
    assert list(metrics) == ["auc", "recall", "found"]
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(3, 3) == [3]


def test_json_on_disk_renders_like_the_document_itself(document: Document, html: str) -> None:
    assert render_html(json.loads(json.dumps(document))) == html


def test_rendering_leaves_the_document_alone(document: Document) -> None:
    before = json.dumps(document, sort_keys=True)
    render_html(document)
    assert json.dumps(document, sort_keys=True) == before

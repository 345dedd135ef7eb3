"""The figures of the HTML report: metrics beside their baselines, curves, histograms, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .charts import (
    BASELINE_STYLES,
    METHOD_STYLES,
    Series,
    curves,
    histogram,
    interval,
    legend,
    named,
    swatch,
)
from .markup import Markup, join, meter, table, tag
from .text import (
    Metrics,
    count,
    finite,
    fixed,
    mapping,
    mappings,
    number,
    read_metrics,
    seconds,
    sequence,
)

_METRIC_NAMES = {"auc": "AUC", "recall": "recall"}
_UNSIGNED = ("mislabeled", "self-influence")  # their scores rank rows: no side is the helpful one


@dataclass(frozen=True)
class Contender:
    """A method or a baseline: its name on the page, its CSS class, its part of the document."""

    name: str
    style: str
    data: Mapping[str, Any]
    baseline: bool


def contenders(document: Mapping[str, Any]) -> list[Contender]:
    """Methods first, then baselines, each with the colour or dashes it keeps over the page."""
    methods = mappings(document.get("methods"))
    baselines = mappings(document.get("baselines"))
    names = [str(m.get("label") or m.get("method") or "unnamed method") for m in methods]
    return [
        Contender(name, f"c{i % METHOD_STYLES}", m, baseline=False)
        for i, (name, m) in enumerate(zip(names, methods, strict=True))
    ] + [
        Contender(str(b.get("name") or "baseline"), f"b{i % BASELINE_STYLES}", b, baseline=True)
        for i, b in enumerate(baselines)
    ]


def results_section(document: Mapping[str, Any], rows: Sequence[Contender]) -> Markup:
    """The model's skill, a table per metric group, a line per method."""
    groups = list(dict.fromkeys(g for row in rows for g in mapping(row.data.get("metrics"))))
    skill = _skill(mapping(mapping(document.get("model")).get("skill")))
    note = "Mark: mean. Bar: one standard deviation. The tick on the AUC is chance, 0.5."
    lines = [_method_line(row) for row in rows if not row.baseline]
    return join(
        [
            skill,
            tag("div.grid", [_metric_card(g, rows) for g in groups]) if groups else None,
            tag("p.quiet", note) if groups else None,
            table("methods", ("method", "damping", "solves", "time"), lines) if lines else None,
            None if lines else tag("p", "No method was run."),
        ]
    )


def curves_section(rows: Sequence[Contender]) -> Markup | None:
    """One chart per curve name, with every method and baseline that has it."""
    charts: dict[str, list[tuple[Series, Mapping[str, Any]]]] = {}
    for row in rows:
        for curve in mappings(row.data.get("curves")):
            xs, ys = sequence(curve.get("x")), sequence(curve.get("y"))
            name = str(curve.get("name") or "curve")
            charts.setdefault(name, []).append((Series.of(row.name, row.style, xs, ys), curve))
    figures = []
    for name, found in charts.items():
        axes = [str(found[0][1].get(k) or "") for k in ("x_label", "y_label")]
        series = [s for s, _ in found]
        key = legend((swatch(s.style), s.label) for s in series)
        caption = tag("figcaption", tag("bdi", name))
        figures.append(tag("figure.card", caption, curves(series, axes[0], axes[1]), key))
    return tag("div.grid", figures) if figures else None


def histograms_section(document: Mapping[str, Any], rows: Sequence[Contender]) -> Markup | None:
    """How the scores of every method spread."""
    signed = document.get("command") not in _UNSIGNED
    figures = []
    for row in rows:
        if row.data.get("histogram") is not None:
            data = mapping(row.data["histogram"])
            chart = histogram(sequence(data.get("edges")), sequence(data.get("counts")), signed)
            caption = tag("figcaption", tag(f"span.key.{row.style}"), tag("bdi", row.name))
            figures.append(tag("figure.card", caption, chart))
    words = "Every score that was computed."
    if signed:
        words += " Left of zero the training example helps the query, right of zero it harms."
    return join([tag("p", words), tag("div.grid.three", figures)]) if figures else None


def run_section(document: Mapping[str, Any], rows: Sequence[Contender]) -> Markup | None:
    """Seconds by stage and by method, the environment, the backends that really ran."""
    environment = dict(mapping(document.get("environment")))
    backends = mapping(environment.pop("backends", None))
    times = [(str(k), v) for k, v in mapping(document.get("seconds")).items()]
    for row in rows:
        spent = mapping(row.data.get("seconds")).items()
        times += [(f"{row.name}: {k}", v) for k, v in spent]
    cards = [_times(times)] if times else []
    for title, values in (("Environment", environment), ("Backends that ran", backends)):
        if values:
            lines = [tag("tr", tag("th", k, scope="row"), tag("td", v)) for k, v in values.items()]
            cards.append(tag("div.card", tag("h3", title), table("pairs", (), lines)))
    return tag("div.grid", cards) if cards else None


def _times(times: Sequence[tuple[str, object]]) -> Markup:
    longest = max((t for _, v in times if (t := finite(v)) is not None), default=0.0)
    lines = [
        tag(
            "tr",
            tag("th", tag("bdi", name), scope="row"),
            tag("td.num", seconds(v)),
            tag("td.wide", meter(finite(v), longest, "plain")),
        )
        for name, v in times
    ]
    return tag("div.card.span", tag("h3", "Time by stage"), table("times", (), lines))


def _skill(skill: Mapping[str, Any]) -> Markup | None:
    base, tuned = finite(skill.get("base")), finite(skill.get("tuned"))
    if base is None and tuned is None:
        return None
    unit = f" ({skill['unit']})" if skill.get("unit") else ""
    before, after = tag("b", number(base)), tag("b", number(tuned))
    words = [f"The model's own skill{unit}: ", before, " before tuning, ", after, " after."]
    if base is not None and tuned is not None and tuned <= base:
        warning = (
            " Tuning did not improve it, so the figures below say little about what it learned."
        )
        words.append(tag("strong", warning))
    return tag("p.skill", words)


def _metric_card(group: str, rows: Sequence[Contender]) -> Markup:
    read = [(row, read_metrics(mapping(row.data.get("metrics")).get(group))) for row in rows]
    read = [(row, metrics) for row, metrics in read if metrics]
    names = list(dict.fromkeys(name for _, metrics in read for name in metrics))
    best = {
        n: max((v for _, r in read if (v := _mean(r, n)) is not None), default=None) for n in names
    }
    lines = []
    for row, metrics in read:
        cells = [_metric_cell(n, metrics, best[n], row.style) for n in names]
        heading = tag("th", named(row.style, row.name), scope="row")
        lines.append(tag("tr.baseline" if row.baseline else "tr", heading, cells))
    grid = table("metrics", ("", *(_METRIC_NAMES.get(n, n) for n in names)), lines)
    return tag("div.card", tag("h3", tag("bdi", group)), _finding(read), grid)


def _mean(metrics: Metrics, name: str) -> float | None:
    return metrics.get(name, (None, None))[0]


def _metric_cell(name: str, metrics: Metrics, best: float | None, style: str) -> Markup:
    mean, sd = metrics.get(name, (None, None))
    spread = tag("span.sd", f" \u00b1 {fixed(sd)}") if sd is not None else None
    kind = "td.metric.best" if mean is not None and mean == best else "td.metric"
    return tag(
        kind, interval(mean, sd, style, half="auc" in name), tag("span.figure", fixed(mean), spread)
    )


def _finding(read: Sequence[tuple[Contender, Metrics]]) -> Markup | None:
    """The best method and the best baseline by AUC, in words."""
    auc = [(v, row) for row, metrics in read if (v := _mean(metrics, "auc")) is not None]
    ours = [a for a in auc if not a[1].baseline]
    rivals = [a for a in auc if a[1].baseline]
    if not ours:
        return None
    top, winner = max(ours, key=lambda a: a[0])
    words: list[object] = [
        "Best method: ",
        tag("b", tag("bdi", winner.name)),
        f", AUC {fixed(top)}.",
    ]
    if rivals:
        bar, rival = max(rivals, key=lambda a: a[0])
        words += [" Best baseline: ", tag("bdi", rival.name), f", {fixed(bar)}."]
        if bar >= top:
            warning = " No method beats this baseline: for this question it is the better tool."
            words.append(tag("strong", warning))
    return tag("p", words)


def _method_line(row: Contender) -> Markup:
    certificate = mapping(row.data.get("certificate"))
    certified, worst = certificate.get("certified"), finite(certificate.get("worst_residual"))
    error = finite(certificate.get("worst_score_error"))
    blocks = len(sequence(row.data.get("blocks")))
    badge: list[object] = [number(None)]
    if certified is not None:
        good = certified is True
        badge = [
            tag(
                "span.ok" if good else "span.no",
                "\u2713 certified" if good else "\u2717 not certified",
            )
        ]
        badge.append(f", {count(blocks, 'block')}" if blocks else None)
        if error is not None:
            badge.append(f", scores off by {number(error)}")
        elif worst is not None:
            badge.append(f", worst residual {number(worst)}")
    times = [f"{k} {seconds(v)}" for k, v in mapping(row.data.get("seconds")).items()]
    return tag(
        "tr",
        tag("th", named(row.style, row.name), scope="row"),
        tag("td", row.data.get("damping") or number(None)),
        tag("td", badge),
        tag("td", ", ".join(times) or number(None)),
    )

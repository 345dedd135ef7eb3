"""Charts of the HTML report as inline SVG: curves, histograms, a mean with its spread.

Colours come from CSS classes, so that light, dark and print share one drawing. A method also has
its own marker shape and a baseline its own dash pattern: no chart needs colour to be read. Points
that are not finite are left out, never drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .markup import Markup, join, tag
from .text import finite, fixed, number, power_of_ten

METHOD_STYLES = 6  # colours c0..c5 in page.css, one marker shape each
BASELINE_STYLES = 4  # dash patterns b0..b3
_MAX_POINTS = 400  # per curve; more is invisible at this size
_SHAPES = {  # paths around the origin, about 8 units wide
    "c0": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "c1": "M-4 -4h8v8h-8z",
    "c2": "M0 -5l5 9h-10z",
    "c3": "M0 -5.5l5.5 5.5l-5.5 5.5l-5.5 -5.5z",
    "c4": "M0 5l5 -9h-10z",
    "c5": "M-1.8 -5.5h3.6v11h-3.6z",
}
_BINS_HIDDEN = 50  # a tallest bin so many times the median one calls for a log axis
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Series:
    """One line of a chart; `style` is its CSS class: c0, c1.. for methods, b0.. for baselines."""

    label: str
    style: str
    points: tuple[tuple[float, float], ...] = ()

    @staticmethod
    def of(label: str, style: str, xs: Iterable[object], ys: Iterable[object]) -> Series:
        """Keep the pairs in which both numbers are finite, thinned evenly to a drawable count."""
        both = [(finite(x), finite(y)) for x, y in zip(xs, ys, strict=False)]
        points = [(x, y) for x, y in both if x is not None and y is not None]
        kept = points[:: max(1, math.ceil(len(points) / _MAX_POINTS))]
        if points and kept[-1] != points[-1]:
            kept.append(points[-1])
        return Series(label, style, tuple(kept))


def linear(lo: float, hi: float, start: float, end: float) -> Scale:
    """Map [lo, hi] to [start, end]; an empty interval maps to the middle."""
    if not hi > lo:
        return lambda _: (start + end) / 2
    return lambda v: start + (v - lo) / (hi - lo) * (end - start)


def log_axis(values: Sequence[float], top: float, bottom: float) -> tuple[Scale, list[int]]:
    """A scale over whole decades, two at least, that holds all positive `values`; and its decades.

    What lies outside 1e-30 to 1e30 is drawn at the edge.
    """
    exponents = [_exponent(v) for v in values]
    lo = math.floor(min(exponents, default=-8) - 1e-9)
    hi = max(math.ceil(max(exponents, default=-6) + 1e-9), lo + 2)
    of_exponent = linear(lo, hi, bottom, top)
    return lambda v: of_exponent(_exponent(v)), list(range(lo, hi + 1))


def _exponent(value: float) -> float:
    return math.log10(min(max(value, 1e-30), 1e30))


def ticks(lo: float, hi: float, about: int = 5) -> list[float]:
    """Round values inside [lo, hi], roughly `about` of them."""
    raw = (hi - lo) / about
    if not raw > 0:
        return [lo]
    base = 10.0 ** math.floor(math.log10(raw))
    step = next((m * base for m in (1, 2, 2.5, 5) if m * base >= raw * 0.999), 10 * base)
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def svg(width: float, height: float, label: str, body: Iterable[Markup], kind: str = "") -> Markup:
    """An SVG of one size in its own units; `label` is for people who cannot see it."""
    view = f"0 0 {width:g} {height:g}"
    return tag(f"svg.chart.{kind}", list(body), viewBox=view, role="img", aria_label=label)


def label(x: float, y: float, words: str, anchor: str = "middle", kind: str = "tick") -> Markup:
    """Text at (x, y)."""
    return tag(f"text.{kind}", words, x=float(x), y=float(y), text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "gridline") -> Markup:
    """A straight line."""
    return tag(f"line.{kind}", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2))


def shape(kind: str, path: str, x: float, y: float, size: float = 1.0) -> Markup:
    """A path drawn around the origin, moved to (x, y)."""
    return tag(f"path.{kind}", transform=f"translate({x:.1f} {y:.1f}) scale({size:.2f})", d=path)


def marker(style: str, x: float, y: float, size: float = 1.0) -> Markup | None:
    """The mark of a method at (x, y); a baseline has none, its dashes tell it apart."""
    return shape(f"mark.{style}", _SHAPES[style], x, y, size) if style in _SHAPES else None


def named(style: str, name: str) -> Markup:
    """A sample of a series with its name, as the head of a table row."""
    return tag("span.who", swatch(style), tag("bdi", name))


def swatch(style: str) -> Markup:
    """A short sample of a series."""
    sample = line(1, 7, 27, 7, f"line.{style}"), marker(style, 14, 7, 0.9)
    return tag("svg.swatch", sample, viewBox="0 0 28 14", aria_hidden="true")


def legend(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """A list of samples with their names."""
    return tag("ul.legend", [tag("li", sample, tag("bdi", name)) for sample, name in entries])


def curves(series: Sequence[Series], x_label: str, y_label: str) -> Markup:
    """Several curves on one axis; where both axes are shares, the diagonal shows chance."""
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    if not xs:
        return tag("p.quiet", "This curve has no points.")
    shares = min(xs + ys) >= 0 and max(xs + ys) <= 1
    x_lo, x_hi, y_lo, y_hi = (0, 1, 0, 1) if shares else (min(xs), max(xs), min(ys), max(ys))
    left, right, top, bottom = 52.0, 452.0, 12.0, 342.0
    to_x, to_y = linear(x_lo, x_hi, left, right), linear(y_lo, y_hi, bottom, top)
    body: list[Markup | None] = []
    for t in ticks(y_lo, y_hi):
        body += [
            line(left, to_y(t), right, to_y(t)),
            label(left - 8, to_y(t) + 4, number(t), "end"),
        ]
    for t in ticks(x_lo, x_hi):
        body += [line(to_x(t), top, to_x(t), bottom), label(to_x(t), bottom + 18, number(t))]
    if shares:
        body.append(line(left, bottom, right, top, "chance"))
        body.append(label(right - 6, bottom - 10, "dotted diagonal: chance", "end"))
    for i, s in reversed(list(enumerate(series))):  # the first series ends up on top
        path = "L".join(f"{to_x(x):.1f} {to_y(y):.1f}" for x, y in s.points)
        body.append(tag(f"path.line.{s.style}", d=f"M{path}") if path else None)
        every = max(1, len(s.points) // 6)
        picked = s.points[every // 2 + (i * every) // 12 :: every]  # staggered, so marks stay apart
        body += [marker(s.style, to_x(x), to_y(y)) for x, y in picked]
    middle = (top + bottom) / 2
    body.append(label((left + right) / 2, bottom + 40, x_label, kind="axis"))
    turned = label(14, middle, y_label, kind="axis")
    body.append(tag("g", turned, transform=f"rotate(-90 14 {middle:g})"))
    words = f"{y_label} against {x_label} for {', '.join(s.label for s in series)}"
    return svg(464, 390, words, [b for b in body if b is not None])


def histogram(edges: Sequence[object], counts: Sequence[object], signed: bool) -> Markup:
    """Counts between edges. `signed` colours the bars by sign: helps below zero, harms above."""
    e = [x for v in edges if (x := finite(v)) is not None]
    n = [x for v in counts if (x := finite(v)) is not None and x >= 0]
    if (len(e), len(n)) != (len(edges), len(counts)) or len(e) != len(n) + 1 or not e[-1] > e[0]:
        return tag("p.quiet", "No histogram in this document.")
    left, right, top, bottom = 48.0, 348.0, 10.0, 140.0
    most = max(*n, 1.0)
    log = most > _BINS_HIDDEN * max(sorted(n)[len(n) // 2], 1.0)
    to_x = linear(e[0], e[-1], left, right)
    of_count = linear(0.0, math.log1p(most) if log else most, bottom, top)
    to_y: Scale = (lambda c: of_count(math.log1p(c))) if log else of_count
    decades = [10.0**i for i in range(math.floor(math.log10(most)) + 1)]
    body = []
    for t in decades[:: math.ceil(len(decades) / 4)] if log else ticks(0, most, 3):
        body += [
            line(left, to_y(t), right, to_y(t)),
            label(left - 6, to_y(t) + 4, number(t), "end"),
        ]
    for a, b, c in zip(e, e[1:], n, strict=False):
        kind = "plain" if not signed else "helps" if (a + b) / 2 < 0 else "harms"
        hint = tag("title", f"{number(a)} to {number(b)}: {number(c, 6)}")
        width = max(to_x(b) - to_x(a) - 0.8, 0.6)
        box = {"x": to_x(a), "y": to_y(c), "width": width, "height": bottom - to_y(c)}
        body.append(tag(f"rect.fill.{kind}", hint, **box))
    zero = to_x(0) if e[0] < 0 < e[-1] else left
    body.append(line(zero, top, zero, bottom, "zero"))
    shown = [(e[0], "start"), (e[-1], "end")] + [(0.0, "middle")] * (left + 70 < zero < right - 70)
    body += [label(to_x(v), bottom + 17, number(v), anchor) for v, anchor in shown]
    body.append(line(left, bottom, right, bottom, "base"))
    body.append(label(left, bottom + 36, "count (log scale)" if log else "count", "start"))
    return svg(356, 182, f"Histogram with {len(n)} bins", body)


def interval(mean: float | None, sd: float | None, style: str, *, half: bool) -> Markup:
    """A mean with its standard deviation on the axis from 0 to 1; `half` marks the middle."""
    to_x = linear(0, 1, 6, 174)
    body = [line(6, 12, 174, 12, "track")]
    body += [line(to_x(0.5), 5, to_x(0.5), 19, "half")] if half else []
    if mean is not None and 0 <= mean <= 1:
        if sd is not None:
            ends = to_x(max(0.0, mean - sd)), to_x(min(1.0, mean + sd))
            body.append(line(ends[0], 12, ends[1], 12, f"spread.{style}"))
        dot = marker(style, to_x(mean), 12, 1.1)
        body.append(dot or tag("circle.ring", cx=to_x(mean), cy=12, r=4.5))
    return svg(180, 24, f"{fixed(mean)} on a scale from 0 to 1", [join(body)], "interval")


def decade_grid(to_y: Scale, decades: Sequence[int], left: float, right: float) -> list[Markup]:
    """Grid lines for decades, thinned so that their labels never touch."""
    body: list[Markup] = []
    for i in decades[:: math.ceil(len(decades) / 6)]:
        y = to_y(10.0**i)
        body += [line(left, y, right, y), label(left - 8, y + 4, power_of_ten(i), "end")]
    return body

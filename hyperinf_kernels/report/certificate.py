"""The certificate in the HTML report: a verdict in words, a picture of every block, a table.

One column of the picture is one block, in model order. From top to bottom: the relative residual
||V - W A|| / ||V|| and the bound on the condition number (both on log axes), and the angle between
V and V A^-1, which is near zero where the inverse did little more than rescale the gradients.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from .charts import decade_grid, label, legend, line, linear, log_axis, shape, svg
from .markup import Markup, join, table, tag
from .text import count, finite, mapping, mappings, number, sequence

COLLAPSE_DEGREES = 5.0  # below this angle the solve changed little but the length of the gradients
Block = Mapping[str, Any]

_LEFT, _RIGHT, _WIDTH, _HEIGHT = 70.0, 948.0, 960, 412
_FIELDS = {
    "method": "method",
    "backend": "backend",
    "precision": "precision",
    "n": "samples",
    "shape": "shape",
    "damping": "damping",
    "condition_bound": "condition bound",
    "products": "products",
    "iterations": "iterations",
    "residual": "residual",
    "residual_by": "residual known by",
    "score_error": "error of scores",
    "score_error_by": "error known by",
    "converged": "converged",
    "collapse_angle": "collapse angle",
    "fallback": "fallback",
}
_STATES = {  # words and shape: colour never stands alone
    "good": ("converged", "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z"),
    "fell": ("solved by a fallback", "M0 -6l6 6l-6 6l-6 -6z"),
    "miss": ("did not converge", "M-6 -4l2 -2l4 4l4 -4l2 2l-4 4l4 4l-2 2l-4 -4l-4 4l-2 -2l4 -4z"),
    "none": ("no residual reported", "M-3 -3h6v6h-6z"),
}

_FLAGGED = ("miss", "fell")


def certificate_card(name: str, style: str, method: Mapping[str, Any]) -> Markup:
    """The whole certificate of one method."""
    blocks, certificate = mappings(method.get("blocks")), mapping(method.get("certificate"))
    if "certified" in certificate and certificate["certified"] is None:
        # nothing was solved: residuals and angles of the identity would only puzzle
        blocks = []
    parts = [tag("h3", tag(f"span.key.{style}"), tag("bdi", name)), verdict(certificate, blocks)]
    if blocks:
        ways = Counter(
            tuple(field(b, k) for k in ("method", "backend", "precision")) for b in blocks
        )
        used = [f"{count(n, 'block')} by {m} on {b} in {p}" for (m, b, p), n in ways.most_common()]
        parts.append(tag("p.quiet", f"Solved: {'; '.join(used)}."))
    if any(b.get("residual") is not None for b in blocks):
        seen = {state(b) for b in blocks}
        parts.append(tag("div.scroll", picture(blocks, finite(certificate.get("tolerance")))))
        parts.append(legend((_sample(s), words) for s, (words, _) in _STATES.items() if s in seen))
    flagged = [b for b in blocks if state(b) in _FLAGGED]
    if flagged:
        parts.append(tag("h4", count(len(flagged), "flagged block")))
        parts.append(tag("ul.flagged", [_flag(b) for b in flagged]))
    if blocks:
        rows = [
            tag(
                f"tr.{state(b)}",
                tag("th", b.get("block"), scope="row"),
                [tag("td", field(b, key)) for key in _FIELDS],
            )
            for b in blocks
        ]
        summary = tag("summary", f"{count(len(blocks), 'block')} as a table")
        parts.append(
            tag("details.fold", summary, table("blocks", ["block", *_FIELDS.values()], rows))
        )
    return tag("article.card.certificate", parts)


def verdict(certificate: Mapping[str, Any], blocks: Sequence[Block]) -> Markup:
    """The certificate in words: whether it holds, its worst figure, what that number means."""
    certified = certificate.get("certified")
    heading, kind = "No certificate.", "none"
    if certified is not None:
        good = certified is True
        heading = "\u2713 Certified." if good else "\u2717 Not certified."
        kind = "good" if good else "miss"
    words: list[object] = [tag("strong", heading)]
    if certificate.get("summary"):
        summary = str(certificate["summary"]).strip().rstrip(".")
        words.append(f"{summary[:1].upper()}{summary[1:]}.")
    worst, error = (finite(certificate.get(f"worst_{k}")) for k in ("residual", "score_error"))
    if worst is None:
        worst = max(
            (r for b in blocks if (r := finite(b.get("residual"))) is not None), default=None
        )
    if error is not None:
        words.append(
            f"The worst query's scores are off by {number(error)} of their size: "
            f"{_meaning_for_scores(error)}"
        )
    elif worst is None and ("certified" not in certificate or certified is False):
        words.append("No residual was reported, so the arithmetic is unchecked.")
    elif worst is not None:
        words.append(f"The worst relative residual is {number(worst)}: {_meaning(worst)}")
    missed = sum(state(b) == "miss" for b in blocks)
    if certified is True and missed:
        words.append(tag("strong", f"But {count(missed, 'block')} below did not converge."))
    angles = [a for b in blocks if (a := finite(b.get("collapse_angle"))) is not None]
    collapsed = sum(a < COLLAPSE_DEGREES for a in angles)
    if collapsed:
        words.append(
            f"In {count(collapsed, 'block')} of {len(blocks):,} the inverse turned the gradients "
            f"by less than {number(COLLAPSE_DEGREES)}\u00b0: there it ranks almost like a "
            "plain gradient product."
        )
    return tag(f"p.verdict.{kind}", [[w, " "] for w in words])


def state(block: Block) -> str:
    """'miss', 'fell', 'none' or 'good': the worst thing that a block's report says."""
    residual = block.get("residual")
    if block.get("converged") is False or (residual is not None and finite(residual) is None):
        return "miss"
    if block.get("fallback"):
        return "fell"
    return "none" if residual is None else "good"


def field(block: Block, key: str) -> str:
    """One field of a block's report as text."""
    value = block.get(key)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{number(value)}\u00b0" if key == "collapse_angle" else number(value, 4)
    if sequence(value):
        return " \u00d7 ".join(str(v) for v in sequence(value))
    return number(None) if value in (None, "") else str(value)


def picture(blocks: Sequence[Block], tolerance: float | None) -> Markup:
    """Every block as a column of dots; hovering one shows all fields of its report."""
    step = (_RIGHT - _LEFT) / len(blocks)
    xs = [_LEFT + (i + 0.5) * step for i in range(len(blocks))]
    size = max(0.35, min(1.0, step / 9))
    body = _layers(blocks, step)
    body.append(label(_LEFT, 17, "relative residual", "start", "axis"))
    body += _residuals(blocks, xs, 24, 174, size, tolerance)
    body.append(label(_LEFT, 203, "bound on the condition number", "start", "axis"))
    conditions = [finite(b.get("condition_bound")) for b in blocks]
    conditions = [c if c is not None and c > 0 else None for c in conditions]
    to_y, decades = log_axis([c for c in conditions if c is not None], 210, 280)
    body += decade_grid(to_y, decades, _LEFT, _RIGHT)
    body += [_stem(x, to_y(c), 280, size) for x, c in zip(xs, conditions, strict=True) if c]
    words = f"angle between V and V A\u207b\u00b9, marked where below {COLLAPSE_DEGREES:g}\u00b0"
    body.append(label(_LEFT, 309, words, "start", "axis"))
    to_y = linear(0, 90, 386, 316)
    for t in (0, 45, 90):
        body.append(line(_LEFT, to_y(t), _RIGHT, to_y(t)))
        body.append(label(_LEFT - 8, to_y(t) + 4, f"{t}\u00b0", "end"))
    for x, block in zip(xs, blocks, strict=True):
        angle = finite(block.get("collapse_angle"))
        if angle is not None:
            kind = "low" if angle < COLLAPSE_DEGREES else "info"
            body.append(_stem(x, to_y(min(max(angle, 0.0), 90.0)), 386, size, kind))
    for x, block in zip(xs, blocks, strict=True):
        lines = [str(block.get("block")), *(f"{n}: {field(block, k)}" for k, n in _FIELDS.items())]
        hint = tag("title", "\n".join(lines))
        body.append(tag("rect.hit", hint, x=x - step / 2, y=8, width=step, height=380))
    return svg(_WIDTH, _HEIGHT, f"Solver report of {count(len(blocks), 'block')}", body, "wide")


def _residuals(
    blocks: Sequence[Block],
    xs: Sequence[float],
    top: float,
    bottom: float,
    size: float,
    tolerance: float | None,
) -> list[Markup]:
    residuals = [finite(b.get("residual")) for b in blocks]
    limits = [tolerance] if tolerance is not None and tolerance > 0 else []
    to_y, decades = log_axis(
        [r for r in (*residuals, *limits) if r is not None and r > 0], top, bottom
    )
    body: list[Markup] = []
    for y, limit in ((to_y(v), v) for v in limits):
        box = {"x": _LEFT, "y": y, "width": _RIGHT - _LEFT, "height": bottom - y}
        body += [tag("rect.band", **box), line(_LEFT, y, _RIGHT, y, "limit")]
        body.append(label(_RIGHT, y - 5, f"tolerance {number(limit)}", "end"))
    body += decade_grid(to_y, decades, _LEFT, _RIGHT)
    for x, block, residual in zip(xs, blocks, residuals, strict=True):
        if residual is not None and residual > 0:
            y = to_y(residual)
        else:  # exact or not reported: on the floor; not finite: at the ceiling
            y = bottom if residual is not None or block.get("residual") is None else top
        kind = state(block)
        scale = max(size, 0.9) if kind in _FLAGGED else size
        body.append(shape(f"dot.{kind}", _STATES[kind][1], x, y, scale))
    return body


def _stem(x: float, y: float, bottom: float, size: float, kind: str = "info") -> Markup:
    dot = tag(f"circle.dot.{kind}", cx=x, cy=y, r=3.2 * size)
    return join([line(x, bottom, x, y, "stem"), dot])


def _layers(blocks: Sequence[Block], step: float) -> list[Markup]:
    """Shade every second run of equal layer numbers and write the numbers below the picture."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", str(b.get("block"))) for b in blocks]
    runs = [(k, len(list(g))) for k, g in groupby(m.group(1) if m else "" for m in found)]
    if len(runs) < 2:
        return []
    body, x, free = [label(_LEFT - 8, 404, "layer", "end")], _LEFT, 0.0
    for i, (layer, length) in enumerate(runs):
        width = length * step
        if i % 2:
            body.append(tag("rect.stripe", x=x, y=24, width=width, height=362))
        if layer and x + width / 2 > free:
            body.append(label(x + width / 2, 404, layer))
            free = x + width / 2 + 26
        x += width
    return body


def _sample(kind: str) -> Markup:
    mark = shape(f"dot.{kind}", _STATES[kind][1], 14, 7)
    return tag("svg.swatch", mark, viewBox="0 0 28 14", aria_hidden="true")


def _flag(block: Block) -> Markup:
    reason = str(block.get("fallback") or "no reason given")
    words = f" {_STATES[state(block)][0]}; residual {field(block, 'residual')}; reason: {reason}"
    return tag("li", tag("code", block.get("block")), words)


def _large(x: float) -> str:
    """A number above ten in words, with one significant digit."""
    rounded = float(f"{x:.1g}")
    for name, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if size <= rounded < 1e3 * size:
            return f"{rounded / size:,.0f} {name}"
    return number(rounded)


def _meaning(worst: float) -> str:
    if worst <= 0:
        return "the solved vectors reproduce the query gradients exactly."
    if worst >= 0.1:
        return (
            "the solved vectors do not reproduce the query gradients. Do not rely on these scores."
        )
    return (
        "multiplied back by the damped matrix, the solved vectors reproduce the query gradients to "
        f"{_share(worst)}."
    )


def _meaning_for_scores(error: float) -> str:
    if error <= 0:
        return "they are the method's own, digit for digit."
    if error >= 0.1:
        return "do not rely on these scores."
    return f"beside the method in exact arithmetic they are right to {_share(error)}."


def _share(part: float) -> str:
    digits = math.floor(-math.log10(part) + 1e-9)
    return f"1 part in {_large(1 / part)}, about {count(digits, 'digit')}"

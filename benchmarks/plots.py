"""Bars of every case's providers on a logarithmic axis of seconds."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from .registry import RESULTS, Measurement

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(name: str, rows: list[Measurement]) -> Path:
    """`results/NAME.png`: one panel per case, shorter bars are faster."""
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.7 + 0.9 * len(cases) + 0.25 * len(rows)), squeeze=False
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = [row for row in rows if row.case == case]
        axis.barh([row.provider for row in chosen], [row.median for row in chosen], color="#3b6ea5")
        for i, row in enumerate(chosen):
            axis.text(row.median, i, f"  {row.median:.3g} s, {row.ratio:.3g}x", va="center")
        axis.set_xscale("log")
        axis.set_xlim(right=max(row.median for row in chosen) * 8)
        axis.invert_yaxis()
        axis.set_title(case, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("seconds (median), and how many times faster than the baseline")
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path

"""The convergence figure: error against dense products, one panel per cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..store.files import atomic
from .convergence import (
    CERTIFIED,
    CHOLESKY,
    DATAINF,
    LISSA,
    OURS,
    PLAIN,
    REFINED,
    RELEASED,
    Cell,
)

STYLE: dict[str, dict[str, Any]] = {
    RELEASED: {"color": "#b5483a", "marker": ".", "markersize": 4},
    PLAIN: {"color": "#d99a3d", "marker": ".", "markersize": 4},
    OURS: {"color": "#2f6db3", "marker": "o", "markersize": 5},
    CERTIFIED: {"color": "#2f6db3", "marker": "s", "linestyle": "none"},
    REFINED: {"color": "#15406f", "marker": "*", "markersize": 9, "linestyle": "none"},
    LISSA: {"color": "#777777", "linestyle": ":"},
    DATAINF: {"color": "#8d5ea8", "linestyle": "--"},
    CHOLESKY: {"color": "#3c8a54", "linestyle": "--"},
}
NOTE = {LISSA: "LiSSA (by its vector steps)", CERTIFIED: "schulz_inverse, certified",
        REFINED: "schulz_solve, thin refinement"}  # fmt: skip


def pyplot() -> Any:
    """matplotlib, or the extra that brings it."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(
            "the figure needs matplotlib: pip install 'hyperinf_kernels[cli]'; or leave --output "
            "out for the table alone"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Write the figure as PNG."""
    plt = pyplot()
    columns = min(4, len(cells))
    rows, entries = -(-len(cells) // columns), 2 * columns
    below = 0.55 + 0.2 * -(-len(STYLE) // entries)  # inches for the axis label and the legend
    height = 3.4 * rows + below
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.8 * columns, height), squeeze=False, sharey=True
    )
    flat = list(axes.flat)
    for axis, cell in zip(flat, cells, strict=False):
        last = max(curve.products[-1] for curve in cell.curves)
        for curve in cell.curves:
            label, style = NOTE.get(curve.method, curve.method), STYLE[curve.method]
            errors = [max(error / cell.norm, 1e-9) for error in curve.errors]
            if curve.method in (DATAINF, CHOLESKY):
                axis.axhline(errors[0], label=label, linewidth=1.2, **style)
            else:
                axis.plot(curve.products, errors, label=label, linewidth=1.4, **style)
        axis.set(yscale="log", xlim=(0, last + 2), title=f"N = {cell.samples}, d = {cell.d}")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in flat[len(cells) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("relative error of A$^{-1}$v")
    figure.tight_layout(rect=(0, below / height, 1, 1))
    figure.text(0.5, (below - 0.2) / height, "dense d x d products", ha="center", fontsize=10)
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=entries, fontsize=8, frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)

"""What `hyperinf plan` says: the route, predicted cost and memory of every group of blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def plan_table(document: Mapping[str, Any]) -> None:
    """The document as a table on stderr, a line per method, shape and route."""
    table = Table(
        title=f"{document['train']} training rows, {document['queries']} queries. Predicted: "
        "curvature, solve and scores, without the gradients",
        caption=f"rates {document['rates']}",
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for head in ("method", "blocks", "shape", "route", "seconds", "Gflop", "kept MiB"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for method in document["methods"]:
        groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for block in method["blocks"]:
            groups.setdefault((*block["shape"], block["route"]), []).append(block)
        for i, ((r, d, route), members) in enumerate(groups.items()):
            table.add_row(
                method["label"] if i == 0 else "", str(len(members)), f"{r} x {d}", route,
                *_figures(members),
            )  # fmt: skip
        if len(groups) > 1:
            table.add_row("", str(len(method["blocks"])), "", "in all", *_figures([method]))
    Console(stderr=True, markup=False).print(table)


def _figures(entries: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    seconds, flops, kept = (
        sum(entry[key] for entry in entries) for key in ("seconds", "flops", "kept_bytes")
    )
    return f"{seconds:.3g}", f"{flops / 1e9:.4g}", f"{kept / 2**20:.4g}"

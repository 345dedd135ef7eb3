"""Every GPU kernel as compiled: the Triton kernels here and now, the CUDA kernels at build time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..errors import InputError
from ..ops import native
from .terminal import Bars


def triton_rows() -> Iterator[dict[str, Any]]:
    """One per shipped configuration and architecture, compiled one after another.

    Raises:
        InputError: no Triton that can compile.
    """
    from ..ops.triton import aot

    try:
        for row in aot.rows():
            yield {"backend": "triton", **row}
    except RuntimeError as error:
        raise InputError(str(error)) from error


def cuda_rows() -> list[dict[str, Any]]:
    """One per kernel and architecture of the extension, as ptxas reported it during the build.

    They are compiled together, so a single one has no compile time of its own.
    """
    facts = native.build_info()
    kernels = [] if isinstance(facts, str) else facts["cuda_kernels"]
    return [
        {"backend": "cuda", "config": {}, "compile_s": None, "instructions": None, **row}
        for row in kernels
    ]


def show(as_json: bool) -> None:
    """The table on stderr, or all of it as one JSON document on stdout."""
    from ..ops.triton import aot

    rows = []
    with Bars() as bars:
        for row in triton_rows():
            rows.append(row)
            bars.advance("kernels", len(rows), aot.total())
    rows += cuda_rows()
    if as_json:
        print(json.dumps({"format": 1, "kernels": rows}))
    _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    view = Table(title="GPU kernels as compiled", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("backend", "kernel", "settings"):
        view.add_column(head, overflow="fold")
    for head in ("arch", "registers", "spilled", "shared", "compile s"):
        view.add_column(head, justify="right")
    for row in rows:
        settings = " ".join(f"{k}={v}" for k, v in row["config"].items() if v is not None)
        seconds = "" if row["compile_s"] is None else f"{row['compile_s']:.1f}"
        figures = (row["registers"], row["spill_bytes"], row["shared_bytes"])
        view.add_row(row["backend"], row["kernel"], settings, row["arch"],
                     *map(str, figures), seconds)  # fmt: skip
    Console(stderr=True, markup=False).print(view)

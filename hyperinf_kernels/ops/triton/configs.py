"""Launch configurations: one table, keyed by kernel, architecture, precision and size.

The rows are in configs.json. They are chosen at the call without any measurement, so the order of
every sum depends on shapes and architecture alone. `tune` rewrites the file on a machine with a
GPU.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ARCHS = (80, 90, 100)
PATH = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """One row: what a kernel is launched with on problems of side or width up to `up_to`."""

    kernel: str
    arch: int
    precision: str
    up_to: int | None
    blocks: dict[str, int]
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return {
            **self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }  # fmt: skip


@functools.cache
def shipped() -> tuple[Config, ...]:
    """Every row of configs.json."""
    return tuple(Config(**row) for row in json.loads(PATH.read_text(encoding="utf-8")))


_trial: list[tuple[Config, ...]] = []


def table() -> tuple[Config, ...]:
    """The rows that launches are served from."""
    return _trial[-1] if _trial else shipped()


@contextmanager
def serving(rows: tuple[Config, ...]) -> Iterator[None]:
    """Serve launches inside the block from `rows`; for the tuner."""
    _trial.append(rows)
    choose.cache_clear()
    try:
        yield
    finally:
        _trial.pop()
        choose.cache_clear()


def write(rows: tuple[Config, ...], path: Path = PATH) -> None:
    """Write the table, one row a line."""
    lines = ",\n".join("  " + json.dumps(row._asdict()) for row in rows)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def rows_of(major: int, minor: int) -> int:
    """The architecture whose rows serve a device of this capability.

    Cards of capability 8.6, 8.9 and 12.x have sm_80's instructions and less shared memory, which
    sm_80's rows respect.

    Raises:
        ValueError: older than 8.0.
    """
    if major < 8:
        raise ValueError(
            f"Triton kernels need compute capability 8.0, this device has {major}.{minor}"
        )
    return {9: 90, 10: 100}.get(major, 80)


def arch_for(capability: tuple[int, int] | None) -> int:
    """`rows_of` a machine's capability; without a GPU kernels are interpreted with sm_80's rows."""
    return rows_of(*capability) if capability else ARCHS[0]


def shown(config: Config, **more: Any) -> dict[str, Any]:
    """What `Plan.config` tells about a row of the table."""
    warps = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return {"arch": f"sm_{config.arch}", **more, **config.blocks, **warps}


@functools.cache
def choose(kernel: str, arch: int, precision: str, size: int) -> Config:
    """The first row for this kernel, architecture and precision that reaches `size`.

    Raises:
        LookupError: there is none; the message names what there is.
    """
    reached = [
        row for row in table() if (row.kernel, row.arch, row.precision) == (kernel, arch, precision)
    ]
    for row in reached:
        if row.up_to is None or size <= row.up_to:
            return row
    sizes = ", ".join(str(row.up_to) for row in reached) or "none"
    raise LookupError(
        f"no {kernel} configuration for sm_{arch}, {precision}, size {size} (sizes up to: {sizes})"
    )

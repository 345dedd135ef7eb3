"""Exact influence with rows, Gram matrix and factor in memory, and in files.

Each runs in a process of its own. What counts is memory that belongs to no file, sampled while the
scores are worked out: the pages of mapped files go whenever the system wants them to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import torch

import hyperinf_kernels as hk

from .memory import status
from .registry import Measurement, benchmark

HELD, IN_FILES = "Exact()", "Exact(folder=...)"
BATCH, RANK, QUERIES = 500, 16, 10


@benchmark("out-of-core")
def out_of_core(quick: bool) -> Iterator[Measurement]:
    """Scores of as many rows as make K larger than what is kept in memory."""
    rows, width = (2000, 2048) if quick else (20_000, 20_480)
    case = f"exact, {rows} rows x {width}, {QUERIES} queries"
    base: float | None = None
    with tempfile.TemporaryDirectory() as folder:
        for provider, where in ((HELD, ""), (IN_FILES, folder)):
            command = [sys.executable, "-m", __name__, str(rows), str(width), where]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, peak, error = json.loads(ran.stdout)
            base = base or seconds
            yield Measurement(
                case, provider, seconds, seconds, seconds, 1, base / seconds, error,
                note=f"peak {peak / 2**30:.2f} GiB in no file, rows included; error as certified",
            )  # fmt: skip


def _run(rows: int, width: int, folder: str) -> tuple[float, int, float]:
    """Seconds, largest anonymous memory in bytes and the certified error of one run."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, status("RssAnon"))

    generator = torch.Generator().manual_seed(0)
    shape = (RANK, width // RANK)
    solver = hk.Exact(folder=folder or None)
    for _ in range(0, rows, BATCH):
        solver.update({"b": torch.randn(BATCH, *shape, generator=generator)}, copy=False)
    query = {"b": torch.randn(QUERIES, *shape, generator=generator)}
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        solver.fit().scores(query)
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    (entry,) = solver.report()
    return seconds, peak, float(entry.residual or 0.0)


if __name__ == "__main__":
    print(json.dumps(_run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))

"""A small registry: a benchmark is a generator of measurements, the rest is shared.

A benchmark file decorates one function with `@benchmark("name")`. It yields `Measurement`s; the
runner adds versions, device, load and git revision, writes `results/NAME.csv` and draws
`results/NAME.png`. Providers of one case are timed `interleaved`, so that a busy moment of the
machine hits all of them; only the whole job is too long for that and runs once.
"""

from __future__ import annotations

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measurement:
    """Seconds of one provider on one case: median and the 20 and 80 percent quantiles.

    `error` is the relative error against fp64 where the provider returns numbers; `ratio` is the
    baseline's median over this one's, so above 1 means faster than the baseline; `work` and `unit`
    say what was processed in that time.
    """

    case: str
    provider: str
    median: float
    low: float
    high: float
    repeats: int
    ratio: float
    error: float | None = None
    work: float | None = None
    unit: str = ""
    note: str = ""


Benchmark = Callable[[bool], Iterator[Measurement]]
BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str) -> Callable[[Benchmark], Benchmark]:
    """Register a function `(quick) -> measurements` under a name."""

    def register(function: Benchmark) -> Benchmark:
        BENCHMARKS[name] = function
        return function

    return register


def interleaved(
    providers: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Seconds of every provider, one call of each in turn, `repeats` times."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats):
        for name, call in providers.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def measurements(
    case: str,
    times: Mapping[str, list[float]],
    baseline: str,
    errors: Mapping[str, float] | None = None,
    work: float | None = None,
    unit: str = "",
) -> Iterator[Measurement]:
    """One `Measurement` per provider, with ratios to the baseline's median."""
    reference = statistics.median(times[baseline])
    for provider, values in times.items():
        ordered = sorted(values)
        middle = statistics.median(ordered)
        yield Measurement(
            case=case,
            provider=provider,
            median=middle,
            low=ordered[int(0.2 * (len(ordered) - 1))],
            high=ordered[round(0.8 * (len(ordered) - 1))],
            repeats=len(ordered),
            ratio=reference / middle,
            error=None if errors is None else errors.get(provider),
            work=work,
            unit=unit,
        )


def shown(rows: Iterator[Measurement]) -> list[Measurement]:
    """All rows of a benchmark, each printed as soon as it is there."""
    kept = []
    for row in rows:
        error = "" if row.error is None else f"  error {row.error:.1e}"
        rate = "" if row.work is None else f"  {row.work / row.median:.0f} {row.unit}/s"
        print(
            f"  {row.case:58} {row.provider:28} {row.median:9.4g} s {row.ratio:8.2f}x{rate}{error}"
            f"  {row.note}",
            flush=True,
        )
        kept.append(row)
    return kept


def environment() -> dict[str, object]:
    """What every row of a result carries."""
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "revision": revision.stdout.strip() + ("+" if changed.stdout.strip() else ""),
    }


def write(name: str, rows: list[Measurement]) -> Path:
    """`results/NAME.csv`, one row per case and provider."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    facts = environment()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *facts])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | facts)
    return path

"""What the command line shows on stderr: progress bars and the closing table."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import printable

NAMES = {
    "train": "training gradients",
    "query": "query gradients",
    "fine-tune": "fine-tuning, steps",
    "methods": "methods",
}


def quiet_libraries() -> None:
    """Keep the libraries' own bars, advice and deprecation notes out of the way.

    Warnings that remain take one line each.
    """
    warnings.formatwarning = _one_line
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        from transformers.utils import logging as hf_logging
    except ImportError:
        return  # the job itself says which extra is missing
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


def _one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    line: str | None = None,
) -> str:  # fmt: skip
    """A warning without the place in our code that gave it."""
    return f"warning: {printable(' '.join(str(message).split()))}\n"


class Bars:
    """One bar per stage of a job, from its first news on; a stage that starts again gets a new bar.

    A job that fails takes its bars away with it, so that the error stands alone. An interrupt is
    remembered: one that strikes where Python cannot raise, as in a destructor, ends the job at its
    next news.
    """

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("{task.description:>22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(stderr=True),
        )
        self.tasks: dict[str, Any] = {}
        self.last: dict[str, int] = {}
        self.interrupted = False
        self._before: Any = None

    def __enter__(self) -> Bars:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # the live display itself: stopping the progress adds an empty line
        self.progress.live.transient = kind is not None
        self.progress.live.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: object) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def advance(self, stage: str, done: int, total: int | None) -> None:
        """A `Progress` callback of the package."""
        if self.interrupted:
            raise KeyboardInterrupt
        # starting again does nothing
        self.progress.start()
        if stage not in self.tasks or done <= self.last[stage]:
            self.tasks[stage] = self.progress.add_task(NAMES.get(stage, stage), total=total)
        self.last[stage] = done
        self.progress.update(self.tasks[stage], completed=done, total=total)


def closing_table(document: Mapping[str, Any], output: Path) -> None:
    """Methods with their metrics and certificates, the trivial detectors, and where to look."""
    groups: dict[str, list[str]] = {}
    contenders = [*document["methods"], *document.get("baselines", [])]
    for entry in contenders:
        for group, values in entry.get("metrics", {}).items():
            known = groups.setdefault(group, [])
            known += [m for m in ("auc", "recall") if _cell(values, m) and m not in known]
    table = Table(title=document["title"], title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method")
    for group, metrics in groups.items():
        for metric in metrics:
            table.add_column(f"{group}\n{metric}", justify="right")
    table.add_column("certificate")
    for entry in contenders:
        cells = [
            _cell(entry.get("metrics", {}).get(group, {}), metric)
            for group, metrics in groups.items()
            for metric in metrics
        ]
        table.add_row(entry.get("label") or entry["name"], *cells, _verdict(entry))
    # labels, block names and paths may hold brackets
    console = Console(stderr=True, markup=False)
    console.print(table)
    for entry in document["methods"]:
        certificate = entry["certificate"]
        if certificate["certified"] is False or certificate["collapsed_blocks"]:
            console.print(f"{entry['label']}: {certificate['summary']}")
    skill = document["model"].get("skill")
    if skill:
        console.print(f"{skill['unit']}: {skill['base']:.3f} before, {skill['tuned']:.3f} after")
    console.print(_spent(document))
    console.print(f"report: {output / 'report.html'}", soft_wrap=True)


def fitted_lines(document: Mapping[str, Any]) -> None:
    """What was fitted, on what, and how to use it."""
    console = Console(stderr=True, markup=False)
    train, model = document["train"], document["model"]
    console.print(
        f"{document['method']}, {document['loss']}: {train['rows']} training rows, "
        f"{model['blocks']} blocks"
    )
    console.print(_spent(document))
    console.print(f"use it: hyperinf score --fitted {document['output']}", soft_wrap=True)


def rows_seen(document: Mapping[str, Any], as_json: bool) -> None:
    """Rows as the model sees them, on stdout."""
    from ..workloads.shown import as_text

    encoding = sys.stdout.encoding or "utf-8"
    for text in () if as_json else map(as_text, document["rows"]):
        print(text.encode(encoding, "backslashreplace").decode(encoding))


def _spent(document: Mapping[str, Any]) -> str:
    parts = (f"{name} {value:.1f} s" for name, value in document["seconds"].items())
    return f"time: {', '.join(parts)}"


def _verdict(entry: Mapping[str, Any]) -> str:
    """The certificate in a few words; its full sentence is in the report."""
    certificate = entry.get("certificate")
    if certificate is None:
        return "needs no influence"
    if certificate["certified"] is None:
        return "nothing to solve"
    verdict = "certified" if certificate["certified"] else "NOT CONVERGED"
    for key, words in (("worst_score_error", "scores off by"), ("worst_residual", "residual")):
        if certificate.get(key) is not None:
            return f"{verdict}, {words} {certificate[key]:.0e}"
    return verdict


def _cell(values: Mapping[str, float], metric: str) -> str:
    if f"{metric}_mean" in values:
        return f"{values[f'{metric}_mean']:.3f}±{values[f'{metric}_sd']:.3f}"
    return f"{values[metric]:.3f}" if metric in values else ""

"""What a job leaves behind, written at once: scores, report, rows, and what was tuned here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..attribution import InfluenceScores
from ..report.document import environment, method_entry, run_document
from ..report.page import render_html
from ..runs.scoring import size_of
from ..store.files import fingerprint, write_json
from ..workloads.models import fingerprint as model_fingerprint
from ..workloads.reading import write_rows
from ..workloads.rows import Row
from .output import output_folder
from .preparation import Prepared
from .request import Request

# metrics by their group, and curves
Measured = tuple[dict[str, Any], list[Any]]


def finish(
    r: Request,
    p: Prepared,
    command: str,
    title: str,
    results: Mapping[str, InfluenceScores],
    measured: Mapping[str, Measured] | None = None,
    rows: Mapping[str, Sequence[Row]] | None = None,
    **context: Any,
) -> dict[str, Any]:
    """Write the folder of a run and give its document.

    Args:
        measured: by method label.
        rows: files of rows to write, by name.
        context: further keys of the document.
    """
    entries = [
        method_entry(scores, label, *(measured or {}).get(label, ({}, [])))
        for label, scores in results.items()
    ]
    losses = p.workload.losses(r.tokens, r.reduction)
    document = run_document(
        entries,
        command=command,
        title=title,
        request=r.as_plain(),
        fingerprints=fingerprints(r),
        environment=environment(r.device),
        seed=r.seed,
        model={
            "name": r.model,
            "adapter": r.adapter,
            **size_of(p.data),
            "loss": ", ".join(map(str, losses.values())),
            "skill": p.skill,
        },
        data={
            role: {"source": ", ".join(sources) or "generated sentences", "rows": len(found)}
            for role, sources, found in (("train", r.train, p.train), ("query", r.query, p.query))
            if found
        },
        seconds=p.seconds,
        **context,
    )
    page = render_html(document)
    with output_folder(r.output) as folder:
        for number, (label, scores) in enumerate(results.items()):
            scores.to_parquet(folder / named("scores", number, label, ".parquet"))
        for name, chosen in (rows or {}).items():
            write_rows(chosen, folder / name, fields=r.fields)
        write_json(folder / "report.json", document)
        (folder / "report.html").write_text(page, encoding="utf-8")
        if p.skill is not None:
            # "auto" would ask the network whether the vocabulary has grown
            p.tuned.save_pretrained(folder / "adapter", save_embedding_layers=False)
            write_rows(p.train, folder / "train.jsonl")
            write_rows(p.query, folder / "query.jsonl")
    return document


def fingerprints(r: Request) -> dict[str, str]:
    """What a run read, by role: model, adapter, every file of rows."""
    found = {"model": model_fingerprint(r.model)}
    if r.adapter is not None:
        found["adapter"] = fingerprint(Path(r.adapter))
    for role, sources in (("train", r.train), ("query", r.query)):
        for path in sources:
            if Path(path).exists():
                found[f"{role} {path}"] = fingerprint(Path(path))
    return found


def named(stem: str, number: int, label: str, ending: str) -> str:
    """The first method's file has the plain name."""
    return f"{stem}{ending}" if number == 0 else f"{stem}-{_slug(label)}{ending}"


def _slug(label: str) -> str:
    words = "".join(c if c.isalnum() or c in ".=+-" else " " for c in label.lower()).split()
    return "-".join(words)

"""A run as one JSON document (format 1): what report.json holds and report.html shows."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Protocol

import torch

from .. import __version__
from ..ops.dispatch import backends_used
from ..solvers import BlockReport
from ..solvers.planning import SolvePlan

FORMAT = 1
BINS = 60
SHOWN = 5  # training texts beside each query, per direction
LABELS = {
    "hyperinf": "HyperINF (converged)",
    "datainf": "DataInf",
    "lissa": "LiSSA",
    "cg": "Conjugate gradients",
    "exact": "Exact (empirical Fisher)",
    "grad_dot": "Gradient dot",
}


class Scores(Protocol):
    """What a document asks of influence scores; `InfluenceScores` has it."""

    values: torch.Tensor
    report: list[BlockReport]
    meta: dict[str, Any]

    def proponents(self, k: int = ...) -> tuple[list[list[Any]], torch.Tensor]: ...
    def opponents(self, k: int = ...) -> tuple[list[list[Any]], torch.Tensor]: ...
    def certificate(self) -> dict[str, object]: ...


class Shown(Protocol):
    """What a document asks of a row, beside how to show it."""

    @property
    def id(self) -> str: ...
    @property
    def corrupted(self) -> bool | None: ...


Show = Callable[[Any], Mapping[str, str | None]]


def run_document(methods: Sequence[Mapping[str, Any]], **context: Any) -> dict[str, Any]:
    """The document of a run; `context` adds or replaces top-level keys, None leaves one out."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "title": "Influence report",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "methods": list(methods),
    }
    document.update({key: value for key, value in context.items() if value is not None})
    return document


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, device, threads and the backend of every op called so far."""
    if device.startswith("cuda"):
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return {
        "hyperinf_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
        "backends": backends_used(),
    }


def method_entry(
    scores: Scores,
    label: str | None = None,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """One method of a run: histogram, metrics, curves, certificate and blocks."""
    method = str(scores.meta.get("method", "influence"))
    seconds = {
        name: value
        for name, value in scores.meta.get("seconds", {}).items()
        if not name.endswith("gradients")
    }
    return {
        # queries refer to a method by this key, so it is unique in a document
        "method": label or method,
        "label": label or LABELS.get(method, method),
        "damping": scores.meta.get("damping"),
        "seconds": seconds,
        "histogram": _histogram(scores.values),
        "metrics": dict(metrics or {}),
        "curves": list(curves),
        "certificate": scores.certificate(),
        "blocks": [asdict(block) for block in scores.report],
    }


def _histogram(values: torch.Tensor) -> dict[str, list[float]]:
    flat = values.flatten().double()
    if not len(flat):
        return {"edges": [0.0, 1.0], "counts": [0]}
    low, high = float(flat.min()), float(flat.max())
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    place = ((flat - low) / (high - low) * BINS).long().clamp_max(BINS - 1)
    counts = torch.bincount(place, minlength=BINS)
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    return {"edges": edges, "counts": counts.tolist()}


def query_entries(
    results: Mapping[str, Scores], train: Sequence[Shown], queries: Sequence[Shown], show: Show
) -> list[dict[str, Any]]:
    """Beside every query its most helpful and most harmful training texts, by method label."""
    row_of = {row.id: row for row in train}
    entries: list[dict[str, Any]] = [{"id": row.id, **show(row), "methods": {}} for row in queries]
    for label, scores in results.items():
        kept = min(SHOWN, scores.values.shape[1])
        helpful, harmful = scores.proponents(kept), scores.opponents(kept)
        for q, entry in enumerate(entries):
            entry["methods"][label] = {
                "helpful": _ranked(row_of, show, helpful[0][q], helpful[1][q]),
                "harmful": _ranked(row_of, show, harmful[0][q], harmful[1][q]),
            }
    return entries


def _ranked(
    row_of: Mapping[str, Shown], show: Show, ids: Sequence[Any], values: torch.Tensor
) -> list[dict[str, Any]]:
    return [
        {"id": i, "influence": value, **show(row_of[i]), "corrupted": row_of[i].corrupted}
        for i, value in zip(ids, values.tolist(), strict=True)
    ]


def plan_document(
    plans: Mapping[str, SolvePlan], model: Mapping[str, Any], n: int, queries: int
) -> dict[str, Any]:
    """One JSON document for the plans of all methods, by label."""
    return {
        "format": 1,
        "command": "plan",
        "model": dict(model),
        "train": n,
        "queries": queries,
        "rates": next(iter(plans.values())).source,
        "methods": [
            {
                "label": label,
                "seconds": found.seconds,
                "flops": found.flops,
                "kept_bytes": found.kept,
                "blocks": [
                    {
                        "block": block.block,
                        "shape": list(block.shape),
                        "route": block.route,
                        "seconds": block.seconds,
                        "flops": block.flops,
                        "kept_bytes": block.kept,
                        "candidates": dict(block.candidates),
                    }
                    for block in found.blocks
                ],
            }
            for label, found in plans.items()
        ],
    }

"""What this installation can do: versions, and per op each backend or the reason it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from .. import __version__
from . import native
from .dispatch import BACKENDS, KERNELS, capability

EXTRAS = {
    "hf": ("transformers", "peft", "safetensors", "gguf", "accelerate"),
    "cli": ("typer", "rich", "pyarrow"),
    "triton": ("triton",),
}
VARIABLES = ("HYPERINF_BACKEND", "HYPERINF_STRICT", "HYPERINF_CPU", "HYPERINF_CPU_ISA",
             "HYPERINF_CUDA", "HYPERINF_CUDA_ARCHS", "HYPERINF_TF32", "HYPERINF_DATA")  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything `hyperinf info` prints, as plain values."""
    return {
        "hyperinf_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_kernels": native.missing() or ", ".join(native.isas()),
        "cuda_kernels": ", ".join(native.cuda_archs()) or native.missing() or native.no_cuda(),
        "build": _without_kernels(native.build_info()),
        "extras": {
            extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "ops": {op: _backends(op) for op in sorted(KERNELS)},
    }


def _backends(op: str) -> dict[str, str]:
    """{backend: "yes", or "no: " with the reason and what to do about it}."""
    machine = capability()
    answers = {}
    for backend in BACKENDS:
        kernel = KERNELS[op].get(backend)
        if kernel is None:
            served = ", ".join(other for other in BACKENDS if other in KERNELS[op])
            answers[backend] = f"no: not written for this op, which {served} can run"
        else:
            lack = machine.lacks(backend) or kernel.needs(machine)
            answers[backend] = "yes" if lack is None else f"no: {lack}"
    return answers


def _without_kernels(facts: dict[str, Any] | str) -> dict[str, Any] | str:
    if isinstance(facts, str):
        return facts
    return {key: value for key, value in facts.items() if key != "cuda_kernels"}


def _build(facts: dict[str, Any] | str) -> str:
    if isinstance(facts, str):
        return facts
    nvcc = f"nvcc {facts['nvcc']}" if facts["nvcc"] else "no nvcc"
    return (
        f"compiler {facts['compiler']}, {nvcc}, against torch {facts['torch']} "
        f"for {facts['torch_target']} and later, {' '.join(facts['flags'])}"
    )


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def as_text() -> str:
    """The same as lines of plain text, which needs no extra to print."""
    facts = collect()
    lines = [
        f"hyperinf_kernels {facts['hyperinf_kernels']}, torch {facts['torch']}, "
        f"Python {facts['python']}, CUDA {facts['cuda'] or 'no device'}, "
        f"{facts['threads']} threads",
        f"compiled CPU kernels: {facts['cpu_kernels']}",
        f"compiled CUDA kernels: {facts['cuda_kernels']}",
        f"build: {_build(facts['build'])}",
    ]
    for extra, packages in facts["extras"].items():
        found = ", ".join(f"{n} {v}" if v else f"{n} missing" for n, v in packages.items())
        remedy = "" if all(packages.values()) else f"  (pip install 'hyperinf_kernels[{extra}]')"
        lines.append(f"extra {extra}: {found}{remedy}")
    lines += [f"{name}={value}" for name, value in facts["environment"].items() if value]
    return "\n".join([*lines, "", *_table(facts["ops"])])


def _table(ops: dict[str, dict[str, str]]) -> list[str]:
    """One line per op; a number leads from each no to its reason below the table."""
    reasons: list[str] = []
    width = max(map(len, ops))
    lines = [f"{'op':{width}}  " + "  ".join(f"{backend:7}" for backend in BACKENDS)]
    for op, backends in ops.items():
        cells = []
        for backend in BACKENDS:
            answer = backends[backend].removeprefix("no: ")
            if answer == "yes":
                cells.append(answer)
                continue
            if answer not in reasons:
                reasons.append(answer)
            cells.append(f"no ({reasons.index(answer) + 1})")
        lines.append(f"{op:{width}}  " + "  ".join(f"{cell:7}" for cell in cells))
    notes = [f"({k}) {reason}" for k, reason in enumerate(reasons, 1)]
    return [line.rstrip() for line in lines] + notes

"""What this installation can do: versions, and per op each backend or the reason it is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from . import __version__
from . import ops as ops  # registers the kernels
from .ops import native
from .ops.dispatch import BACKENDS, KERNELS, capability

EXTRAS = {
    "hf": ("transformers", "peft", "safetensors", "gguf", "accelerate"),
    "cli": ("typer", "rich", "pyarrow"),
    "triton": ("triton",),
}
VARIABLES = ("HYPERINF_BACKEND", "HYPERINF_STRICT", "HYPERINF_CPU", "HYPERINF_CPU_ISA",
             "HYPERINF_CUDA", "HYPERINF_CUDA_ARCHS", "HYPERINF_DATA")  # fmt: skip


def collect() -> dict[str, Any]:
    """Everything `hyperinf info` prints, as plain values."""
    return {
        "hyperinf_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu_kernels": native.missing() or ", ".join(native.isas()),
        "extras": {
            extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "ops": {op: _backends(op) for op in sorted(KERNELS)},
    }


def _backends(op: str) -> dict[str, str]:
    """{backend: "yes" or the reason for no}."""
    machine = capability()
    answers = {}
    for backend in BACKENDS:
        if backend not in KERNELS[op]:
            answers[backend] = "no: this version has no such kernel"
        elif backend in machine.missing:
            answers[backend] = f"no: {machine.missing[backend]}"
        else:
            answers[backend] = "yes"
    return answers


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
    ]
    for extra, packages in facts["extras"].items():
        found = ", ".join(f"{n} {v}" if v else f"{n} missing" for n, v in packages.items())
        remedy = "" if all(packages.values()) else f"  (pip install 'hyperinf_kernels[{extra}]')"
        lines.append(f"extra {extra}: {found}{remedy}")
    lines += [f"{name}={value}" for name, value in facts["environment"].items() if value]
    lines.append("")
    width = max(map(len, facts["ops"]))
    for op, backends in facts["ops"].items():
        usable = [b for b, answer in backends.items() if answer == "yes"]
        missing = [f"{b} {answer}" for b, answer in backends.items() if answer != "yes"]
        lines.append(f"{op:{width}}  {', '.join(usable)}  [{'; '.join(missing)}]")
    return "\n".join(lines)

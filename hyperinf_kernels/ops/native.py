"""Loads the compiled kernels, or keeps the one reason why this installation has none."""

from __future__ import annotations

import functools
import importlib
import os
import re
from typing import Any

import torch

REMEDY = "reinstall with pip install --no-build-isolation, a C++20 compiler and torch >= 2.10"
CUDA_REMEDY = "reinstall with HYPERINF_CUDA=1 and nvcc on PATH or in CUDA_HOME"


@functools.cache
def missing() -> str | None:
    """Load the extension on the first call; None when it serves, otherwise the reason it cannot."""
    if os.environ.get("HYPERINF_CPU", "auto") == "0":
        return "turned off by HYPERINF_CPU=0 (unset it)"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"the compiled kernels need torch 2.10 or later, this is {torch.__version__}"
    try:
        importlib.import_module("hyperinf_kernels._C")
    except ModuleNotFoundError:
        return f"the compiled kernels are not built ({REMEDY})"
    except ImportError as error:
        return f"the compiled kernels do not load: {error} ({REMEDY})"
    importlib.import_module("hyperinf_kernels.ops.fakes")
    return None


def isas() -> tuple[str, ...]:
    """Compiled instruction sets that this processor runs, best first; empty without the kernels."""
    if missing():
        return ()
    return tuple(importlib.import_module("hyperinf_kernels._C").cpu_isas())


def row_depths() -> tuple[int, int]:
    """Roundings of fp32 between a term and its fp64 sum: in a dot product, in a sum of rows."""
    compiled = importlib.import_module("hyperinf_kernels._C")
    return compiled.dot_depth, compiled.sum_depth


def cuda_archs() -> tuple[str, ...]:
    """What the CUDA kernels were built for, as "sm_80" or "compute_90"; empty without them."""
    if missing():
        return ()
    names = importlib.import_module("hyperinf_kernels._C").cuda_archs()
    return tuple(filter(None, names.split(",")))


def no_cuda() -> str:
    """Why the extension has no CUDA kernels, with the remedy."""
    facts = build_info()
    reason = facts if isinstance(facts, str) else facts["no_cuda"]
    return f"{reason} ({CUDA_REMEDY})"


def build_info() -> dict[str, Any] | str:
    """How the extension was made: compiler, flags, ISAs, architectures; or why nothing tells."""
    if missing():
        return str(missing())
    try:
        return dict(importlib.import_module("hyperinf_kernels._build").build_info())
    except ImportError:
        return "hyperinf_kernels._build was not built for this Python (pip install pybind11 first)"

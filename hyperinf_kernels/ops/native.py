"""Loads the compiled kernels, or keeps the one reason why this installation has none."""

from __future__ import annotations

import functools
import importlib
import os
import re

import torch

REMEDY = "reinstall with pip install --no-build-isolation, a C++20 compiler and torch >= 2.10"


@functools.cache
def missing() -> str | None:
    """Load the extension on the first call; None when it serves, otherwise the reason it cannot."""
    if os.environ.get("HYPERINF_CPU", "auto") == "0":
        return "turned off by HYPERINF_CPU=0"
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

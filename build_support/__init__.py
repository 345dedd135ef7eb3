"""How the compiled kernels are built: `kernels` is the build step, `cuda` finds and asks nvcc."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    print(f"hyperinf_kernels: {text}", file=sys.stderr, flush=True)

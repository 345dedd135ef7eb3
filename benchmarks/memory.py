"""How far the memory of this process rises during a call, whoever allocates it. Linux only."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory exceeds its start at the call's peak."""
    gc.collect()
    # memory that was freed but kept would hide what the call takes
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def status(name: str) -> int:
    """A size of this process as the system tells it, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")

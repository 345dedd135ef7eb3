"""What the Triton kernels need from this machine, or the one reason why they cannot run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

LEAST_TRITON = (3, 6)
LEAST_CAPABILITY = (8, 0)
REMEDY = "pip install 'hyperinf_kernels[triton]'"


def triton_missing(device: tuple[int, int] | None) -> str | None:
    """None when Triton serves a device of this capability. Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed ({REMEDY})"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        version = "0 (no metadata)"
    return refusal(version, device)


def refusal(version: str, device: tuple[int, int] | None) -> str | None:
    """Why this version of Triton cannot serve this device, or None."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"triton {version} is too old, the kernels need {least} or later ({REMEDY})"
    if device is None:
        return "no CUDA device is visible"
    if device < LEAST_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (device, LEAST_CAPABILITY))
        return f"the device has compute capability {have}, the kernels need {need} or later"
    return None

"""One line that names the extra, where a host library is missing."""

from __future__ import annotations

import importlib.util

__all__ = ["require"]


def require(extra: str, *packages: str) -> None:
    """Raise ImportError unless every package can be imported; the line names the extra."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{package} is not installed: pip install 'hyperinf_kernels[{extra}]'"
            )

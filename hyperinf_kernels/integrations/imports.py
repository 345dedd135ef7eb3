"""One line that names the extra where a host library is missing, one where it is another version.

The adapters stand on insides of their hosts, which may change with any release.
"""

from __future__ import annotations

import importlib.util
import warnings
from importlib import metadata

__all__ = ["TESTED", "require"]

# distribution, and the series that the adapter's tests ran on
TESTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "bergson": ("bergson", ("2.5",)),
    "captum": ("captum", ("0.8", "0.9")),
    "dattri": ("dattri", ("0.3",)),
    "dattri_llm": ("dattri-llm", ("0.1",)),
    "kronfluence": ("kronfluence", ("1.0",)),
    "opacus": ("opacus", ("1.6",)),
    "pydvl": ("pyDVL", ("0.10",)),
    "quanda": ("quanda", ("0.5",)),
    "trak": ("traker", ("0.3",)),
}


def require(extra: str, *packages: str) -> None:
    """Raise ImportError unless every package can be imported; the line names the extra.

    Warns where a package is of a series that the adapter was not tested on.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"{package} is not installed: pip install 'hyperinf_kernels[{extra}]'"
            )
        distribution, series = TESTED.get(package, (package, ()))
        if not series:
            continue
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:  # on the path without being installed
            continue
        if ".".join(version.split(".")[:2]) not in series:
            warnings.warn(
                f"{distribution} {version} was not tested with this adapter, which stands on "
                f"{' and '.join(series)}: pip install 'hyperinf_kernels[{extra}]'",
                stacklevel=3,
            )

"""Stock against drop-in: the same script, the same run, one import changed.

`python -m benchmarks.drop_in [--quick] [host ...]` in the environment of `make test-integrations`.
Hosts: reference, dattri, dattri_llm, pydvl, kronfluence, bergson. Writes results/drop-in-HOST.csv.
"""

from __future__ import annotations

import importlib
import sys

from . import plots, registry

HOSTS = ("reference", "dattri", "dattri_llm", "pydvl", "kronfluence", "bergson")


def main() -> None:
    """Measure the hosts named on the command line, all that are installed by default."""
    words = sys.argv[1:]
    quick = "--quick" in words
    names = [word for word in words if not word.startswith("--")] or list(HOSTS)
    for name in names:
        if name not in HOSTS:
            sys.exit(f"unknown host {name!r}; known: {', '.join(HOSTS)}")
        print(f"\n{name}")
        try:
            host = importlib.import_module(f"benchmarks.drop_in_hosts.{name}")
        except ImportError as error:
            print(f"  not measured: {error}")
            continue
        rows = registry.shown(host.measure(quick))
        if not quick:
            print(
                "  ", registry.write(f"drop-in-{name}", rows), plots.draw(f"drop-in-{name}", rows)
            )


if __name__ == "__main__":
    main()

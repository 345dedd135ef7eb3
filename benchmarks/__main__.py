"""Run benchmarks: `python -m benchmarks [--quick] [name ...]`."""

from __future__ import annotations

import sys

import torch

from . import convergence as convergence  # registers itself
from . import datainf as datainf
from . import doors as doors
from . import exact as exact
from . import faces as faces
from . import gpu as gpu
from . import hooks as hooks
from . import job as job
from . import native as native
from . import native_inverses as native_inverses
from . import native_per_sample as native_per_sample
from . import out_of_core as out_of_core
from . import plots, registry
from . import pool as pool
from . import roberta as roberta


def main() -> None:
    """Run the benchmarks named on the command line, by default all that this machine can.

    A name also stands for those that begin with it: `native` for `native-sums` and the others.
    """
    words = sys.argv[1:]
    quick = "--quick" in words
    possible = [name for name in registry.BENCHMARKS if name != "gpu" or torch.cuda.is_available()]
    asked = [word for word in words if not word.startswith("--")] or possible
    for word in asked:
        if not _named(word):
            sys.exit(f"unknown benchmark {word!r}; known: {', '.join(registry.BENCHMARKS)}")
    for name in dict.fromkeys(found for word in asked for found in _named(word)):
        print(f"\n{name}")
        rows = registry.shown(registry.BENCHMARKS[name](quick))
        print("  ", registry.write(name, rows), plots.draw(name, rows))


def _named(word: str) -> list[str]:
    return [name for name in registry.BENCHMARKS if name == word or name.startswith(f"{word}-")]


if __name__ == "__main__":
    main()

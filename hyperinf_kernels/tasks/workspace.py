"""The folder a run writes: refused if it holds another run, and there only once it is complete."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError


def check_output(folder: Path) -> None:
    """Raise InputError unless `folder` is absent or empty."""
    if folder.is_file():
        raise InputError(f"the output folder {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"the output folder {folder} already holds files, perhaps another run; choose a new "
            "one with --output or remove it"
        )


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` on success and vanishes on any error."""
    check_output(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

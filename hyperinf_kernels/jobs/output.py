"""The folder a run writes: refused if it holds another run, and there only once it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError


def check_output(folder: Path) -> None:
    """Raise InputError unless `folder` is absent or empty, and can be written."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"the output folder {folder} is there, but is no folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"the output folder {folder} already holds files, perhaps another run; choose a new "
            "one with --output or remove it"
        )
    ground = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        # permission bits do not tell of a full or read-only disk, and root passes them all
        tempfile.TemporaryDirectory(dir=ground, prefix=f".{folder.name}.").cleanup()
    except OSError as error:
        raise InputError(
            f"the output folder {folder} cannot be made: {error.strerror} ({ground})"
        ) from None


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` on success and vanishes on any error."""
    check_output(folder)
    # a folder that exists may be a mount point or a link, which no rename replaces: fill it instead
    ground = folder if folder.is_dir() else folder.parent
    made = [path for path in (ground, *ground.parents) if not path.exists()]
    temporary = None
    try:
        ground.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=ground, prefix=f".{folder.name}."))
        yield temporary
        if ground == folder:
            for item in temporary.iterdir():
                item.rename(folder / item.name)
        else:
            temporary.chmod(0o755)
            temporary.replace(folder)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for path in made:
            # refused where the results are
            with contextlib.suppress(OSError):
                path.rmdir()

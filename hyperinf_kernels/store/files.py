"""Files that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it on success and vanishes on any error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; a result is an ordinary one
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Any) -> None:
    """Write strict JSON (no NaN) atomically, in UTF-8 whatever the locale made of a file's name."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic(path) as temporary:
        # a name's bytes that the locale could not read, given back; what is then no UTF-8 is marked
        named = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        temporary.write_text(named + "\n", encoding="utf-8")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, or of every file of a folder with its name."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape") + b"\0")
            with open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()

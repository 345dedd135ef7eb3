"""A fitted attributor on disk: one JSON document and one safetensors file, whole or absent."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..store.files import write_json

FORMAT = 1
KEYS = ("method", "options", "damping", "loss", "loss_text", "blocks", "train_ids", "solver")


def check_new(folder: Path) -> None:
    """Raise InputError if the folder exists."""
    if folder.exists():
        raise InputError(f"{folder} exists already; choose a new folder")


def write(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a new folder.

    Raises:
        InputError: the folder exists already, or safetensors is missing.
    """
    save_file = _safetensors().save_file
    check_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        # safetensors refuses tensors that share memory
        held = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(held, temporary / "solver.safetensors")
        write_json(temporary / "attributor.json", {"format": FORMAT, **document})
        temporary.chmod(0o755)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a saved attributor.

    Raises:
        InputError: as `read_document`, no tensors, or safetensors is missing.
    """
    safetensors = _safetensors()
    document = read_document(folder)
    try:
        return document, safetensors.load_file(folder / "solver.safetensors")
    except FileNotFoundError:
        raise InputError(
            f"{folder} holds no saved attributor: solver.safetensors is missing"
        ) from None


def read_document(folder: Path) -> dict[str, Any]:
    """What a saved attributor says of itself.

    Raises:
        InputError: nothing saved there, another format, or a damaged file.
    """
    path = folder / "attributor.json"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise InputError(
                f"{folder} has format {document['format']}, this version reads {FORMAT}"
            )
        missing = [key for key in KEYS if key not in document]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no saved attributor: {path.name} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}")
    return document


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise InputError(
            "saving an attributor needs safetensors: pip install 'hyperinf_kernels[hf]'"
        ) from None
    return safetensors.torch

"""Flat per-sample rows that TRAK (.npy memmap) and LESS (.pt tensor) leave on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["read_less", "read_trak"]

Batches = Iterator[tuple[list[int], dict[str, Tensor]]]


def read_trak(folder: str | Path, model_id: int = 0, *, batch_size: int = 4096) -> Batches:
    """(row numbers, {"all": (B, 1, p)}) of a TRAK save_dir: projected gradients of one checkpoint.

    Rows whose flag in _is_featurized.npy is not set are an error, never zeros.
    """
    folder = Path(folder) / str(model_id)
    path, flags = folder / "grads.mmap", folder / "_is_featurized.mmap"
    for file in (path, flags):
        if not file.exists():
            raise InputError(f"{file} does not exist: {folder.parent} is no TRAK save_dir")
    done = np.lib.format.open_memmap(str(flags), mode="r").reshape(-1) == 1
    if not done.all():
        raise InputError(
            f"{int((~done).sum())} of {len(done)} rows of {folder} are not featurized, the first "
            f"is row {int(np.argmin(done))}; finish the run"
        )
    yield from _batches(torch.from_numpy(np.array(np.lib.format.open_memmap(str(path), mode="r"))),
                        batch_size)  # fmt: skip


def read_less(path: str | Path, *, batch_size: int = 4096) -> Batches:
    """(row numbers, {"all": (B, 1, p)}) of a LESS gradient file, such as dim8192/all_orig.pt."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist")
    try:
        rows = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        raise InputError(f"{path} is no complete tensor file; LESS writes it again") from error
    if not isinstance(rows, Tensor) or rows.ndim != 2:
        raise InputError(f"{path} holds no (samples, p) tensor")
    yield from _batches(rows, batch_size)


def _batches(rows: Tensor, batch_size: int) -> Batches:
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size].float()
        yield list(range(start, start + len(part))), {"all": part[:, None]}

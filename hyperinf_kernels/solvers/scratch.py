"""Tensors in files that the system pages in and out: what does not fit into memory."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError


class Scratch:
    """Makes tensors in files below `folder`, which is created.

    A file loses its name at once and its space with its tensor, so nothing stays behind however the
    process ends.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise InputError(f"folder={self.folder} is there, but is no folder") from None
        except OSError as error:
            raise InputError(f"folder={self.folder} cannot be made: {error.strerror}") from None

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros.

        Raises:
            InputError: the folder has no room for it or cannot be written to.
        """
        numbers = math.prod(shape)
        if numbers == 0:
            return torch.empty(*shape, dtype=dtype, device="cpu")
        try:
            handle, path = tempfile.mkstemp(prefix="hyperinf-", dir=self.folder)
        except OSError as error:
            raise InputError(f"no file can be made in {self.folder}: {error.strerror}") from None
        try:
            # a write to a mapped hole on a full disk would kill the process
            os.posix_fallocate(handle, 0, numbers * dtype.itemsize)
            held = torch.from_file(path, shared=True, size=numbers, dtype=dtype, device="cpu")
        except OSError as error:
            size = f"{math.ceil(numbers * dtype.itemsize / 2**10):,} KiB"
            raise InputError(f"no room for {size} in {self.folder}: {error.strerror}") from None
        finally:
            os.close(handle)
            os.unlink(path)
        return held.view(*shape)

    def mapped(self, tensor: Tensor) -> Tensor:
        """The same numbers in a file.

        Raises:
            InputError: a tensor that is not in the memory of the CPU, or no room.
        """
        if tensor.device.type != "cpu":
            raise InputError(f"folder= keeps what the CPU holds in files, not {tensor.device}")
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

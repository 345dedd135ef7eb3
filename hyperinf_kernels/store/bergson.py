"""bergson's gradient store: gradients.bin, a row per sample, modules side by side; info.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .files import atomic

__all__ = ["module_of", "read", "sizes", "write"]

Shapes = Mapping[str, tuple[int, int]]


def module_of(block: str) -> str:
    """A parameter's or a module's name as bergson's module name, which starts below a PeftModel."""
    return block.removesuffix(".weight").removeprefix("base_model.")


def sizes(folder: str | Path) -> tuple[int, dict[str, int]]:
    """Rows of a store, and {module: numbers per row}."""
    info = _info(Path(folder))
    return int(info["num_grads"]), dict(info["grad_sizes"])


def read(
    folder: str | Path, shapes: Shapes | None = None, *, batch_size: int = 512
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """(row numbers, {module: (B, r, d)}) batch by batch, in fp32 (fp64 for a fp64 store).

    Args:
        shapes: {module: (O, I)} of each row, of which LoRA B is then transposed, as blocks are;
            None: (1, O I), which the flat methods take as it is. A projected store holds (p, p)
            per module.

    Raises:
        InputError: no store, a file of the wrong length, or per-token rows.
    """
    folder = Path(folder)
    info = _info(folder)
    if info.get("attribute_tokens"):
        raise InputError(f"{folder} holds rows per token; per-sample gradients are needed")
    if "base_dtype" not in info:
        raise InputError(f"{folder}/info.json names no base_dtype; its bergson is too old")
    dtype = _dtype(str(info["base_dtype"]))
    widths = dict(info["grad_sizes"])
    for name, shape in (shapes or {}).items():
        if name not in widths or shape[0] * shape[1] != widths[name]:
            raise InputError(
                f"module {name}: {tuple(shape)} does not fit {widths.get(name)} numbers"
            )
    n, width = int(info["num_grads"]), sum(widths.values())
    path = folder / "gradients.bin"
    expected = n * width * dtype.itemsize
    if path.stat().st_size != expected:
        raise InputError(f"{path} has {path.stat().st_size} bytes, {n} rows need {expected}")
    rows = np.memmap(path, dtype=dtype, mode="r", shape=(n, width))
    for start in range(0, n, batch_size):
        part = torch.from_numpy(np.array(rows[start : start + batch_size]))
        if str(info["base_dtype"]) == "bfloat16":
            part = part.view(torch.bfloat16)
        part = part if part.dtype == torch.float64 else part.float()
        columns = part.split(list(widths.values()), 1)
        yield (
            list(range(start, start + len(part))),
            {
                name: _turned(name, grad.reshape(len(part), *shapes[name]))
                if shapes
                else grad[:, None]
                for (name, _), grad in zip(widths.items(), columns, strict=True)
            },
        )


def write(folder: str | Path, batches: Iterable[Mapping[str, Tensor]]) -> int:
    """Write batches of per-sample gradients as a store that bergson opens; the row count.

    Args:
        batches: {block: (B, r, d)}, as `per_sample_gradients` gives them, under bergson's names
            afterwards (`module_of`); or {module: (B, D)}, written as it is.

    Raises:
        InputError: the folder holds a store already, no rows, or batches that do not fit.
    """
    folder = Path(folder)
    if (folder / "info.json").exists():
        raise InputError(f"{folder} holds a gradient store already")
    folder.mkdir(parents=True, exist_ok=True)
    widths: dict[str, int] = {}
    n = 0
    with atomic(folder / "gradients.bin") as temporary, temporary.open("wb") as file:
        for batch in batches:
            flat = {
                module_of(name): (_turned(name, grad) if grad.ndim == 3 else grad).flatten(1)
                for name, grad in batch.items()
            }
            found = {name: int(grad.shape[1]) for name, grad in flat.items()}
            widths = widths or found
            if found != widths:
                raise InputError("batches differ in their modules or their sizes")
            joined = torch.cat([flat[name] for name in widths], 1)
            file.write(np.ascontiguousarray(joined.float().cpu().numpy()).tobytes())
            n += len(joined)
        if n == 0:
            raise InputError("there are no gradients to write")
    # bergson takes a folder with info.json for a finished one, so it comes last
    info = {"attribute_tokens": False, "num_items": n, "num_grads": n, "grad_sizes": widths,
            "base_dtype": "float32"}  # fmt: skip
    with atomic(folder / "info.json") as temporary:
        temporary.write_text(json.dumps(info, indent=2), encoding="utf-8")
    return n


def _turned(name: str, rows: Tensor) -> Tensor:
    """(O, I) <-> (r, d): a block of LoRA B is the transpose of the parameter."""
    return rows.mT if "lora_B" in name.split(".") and rows.shape[1] > 1 else rows


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "info.json"
    if not path.exists():
        raise InputError(f"{folder} is no bergson gradient store: it has no info.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _dtype(name: str) -> np.dtype:
    # numpy has no bfloat16 of its own; the bits are read as they are
    return np.dtype("uint16" if name == "bfloat16" else name)

"""Where the Triton kernels' cases run, and buffers that catch what a kernel must not touch.

The same cases run on a GPU and, without one, in Triton's interpreter on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hyperinf_kernels.ops import dispatch
from tests import oracle

INTERPRETING = os.environ.get("TRITON_INTERPRET", "0") == "1"
TRITON = importlib.util.find_spec("triton") is not None
DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
EPS = float(np.finfo(np.float32).eps)
SENTINEL = 12345.0
BAND = 32


def _reason() -> str | None:
    if not TRITON:
        return "triton is not installed: pip install triton"
    if not INTERPRETING and not torch.cuda.is_available():
        return (
            "no CUDA device; test_triton_interpreter.py runs these cases in Triton's interpreter "
            "(TRITON_INTERPRET=1 python -m pytest tests/test_triton_*.py)"
        )
    return None


def on_device() -> list[pytest.MarkDecorator]:
    """Marks of a file whose cases need a GPU or the interpreter."""
    reason = _reason()
    return [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=reason or "")]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def spd(batch: int, d: int, condition: float) -> Tensor:
    """(batch, d, d) fp32 with eigenvalues spread evenly in logarithm over [1 / condition, 1]."""
    eigenvalues = np.logspace(0, -np.log10(condition), d)
    stack = np.stack([oracle.spd(eigenvalues, seed=b) for b in range(batch)])
    return torch.from_numpy(stack).float().to(DEVICE)


def poisoned(tensor: Tensor) -> Tensor:
    """The same values inside a larger buffer of NaN, before, after and beside every row."""
    big = F.pad(tensor.float(), (BAND, BAND) * tensor.dim(), value=float("nan")).to(tensor.dtype)
    return big[(slice(BAND, -BAND),) * tensor.dim()]


def sentinelled(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """The same values inside a buffer of sentinels, and whether those are still untouched."""
    big = F.pad(tensor, (BAND, BAND) * tensor.dim(), value=SENTINEL)
    inside = (slice(BAND, -BAND),) * tensor.dim()

    def intact() -> bool:
        rest = big.clone()
        rest[inside] = SENTINEL
        return bool((rest == SENTINEL).all())

    return big[inside], intact


class Allocations:
    """Every buffer a launcher takes is NaN inside and has sentinels before and after."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        count = int(np.prod(shape))
        whole = torch.full((count + 2 * BAND,), 77, dtype=dtype, device=device)
        inner = whole[BAND : BAND + count]
        inner.fill_(float("nan") if dtype.is_floating_point else -77)
        self.buffers.append(whole)
        return inner.view(*shape)

    def assert_intact(self) -> None:
        assert self.buffers, "the launcher allocated nothing that is watched"
        for whole in self.buffers:
            assert (whole[:BAND] == 77).all(), "a store landed before a buffer"
            assert (whole[-BAND:] == 77).all(), "a store landed behind a buffer"


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """Watch `new_empty` and `empty_like`, which is how the launchers allocate."""
    watched = Allocations()

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return watched.take(tuple(shape), dtype or self.dtype, self.device)

    def empty_like(self: Tensor, **_: Any) -> Tensor:
        return watched.take(tuple(self.shape), self.dtype, self.device)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return watched


@pytest.fixture
def through_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public ops choose Triton as on a GPU, for CPU tensors too while interpreting."""
    if INTERPRETING:
        monkeypatch.setattr(dispatch, "capability", lambda device=None: dispatch.Capability())
        monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("triton", "torch"))


class FewPrograms:
    """Stands in for a kernel and runs only some programs of its grid (interpreter only)."""

    def __init__(self, kernel: Any, chosen: Sequence[int]) -> None:
        self.kernel, self.chosen = kernel, chosen

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        from triton.runtime.interpreter import interpreter_builder as builder

        def launch(*args: Any, **kwargs: Any) -> None:
            set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
            chosen = [p % grid[0] for p in self.chosen]
            builder.set_grid_dim = lambda *_: set_size(grid[0], 1, 1)
            builder.set_grid_idx = lambda x, y, z: set_index(chosen[x], y, z)
            try:
                self.kernel[(len(chosen),)](*args, **kwargs)
            finally:
                del builder.set_grid_dim, builder.set_grid_idx

        return launch

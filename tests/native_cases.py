"""What the tests of the compiled kernels share: every compiled path, threads, and truth in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import native
from tests.oracle import Array

ISAS = native.isas()
needs_kernels = pytest.mark.skipif(
    native.missing() is not None, reason=f"compiled kernels: {native.missing()}"
)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is off every vector boundary by one element."""
    buffer = torch.full((tensor.numel() + 2,), float("nan"), dtype=tensor.dtype)
    view = buffer[1:-1].view(tensor.shape)
    view.copy_(tensor)
    return view


@contextmanager
def on_cpu_kernels(*ops: str) -> Iterator[None]:
    """Every call inside the block ran on the compiled kernel, and on nothing else."""
    with hk.trace_backends() as log:
        yield
    assert log
    assert {plan.backend for plan in log} == {"cpu"}, log
    assert {plan.kernel for plan in log} <= {f"cpu.{op}" for op in ops}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def worst(actual: torch.Tensor, expected: Array) -> float:
    return float(np.abs(actual.double().numpy() - expected).max(initial=0))

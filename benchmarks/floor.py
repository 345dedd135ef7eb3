"""What this machine can do at best, measured: reading memory, products, Cholesky factors.

A floor is a count of bytes and operations over these rates; a door is judged by its multiple of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TRIES = 5


@dataclass(frozen=True)
class Floor:
    """Bytes a second of a plain sum; operations a second of the best fp32 product at hand."""

    read: float
    product: float

    def reads(self, *tensors: Tensor, times: float = 1) -> float:
        """Seconds to read the tensors `times` times."""
        return times * sum(t.numel() * t.element_size() for t in tensors) / self.read

    def products(self, operations: float) -> float:
        """Seconds of that many multiplications and additions."""
        return operations / self.product


def measure() -> Floor:
    """Both rates, the best of several tries, now and with the threads at hand."""
    large = torch.randn(1 << 26)
    X, Y = torch.randn(3072, 2048), torch.randn(3072, 2048)
    onednn = lambda: torch.ops.mkldnn._linear_pointwise(X, Y, None, "none", [], "")  # noqa: E731
    rivals = [lambda: X @ Y.mT]
    if torch.backends.mkldnn.is_available():
        rivals.append(onednn)
    product = min(best(call) for call in rivals)
    return Floor(4 * len(large) / best(large.sum), 2 * len(X) * len(Y) * X.shape[1] / product)


def cholesky(size: int) -> float:
    """Seconds of one fp32 Cholesky factor of that size."""
    A = torch.eye(size) + 0.1 * torch.ones(size, size)
    return best(lambda: torch.linalg.cholesky(A))


def best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    call()
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)

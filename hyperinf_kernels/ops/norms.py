"""What tests and bounds of an inverse need to know of a matrix, in one reading where compiled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import native

SKEW = 1e-3  # largest |a - a^T| of what passes as symmetric, relative to the largest entry


class Norms(NamedTuple):
    """Per matrix of a batch (B, d, d), in fp64; NaN where the matrix is not finite."""

    largest: Tensor
    skew: Tensor
    least_diagonal: Tensor
    trace: Tensor
    frobenius: Tensor
    rows: Tensor

    def fit(self) -> Tensor:
        """Finite, symmetric to `SKEW`, a positive diagonal."""
        return (self.skew <= SKEW * self.largest) & (self.least_diagonal > 0)

    def top(self) -> Tensor:
        """The least of the bounds of the largest eigenvalue."""
        return torch.minimum(torch.minimum(self.rows, self.frobenius), self.trace)

    def product(self, X: Tensor) -> Tensor:
        """A bound of || |A| |X| ||_F."""
        size = torch.linalg.vector_norm(X, dim=(-2, -1)).double()
        rows = torch.linalg.vector_norm(X, 1, dim=-1).amax(-1).double()
        return torch.minimum(torch.minimum(self.frobenius * rows, self.rows * size),
                             self.frobenius * size)  # fmt: skip


def norms_of(A: Tensor) -> Norms:
    """Norms of A (B, d, d), fp32 or fp64."""
    if A.device.type == "cpu" and native.missing() is None:
        largest, skew, least, trace, square, rows = torch.ops.hyperinf.matrix_norms(A).unbind(-1)
        return Norms(largest, skew, least, trace, square.sqrt(), rows)
    largest = torch.linalg.vector_norm(A, torch.inf, dim=(-2, -1)).double()
    skew = torch.linalg.vector_norm(A - A.mT, torch.inf, dim=(-2, -1)).double()
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    sums = torch.linalg.vector_norm(A, 1, dim=-1, dtype=torch.float64)
    size = torch.linalg.vector_norm(A, dim=(-2, -1), dtype=torch.float64)
    nothing = sums.sum(-1) * 0
    found = (largest, skew, diagonal.amin(-1).double(), diagonal.sum(-1, dtype=torch.float64), size,
             sums.amax(-1))  # fmt: skip
    return Norms(*(x + nothing for x in found))

"""What a few random vectors see of many rows, in fp64 and one reading of the rows.

Certificates are made of these sums: rows are widened as they are read, never copied.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import checks
from .dispatch import call


def combine_rows(X: Tensor, P: Tensor) -> Tensor:
    """X^T P (s, D) in fp64 for weights X (n, s) fp64 and rows P (n, D)."""
    checks.floating(X=X, P=P)
    checks.agree(
        X.ndim == P.ndim == 2 and len(X) == len(P), "X (n, s) and P (n, D) must fit", X=X, P=P
    )
    return call("combine_rows", (X, P))


def image_rows(Z: Tensor, P: Tensor) -> Tensor:
    """Z P^T P (s, D) in fp64 for directions Z (s, D) fp64 and rows P (n, D)."""
    checks.floating(Z=Z, P=P)
    checks.agree(
        Z.ndim == P.ndim == 2 and Z.shape[1] == P.shape[1], "Z (s, D) and P (n, D) must fit",
        Z=Z, P=P,
    )  # fmt: skip
    return call("image_rows", (Z, P))


def row_sketch(X: Tensor, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """X^T P (s, D) and P P^T X (n, s) in fp64 for X (n, s) fp64 and P in parts (n_i, D)."""
    checks.floating(X=X, P=rows[0])
    checks.agree(
        X.ndim == 2 and len(X) == sum(map(len, rows)), "X (n, s) and P (n, D) must fit",
        X=X, P=rows[0],
    )  # fmt: skip
    total, image = call("row_sketch", (X, *rows))
    return total, image

"""Inverse of SPD matrices by the faster of a direct factorisation and Schulz steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from .ambient import exactly
from .costs import cheaper_inverse
from .dispatch import call, explain
from .schulz import schulz_inverse
from .solve import (
    SolveInfo,
    checked_shape,
    inverse_floor,
    inverse_residual,
    refuse_indefinite,
    refuse_overflow,
    refuse_unfit,
    solve_info,
)

Method = Literal["auto", "direct", "schulz"]


@overload
def spd_inverse(
    A: Tensor, *, method: Method = ..., return_info: Literal[False] = ...
) -> Tensor: ...
@overload
def spd_inverse(
    A: Tensor, *, method: Method = ..., return_info: Literal[True]
) -> tuple[Tensor, SolveInfo]: ...
@exactly
def spd_inverse(
    A: Tensor, *, method: Method = "auto", return_info: bool = False
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Inverse of symmetric positive definite matrices, `torch.linalg.inv(A)`.

    Args:
        A: (..., d, d), fp16, bf16, fp32 or fp64.
        method: "direct" is a Cholesky inverse, d^3 flop; "schulz" is `schulz_inverse`; "auto" takes
            the faster one as `costs.cheaper_inverse` predicts it: "direct" on every processor
            measured so far and, by the computed floors, on GPUs that were not calibrated.
        return_info: also return a `SolveInfo`.

    Returns:
        X (..., d, d) in fp32, or fp64 for fp64 input; with `return_info`, (X, info). A matrix that
        Cholesky rejects in fp32 is retried in fp64, which `info.fallback` tells.

    Raises:
        ValueError: A is not square, symmetric or finite, or the named matrix is not positive
            definite even in fp64; unknown method.
        TypeError: A is not a floating-point tensor.
    """
    if method not in ("auto", "direct", "schulz"):
        raise ValueError(f"method must be auto, direct or schulz, got {method!r}")
    if method == "schulz":
        return schulz_inverse(A, return_info=True) if return_info else schulz_inverse(A)
    A = checked_shape(A)
    size, batch = A.shape[-1], math.prod(A.shape[:-2])
    if (
        method == "auto"
        and A.numel()
        and cheaper_inverse(size, batch, dtype=A.dtype, device=A.device) == "schulz"
    ):
        return schulz_inverse(A, return_info=True) if return_info else schulz_inverse(A)
    # the compiled kernel tests every matrix while it has it in cache, and its inverse
    tested = A.numel() > 0 and explain("spd_inverse", A).backend == "cpu"
    if not tested:
        refuse_unfit(A)
    if A.numel() == 0:
        X, failed = A.clone(), torch.zeros(A.shape[:-2], dtype=torch.int32, device=A.device)
    else:
        X, failed = call("spd_inverse", (A,))
    fallback = None
    bad = failed != 0
    if bool(bad.any()):
        if tested:
            refuse_unfit(A)
        retried, info64 = call("spd_inverse", (A[bad].double(),))
        failed_again = torch.zeros_like(bad)
        failed_again[bad] = info64 > 0
        refuse_indefinite(failed_again, "Cholesky fails in fp64")
        X = X.masked_scatter(bad[..., None, None].expand_as(X), retried.to(X.dtype))
        fallback = f"{int(bad.sum())} of {bad.numel()} matrices needed fp64"
    if A.numel() and (fallback or not tested):
        refuse_overflow(X)
    if not return_info:
        return X
    if A.numel() == 0:
        residual = floor = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    else:
        _, residual = inverse_residual(A, X)
        floor = inverse_floor(A, X)
    info = solve_info(A, "direct", 1, 0, residual, None, floor, fallback)
    return X, replace(info, backend=explain("spd_inverse", A).backend)

"""Inverse of SPD matrices by the faster of a direct factorisation and Schulz steps."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .adaptive import probed
from .ambient import exactly
from .costs import cheaper_inverse
from .dispatch import call, explain
from .norms import norms_of
from .schulz import schulz_inverse
from .solve import (
    BOUND,
    COARSE,
    ESTIMATE,
    MEASURED,
    Check,
    SolveInfo,
    checked_shape,
    inverse_floor,
    inverse_residual,
    no_info,
    refuse_indefinite,
    refuse_overflow,
    refuse_unfit,
    solve_info,
)

Method = Literal["auto", "direct", "schulz"]


@overload
def spd_inverse(
    A: Tensor, *, method: Method = ..., check: Check = ..., return_info: Literal[False] = ...
) -> Tensor: ...
@overload
def spd_inverse(
    A: Tensor, *, method: Method = ..., check: Check = ..., return_info: Literal[True]
) -> tuple[Tensor, SolveInfo]: ...
@exactly
def spd_inverse(
    A: Tensor, *, method: Method = "auto", check: Check = "bound", return_info: bool = False
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Inverse of symmetric positive definite matrices, `torch.linalg.inv(A)`.

    Args:
        A: (..., d, d), fp16, bf16, fp32 or fp64.
        method: "direct" is a Cholesky inverse, d^3 flop; "schulz" is `schulz_inverse`; "auto" takes
            the faster one as `costs.cheaper_inverse` predicts it: "direct" on every processor
            measured so far and, by the computed floors, on GPUs that were not calibrated.
        check: how the info's residual is known. "bound": by the backward error of Cholesky and the
            norms of A and X, and by four fp64 probes where that misses the dtype's floor; "full":
            measured in fp64; "off": nothing is claimed.
        return_info: also return a `SolveInfo`.

    Returns:
        X (..., d, d) in fp32, or fp64 for fp64 input; with `return_info`, (X, info). A matrix that
        Cholesky rejects in fp32 is retried in fp64, which `info.fallback` tells.

    Raises:
        ValueError: A is not square, symmetric or finite, or the named matrix is not positive
            definite even in fp64; unknown method or check.
        TypeError: A is not a floating-point tensor.
    """
    if method not in ("auto", "direct", "schulz"):
        raise ValueError(f"method must be auto, direct or schulz, got {method!r}")
    A = checked_shape(A, check=check)
    size, batch = A.shape[-1], math.prod(A.shape[:-2])
    if A.numel() == 0:
        return (A.clone(), no_info(A, "direct", check)) if return_info else A.clone()
    if method == "schulz" or (
        method == "auto"
        and cheaper_inverse(size, batch, dtype=A.dtype, device=A.device) == "schulz"
    ):
        if return_info:
            return schulz_inverse(A, check=check, return_info=True)
        return schulz_inverse(A, check=check)
    backend = explain("spd_inverse", A).backend
    # the compiled kernel tests every matrix while it has it in cache, and its inverse
    tested = backend == "cpu"
    if not tested and not bool(norms_of(A.reshape(-1, size, size)).fit().all()):
        refuse_unfit(A)
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
    # a sum is not finite where an entry is not; the slower test says which, if any
    if fallback or (not tested and not bool(torch.isfinite(X.sum()))):
        refuse_overflow(X)
    if not return_info:
        return X
    residual, known, floor = _known(A.reshape(-1, size, size), X.reshape(-1, size, size), check)
    return X, solve_info(
        A, "direct", 1, 0, residual, known, None, floor, check, fallback, backend=backend
    )


def _known(A: Tensor, X: Tensor, check: str) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals of Cholesky inverses X (B, d, d), how they are known, and the dtype's floor.

    The bound follows the three roundings, with gamma = (d + 4) u: A = L L^T + E, |E| <= gamma
    |L| |L|^T; M = L^-1 with ||L M - I|| <= gamma ||L|| ||M||; X = M^T M within gamma |M|^T |M|. As
    ||L||_F^2 = tr A and ||M||_F^2 = tr X,

        ||I - A X||_F <= gamma (tr(A) ||X||_F + ||A||_F tr(X) + sqrt(tr(A) tr(X))) to first order.
    """
    if check == "full":
        _, residual = inverse_residual(A, X)
        known = torch.full_like(residual, MEASURED, dtype=torch.int8)
        return residual, known, inverse_floor(A, X)
    d, roundoff = A.shape[-1], torch.finfo(A.dtype).eps / 2
    a, x = norms_of(A), norms_of(X)
    floor = (16 * roundoff * a.rows * x.rows).clamp_max(COARSE)
    bound = a.trace * x.frobenius + a.frobenius * x.trace + (a.trace * x.trace).sqrt()
    residual = ((d + 4) * roundoff / d**0.5 * bound).nan_to_num(torch.inf)
    known = torch.full_like(residual, BOUND, dtype=torch.int8)
    missed = ~(residual <= floor)
    if check == "bound" and bool(missed.any()):
        chosen = missed.nonzero()[:, 0]
        residual = residual.index_copy(0, chosen, probed(A[chosen], X[chosen]))
        known = torch.where(missed, torch.full_like(known, ESTIMATE), known)
    return residual, known, floor

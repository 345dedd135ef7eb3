"""Closed forms judged row by row: a sketch sees every row, and rows that fail are done in fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .report import RESIDUAL_LIMIT, Outcome, precision_of
from .rows import squares

DIRECTIONS = 8
SUSPECT = RESIDUAL_LIMIT / 4  # 8 directions show less of an error over the limit once in 7,500
GROUP = 8  # rows compared at a time, so that their fp64 copies stay in cache


def solve_checked(formula: Callable[[Tensor], Tensor], V: Tensor) -> tuple[Tensor, Outcome]:
    """W = V A^-1 by a closed form in V's dtype, with the relative error of the worst row.

    A^-1 is symmetric, so <w, z> = <v, A^-1 z> for every row: with 8 random z and their A^-1 z in
    fp64, ||w - v A^-1|| is known for each row to about a factor of two. Rows over the limit are
    done again in fp64; a few rows are done in fp64 at once.

    Args:
        formula: rows (m, ...) to rows, linear and symmetric, computing in their dtype.
        V: (m, ...) in fp32 or fp64, m > 0.
    """
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(
        DIRECTIONS, *V.shape[1:], generator=generator, dtype=torch.float32, device="cpu"
    ).to(V.device, torch.float64)
    if len(V) <= DIRECTIONS or V.dtype == torch.float64:
        both = formula(torch.cat([V.double(), Z]))
        W, image, precision = both[: len(V)].to(V.dtype), both[len(V) :], "fp64"
        errors = row_errors(V, W, Z, image)
    else:
        W, image, precision = formula(V), formula(Z), precision_of(V.dtype)
        errors = row_errors(V, W, Z, image)
        # fp32 cancels in rows along directions of great curvature; a NaN fails too
        failed = torch.nonzero(~(errors <= SUSPECT)).flatten()
        if len(failed):
            W[failed] = formula(V[failed].double()).to(W.dtype)
            errors[failed] = row_errors(V[failed], W[failed], Z, image)
            precision = "fp64" if len(failed) == len(V) else "fp32 and fp64"
    worst = float(errors.max())
    return W, Outcome(precision=precision, residual=worst, converged=worst <= RESIDUAL_LIMIT)


def row_errors(V: Tensor, W: Tensor, Z: Tensor, image: Tensor) -> Tensor:
    """||w - v A^-1|| / ||w|| of every row, about, from `image` = Z A^-1 in fp64."""
    z, z_image = Z.flatten(1), image.flatten(1)
    errors = []
    for v, w in zip(V.flatten(1).split(GROUP), W.flatten(1).split(GROUP), strict=True):
        gap = (w.double() @ z.mT).sub_(v.double() @ z_image.mT)
        errors.append(gap.norm(dim=1) / DIRECTIONS**0.5)
    return torch.cat(errors) / squares(W.flatten(1)).sqrt().clamp_min(1e-300)

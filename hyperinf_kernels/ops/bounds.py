"""Bounds of the spectrum of SPD matrices, from which Schulz steps are scheduled.

A few Lanczos steps give an orthonormal Q, T = Q^T A Q and E = A Q - Q T. The rest of A, its
compression B to the complement of Q, is only known by its trace and Frobenius norm, which bound
||B|| by some b; then A is at most [[T, E^T], [E, b I]] in the Loewner order, whose top eigenvalue
is rigorous whatever Q is and tight where a few directions hold the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LANCZOS_STEPS = 32
# of the one bound that holds with a probability; a chain built on a wrong bound is seen to grow
FAILURE = 1e-12
EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Ritz:
    """What k Lanczos steps tell of each matrix of a batch.

    Attributes:
        values: (..., k) Ritz values, ascending; T: (..., k, k) the compression itself.
        residuals: (..., k), ||A y - theta y|| of each Ritz pair: an eigenvalue is within that.
        coupling: (..., k, k), the triangular factor of E = A Q - Q T.
    """

    values: Tensor
    residuals: Tensor
    T: Tensor
    coupling: Tensor


def lanczos(A: Tensor) -> Ritz:
    """`LANCZOS_STEPS` steps from one random vector, fully reorthogonalised, on fp64 A (..., d, d).

    A breakdown goes on in a direction made of rounding noise, which does no harm.
    """
    d = A.shape[-1]
    steps = min(d, LANCZOS_STEPS)
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(d, generator=generator, dtype=torch.float64, device="cpu").to(A.device)
    basis = (v / v.norm()).expand(A.shape[:-1]).unsqueeze(-1)
    for _ in range(steps - 1):
        w = A @ basis[..., -1:]
        for _ in range(2):
            w = w - basis @ (basis.mT @ w)
        norm = w.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
        basis = torch.cat([basis, w / norm], dim=-1)
    # orthonormal to rounding even after a breakdown: the bounds rest on nothing else
    Q = torch.linalg.qr(basis).Q
    AQ = A @ Q
    T = Q.mT @ AQ
    T = (T + T.mT) / 2
    coupling = torch.linalg.qr(AQ - Q @ T).R
    values, vectors = torch.linalg.eigh(T)
    return Ritz(values, (coupling @ vectors).norm(dim=-2), T, coupling)


def upper_bound(A: Tensor, lower: Tensor | float = 0.0, ritz: Ritz | None = None) -> Tensor:
    """An upper bound of the spectrum of A (..., d, d), fp64, per matrix.

    The least of: the trace and the Frobenius norm, each less what d - 1 eigenvalues of at least
    `lower` take of it; the infinity norm; and, with `ritz`, two bounds from Lanczos steps: the
    rigorous one of this module's head, and theta / (1 - eps), which fails with probability at most
    1.648 sqrt(d) exp(-sqrt(eps) (2k - 1)) = 1e-12 over the random start (Kuczynski and
    Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992) 1094-1122).

    Args:
        A: symmetric positive definite.
        lower: a lower bound of the spectrum, such as the damping.
        ritz: of the same matrices.
    """
    d = A.shape[-1]
    trace = A.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = A.square().sum((-2, -1))
    lower = torch.as_tensor(lower, dtype=A.dtype, device=A.device)
    bounds = [
        trace - (d - 1) * lower,
        (square - (d - 1) * lower**2).clamp_min(0).sqrt(),
        A.abs().sum(-1).amax(-1),
    ]
    if ritz is not None:
        k = ritz.values.shape[-1]
        bounds.append(_bordered(ritz, trace, square, lower, d - k))
        root = math.log(1.648 * math.sqrt(d) / FAILURE) / (2 * k - 1)
        if root < 1:
            bounds.append(ritz.values[..., -1] / (1 - root**2))
    return torch.stack(bounds).amin(0) * (1 + 16 * d * EPS64)


def _bordered(ritz: Ritz, trace: Tensor, square: Tensor, lower: Tensor, rest: int) -> Tensor:
    """Top eigenvalue of [[T, E^T], [E, b I]] with b >= ||B||, B of size `rest`."""
    k = ritz.values.shape[-1]
    noise = 16 * (k + rest) * EPS64
    if rest == 0:
        b = torch.zeros_like(trace)
    else:
        others = (rest - 1) * lower
        by_trace = trace * (1 + noise) - ritz.values.sum(-1) - others
        taken = ritz.T.square().sum((-2, -1)) + 2 * ritz.coupling.square().sum((-2, -1))
        by_square = square * (1 + noise) - taken - (rest - 1) * lower**2
        b = torch.minimum(by_trace, by_square.clamp_min(0).sqrt()).clamp_min(0)
    eye = torch.eye(k, dtype=trace.dtype, device=trace.device)
    top = torch.cat([ritz.T, ritz.coupling.mT], -1)
    bottom = torch.cat([ritz.coupling, b[..., None, None] * eye], -1)
    return torch.linalg.eigvalsh(torch.cat([top, bottom], -2))[..., -1]


def lower_estimate(A: Tensor, ritz: Ritz | None = None) -> Tensor:
    """An estimate of the smallest eigenvalue of fp64 A, per matrix, from Lanczos steps.

    Not a bound, and none is needed: a chain planned for too large an estimate leaves residuals
    below 1, which coupled steps finish at two products per factor of 2, and too small a one costs
    five products per factor of 81 (`iteration.chain` keeps it where rounding allows). The least
    Ritz value counts where its residual or the condition number says that it is an eigenvalue, as
    it soon is where many lie at the damping. Otherwise, since k steps resolve no condition number
    beyond about k^2, its ratio to the top is squared.
    """
    ritz = lanczos(A) if ritz is None else ritz
    values, steps, d = ritz.values, ritz.values.shape[-1], A.shape[-1]
    top = values[..., -1]
    # rounding can leave Ritz values at or below 0
    positive = torch.where(values > top[..., None] * EPS64, values, top[..., None])
    ratio = positive.amin(-1) / top
    # a Ritz value errs by less than its residual, and than residual^2 / its distance to the others
    off, half = ritz.residuals[..., 0], values[..., 0] / 2
    found = (off < half) | (off**2 < half * (values[..., min(1, steps - 1)] - values[..., 0]))
    resolved = (steps == d) | (ratio * steps**2 > 4) | found
    return top * torch.where(resolved, ratio / 2, ratio**2)

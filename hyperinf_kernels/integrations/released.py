"""The released code's numbers, its slips included: DataInf, 30 Schulz steps, ten LiSSA steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import gfim_accumulate_, row_dots, span
from .samples import Samples

__all__ = ["RELEASED", "released_inverse"]

ITERATIONS, START, EXTRA = 30, 5e-5, 1e-3
CHUNK = 256


def _lambda(squares: Tensor, V: Tensor, lambda_const_param: float) -> float:
    """The mean squared gradient entry over `lambda_const_param`, from ||g_i||^2 (n,)."""
    return float(squares.sum()) / len(squares) / V[0].numel() / lambda_const_param


def _released_datainf(train: Samples, V: Tensor, lambda_const_param: float) -> Tensor:
    """mean_i (g_i g_i^T + lambda I)^-1 v, in the gradients' dtype."""
    flat = V.flatten(1)
    rows = train.parts(flat)
    dots, squares = row_dots(rows, flat)
    lam = _lambda(squares, V, lambda_const_param)
    weights = dots / (len(squares) * (lam + squares))[:, None]
    return span(rows, flat, weights / -lam, 1 / lam)[0].view_as(V)


def _released_schulz(train: Samples, V: Tensor, lambda_const_param: float) -> Tensor:
    """V X_30 with A = mean_i g_i^T g_i + (lambda + 0.001) I, C built in the gradients' dtype."""
    G, size = train.whole, V.shape[2]
    C = torch.zeros(size, size, dtype=torch.float64, device=G.device)
    part_sum = torch.empty(size, size, dtype=G.dtype, device=G.device)
    for part in G.split(CHUNK):
        # as released, products are in the gradients' dtype; only the sum of chunks is wider
        C += gfim_accumulate_(part_sum.zero_(), part)
    C /= len(G)
    lam = _lambda(train.squares, V, lambda_const_param) + EXTRA
    C.diagonal().add_(lam)
    W = released_inverse(C, V.double().flatten(0, 1), lam)
    return W.view_as(V).to(V.dtype)


def released_inverse(A: Tensor, V: Tensor, smallest: float) -> Tensor:
    """V X_30 of the released Schulz iteration, in fp64 and in closed form.

    X_k = (1 - (1 - 5e-5 mu)^(2^k)) / mu on the eigenvalues mu of A. Where every direction has
    converged beyond fp64 that is A^-1, and one Cholesky gives it.

    Args:
        A: (d, d) symmetric positive definite. V: (m, d). smallest: a lower bound of A's spectrum.

    Raises:
        InputError: the largest eigenvalue is over 4e4, where the iteration diverges.
    """
    converged = START * 2.0**ITERATIONS * smallest > 45  # exp(-45) is below fp64 rounding
    if converged and float(A.diagonal().sum()) * START < 1:
        return torch.cholesky_solve(V.mT, torch.linalg.cholesky(A)).mT
    mu, Q = torch.linalg.eigh(A)
    if float(mu[-1]) * START >= 2:
        raise InputError(
            f"the released Schulz iteration diverges: the largest eigenvalue is {float(mu[-1]):.2e}"
            f", its limit {2 / START:.0e}; use mode='converged'"
        )
    x = START * mu
    # log1p keeps digits where x is small; beyond x = 1 the power of 1 - x is even
    log = torch.where(x < 0.5, torch.log1p(-x.clamp(max=0.5)), (1 - x).abs().log())
    gain = -torch.expm1(2.0**ITERATIONS * log) / mu
    return (V @ Q * gain) @ Q.mT


def _released_lissa(train: Samples, V: Tensor, lambda_const_param: float) -> Tensor:
    """Ten steps r <- v + r - (mean_i <g_i, r> g_i - lambda r): the damping's sign is released."""
    P, v = train.whole.flatten(1), V.flatten(1)
    lam = _lambda(train.squares, V, lambda_const_param)
    r = v
    for _ in range(10):
        r = v + r - ((r @ P.mT) @ P / len(P) - lam * r)
    return r.view_as(V)


# (gradients of n samples, queries (m, r, d), lambda_const_param) -> (m, r, d)
RELEASED: dict[str, Callable[[Samples, Tensor, float], Tensor]] = {
    "datainf": _released_datainf,
    "hyperinf": _released_schulz,
    "lissa": _released_lissa,
}

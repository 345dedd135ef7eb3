"""What a competent user writes in plain torch: each method in a dozen lines, whole blocks at once.

Flattened rows P (n, D) or gradients (n, r, d) in their own dtype, damping 0.1 x the mean square, no
checks. Given fp64 tensors the same lines are the reference for errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

DAMPING = 0.1


def grad_dot(P: Tensor, V: Tensor) -> Tensor:
    """-V P^T."""
    return -(V.flatten(1) @ P.flatten(1).mT)


def datainf(P: Tensor, V: Tensor) -> Tensor:
    """Two products for W and one for the scores."""
    P, V = P.flatten(1), V.flatten(1)
    norms = P.square().sum(1)
    lam = DAMPING * norms.mean() / P.shape[1]
    W = (V - (V @ P.mT / (lam + norms)) @ P / len(P)) / lam
    return -(W @ P.mT)


def hyperinf(P: Tensor, V: Tensor) -> Tensor:
    """One product for the GFIM, a Cholesky factor, and one product for the scores."""
    rows = P.flatten(0, 1)
    A = rows.mT @ rows / len(P)
    A.diagonal().add_(DAMPING * P.square().mean())
    W = torch.cholesky_solve(V.flatten(0, 1).mT, torch.linalg.cholesky(A)).mT
    return -(W.reshape(len(V), -1) @ P.flatten(1).mT)


def exact(P: Tensor, V: Tensor) -> Tensor:
    """-n L (K + n lam)^-1: one Gram product and a Cholesky factor."""
    lam = DAMPING * P.square().mean()
    P, V = P.flatten(1), V.flatten(1)
    K = P @ P.mT
    K.diagonal().add_(len(P) * lam)
    return -len(P) * torch.cholesky_solve((V @ P.mT).mT, torch.linalg.cholesky(K)).mT


def kfac(P: Tensor, V: Tensor) -> Tensor:
    """Eigenvectors of both sides' second moments."""
    rows, sides = P.flatten(0, 1), P.transpose(0, 1).flatten(1)
    trace = P.square().sum() / len(P)
    c, U = torch.linalg.eigh(rows.mT @ rows / len(P))
    s, Q = torch.linalg.eigh(sides @ sides.mT / len(P))
    E = s[:, None] * c / trace + DAMPING * P.square().mean()
    W = Q @ ((Q.mT @ V @ U) / E) @ U.mT
    return -(W.flatten(1) @ P.flatten(1).mT)


def ekfac(P: Tensor, V: Tensor) -> Tensor:
    """The same with the mean square in that basis."""
    rows, sides = P.flatten(0, 1), P.transpose(0, 1).flatten(1)
    U = torch.linalg.eigh(rows.mT @ rows / len(P)).eigenvectors
    Q = torch.linalg.eigh(sides @ sides.mT / len(P)).eigenvectors
    E = (Q.mT @ P @ U).square().mean(0) + DAMPING * P.square().mean()
    W = Q @ ((Q.mT @ V @ U) / E) @ U.mT
    return -(W.flatten(1) @ P.flatten(1).mT)


METHODS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad_dot": grad_dot, "datainf": datainf, "hyperinf": hyperinf, "exact": exact, "kfac": kfac,
    "ekfac": ekfac,
}  # fmt: skip


def influence(
    method: str, train: Mapping[str, Tensor], query: Mapping[str, Tensor], wide: bool = False
) -> Tensor:
    """Scores (m, n) summed over blocks; `wide` in fp64, one block at a time."""
    take = (lambda t: t.double()) if wide else (lambda t: t)
    parts = (METHODS[method](take(train[name]), take(query[name])) for name in train)
    total = next(parts)
    for part in parts:
        total += part
    return total


def schulz(A: Tensor, steps: int) -> Tensor:
    """X <- X (2 I - A X) from X = I / ||A||_F, `steps` times."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype)
    X = eye / torch.linalg.matrix_norm(A)[..., None, None]
    for _ in range(steps):
        X = torch.baddbmm(X, X, torch.baddbmm(eye, A, X, alpha=-1))
    return X


def cholesky_inverse(A: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(A))

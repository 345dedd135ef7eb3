"""Conjugate gradients solve the exact system, per query, and say when they did not get there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk


def dense_solution(train: torch.Tensor, query: torch.Tensor) -> np.ndarray:
    """V (P^T P / n + lambda I)^-1 in fp64 numpy."""
    P, Q = (t.double().flatten(1).numpy() for t in (train, query))
    A = P.T @ P / len(P) + 0.1 * np.mean(P**2) * np.eye(P.shape[1])
    return np.linalg.solve(A, Q.T).T.reshape(query.shape)


@pytest.mark.parametrize("n", [6, 50], ids=["gram space", "primal space"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_cg_solves_the_exact_system(n: int, dtype: torch.dtype) -> None:
    train, query = torch.randn(n, 3, 7, dtype=dtype), torch.randn(4, 3, 7, dtype=dtype)
    query[2] *= 1e-6
    solver = hk.CG(tol=1e-12 if dtype == torch.float64 else 1e-6)
    for part in train.split((1, n - 3, 2)):
        solver.update({"block": part})
    W = solver.fit().apply({"block": query})["block"].double().numpy()
    want = dense_solution(train, query)
    # condition number of these spectra stays below 1e3; a residual of tol is an error of 1e3 tol
    limit = 1e-8 if dtype == torch.float64 else 1e-3
    for got_row, want_row in zip(W, want, strict=True):
        assert np.linalg.norm(got_row - want_row) <= limit * np.linalg.norm(want_row)
    (entry,) = solver.report()
    assert entry.converged
    assert entry.iterations > 3


def test_cg_says_when_it_did_not_converge() -> None:
    train, query = torch.randn(30, 4, 5), torch.randn(2, 4, 5)
    scores = hk.influence({"b": train}, {"b": query}, method="cg", iterations=2)
    (entry,) = scores.report
    assert not entry.converged
    assert "after 2 steps" in entry.fallback
    assert scores.certificate()["certified"] is False
    V = query.double().flatten(1).numpy()
    solver = hk.CG(iterations=2)
    solver.update({"b": train})
    W = solver.fit().apply({"b": query})["b"].double().flatten(1).numpy()
    P = train.double().flatten(1).numpy()
    A = P.T @ P / 30 + 0.1 * np.mean(P**2) * np.eye(20)
    true = np.max(np.linalg.norm(V - W @ A, axis=1) / np.linalg.norm(V, axis=1))
    assert entry.residual == pytest.approx(true, rel=1e-3)

"""Embeddings and self-influence from a root of the inverse: accuracy, cost and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from tests import oracle


def near_collinear(n: int, noise: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 8, 640, generator=generator)
    train = (1 + 0.3 * torch.randn(n, 1, 1, generator=generator)) * u
    train = train + noise * torch.randn(n, 8, 640, generator=generator)
    return train, torch.randn(4, 8, 640, generator=generator)


@pytest.mark.parametrize("noise", [1e-1, 1e-4])
@pytest.mark.parametrize("make", [hk.Exact, hk.DataInf], ids=lambda c: c.method)
def test_halves_keep_their_digits_where_one_direction_dominates(make: Any, noise: float) -> None:
    train, query = near_collinear(60, noise)
    solver = make()
    solver.update({"a": train})
    x, y = (oracle.f64(solver.half({"a": g})["a"]) for g in (query, train))
    P, Q, lam, n = oracle.flatten(train), oracle.flatten(query), solver.lambdas["a"], len(train)
    K, L = P @ P.T, Q @ P.T
    if make is hk.Exact:
        want = n * np.linalg.solve(K + n * lam * np.eye(n), L.T).T
    else:
        want = (L - (L / (lam + np.diag(K))) @ K / n) / lam
    assert np.linalg.norm(x @ y.T - want) <= 1e-5 * np.linalg.norm(want)


@pytest.mark.parametrize("options", [{}, {"inverse": "dual"}], ids=["auto", "dual"])
def test_few_rows_need_no_matrix_of_the_columns_size(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a d x d matrix was formed")

    monkeypatch.setattr(hk.HyperINF, "curvature", refuse)
    generator = torch.Generator().manual_seed(2)
    train, query = (torch.randn(n, 2, 300, generator=generator) for n in (20, 5))
    solver = hk.HyperINF(**options)
    for batch in train.split((7, 1, 12)):
        solver.update({"a": batch})
    own = oracle.f64(solver.self_influence({"a": train}))
    # one by one or together: the embeddings are of one root
    x = oracle.f64(torch.cat([solver.half({"a": q[None]})["a"] for q in query]))
    y = oracle.f64(solver.half({"a": train})["a"])
    G = oracle.f64(train)
    C = np.einsum("nri,nrj->ij", G, G) / len(G) + solver.lambdas["a"] * np.eye(300)
    W = np.linalg.solve(C, G.reshape(-1, 300).T).T.reshape(G.shape)
    assert np.allclose(own, -(W * G).sum((1, 2)), rtol=1e-6)
    want = oracle.flatten(query) @ W.reshape(len(W), -1).T
    assert np.linalg.norm(x @ y.T - want) <= 1e-6 * np.linalg.norm(want)
    (entry,) = solver.report()
    assert entry.converged
    assert entry.residual < 1e-6


@pytest.mark.parametrize("make", [hk.KFAC, hk.EKFAC, hk.Exact, hk.HyperINF])
def test_what_fp32_cannot_hold_is_an_error(make: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    train = 1e-30 * torch.randn(30, 2, 5, generator=generator)
    solver = make(1e-60)
    solver.update({"a": train})
    with pytest.raises(hk.InputError, match=r"NaN or inf"):
        solver.self_influence({"a": torch.ones(3, 2, 5)})
    with pytest.raises(hk.InputError, match=r"block a: \w+'s half\(\) gave NaN or inf"):
        solver.half({"a": 1e15 * torch.ones(3, 2, 5)})

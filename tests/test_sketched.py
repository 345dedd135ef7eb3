"""Closed forms are judged row by row: one row where fp32 cancels must not hide among others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.solvers.sketched import solve_checked
from tests import oracle

EPS32 = float(np.finfo(np.float32).eps)
ALIGNED = 37


def collinear(n: int, r: int, d: int) -> tuple[Tensor, Tensor]:
    """Gradients c_i u, exactly of rank one in fp32, and queries of which one is along u."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(1, 5, (k,), generator=generator).float() for k in (r, d))
    u = torch.outer(left, right)
    c = torch.tensor([0.5, 1.0, 2.0]).repeat(n)[:n]
    # its norm is in the middle of the others'
    queries = 4 * torch.randn(101, r, d, generator=generator)
    queries *= torch.linspace(0.5, 4, 101)[:, None, None]
    queries[ALIGNED] = u
    return c[:, None, None] * u, queries


@pytest.mark.parametrize("make", [hk.KFAC, hk.EKFAC, hk.DataInf], ids=lambda c: c.method)
def test_a_row_that_fp32_loses_is_found_among_a_hundred(make: Any) -> None:
    train, queries = collinear(12, 32, 512)
    solver = make()
    solver.update({"a": train})
    got = oracle.f64(solver.apply({"a": queries})["a"])[ALIGNED]
    lam, squares = solver.lambdas["a"], oracle.f64(train.flatten(1).double().square().sum(1))
    # all curvature is along u, where K-FAC and EK-FAC have the mean of ||g||^2
    factor = (1 / (lam + squares)).mean() if make is hk.DataInf else 1 / (lam + squares.mean())
    want = factor * oracle.f64(queries[ALIGNED])
    assert np.linalg.norm(got - want) <= 16 * EPS32 * np.linalg.norm(want)
    (entry,) = solver.report()
    assert entry.converged
    assert entry.residual <= 32 * EPS32
    assert entry.precision == ("fp32 and fp64" if make is hk.DataInf else "fp64")
    # the same query alone
    alone = solver.apply({"a": queries[ALIGNED : ALIGNED + 1]})["a"]
    assert np.linalg.norm(oracle.f64(alone)[0] - got) <= 4 * EPS32 * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("share", [1e-2, 1e-6])
def test_what_is_reported_is_the_error_of_the_worst_row(
    m: int, share: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    S = torch.randn(60, 60, generator=generator, dtype=torch.float64)
    S, V = S + S.mT, torch.randn(m, 60, generator=generator).to(dtype)
    V[1] *= 1e-6
    off = torch.randn(60, generator=generator, dtype=torch.float64)

    def wrong(X: Tensor) -> Tensor:
        """X S, but for one row, in any precision."""
        W = X @ S.to(X.dtype)
        hit = (X.double() - V[1].double()).norm(dim=1) < 1e-12
        gap = share * W.norm(dim=1, keepdim=True) * (off / off.norm()).to(X.dtype)
        return W + hit[:, None] * gap

    W, outcome = solve_checked(wrong, V)
    truth = V.double() @ S
    errors = (W.double() - truth).norm(dim=1) / truth.norm(dim=1)
    assert int(errors.argmax()) == 1
    # eight directions tell a norm to a factor of two
    assert outcome.residual == pytest.approx(float(errors.max()), rel=1.0)
    assert outcome.residual >= float(errors.max()) / 2
    assert outcome.converged is (share < 1e-3)

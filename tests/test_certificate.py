"""The certificate tells the truth where the arithmetic is strained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk


def strained(n: int, r: int, d: int, seed: int = 0) -> torch.Tensor:
    """Gradients that share one strong direction, so that the damping is far below the top."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1, r, d, generator=generator) * 30
    return common * torch.rand(n, 1, 1, generator=generator) + torch.randn(
        n, r, d, generator=generator
    )


def true_residual(
    train: torch.Tensor, V: torch.Tensor, W: torch.Tensor, lam: float, flat: bool
) -> float:
    """||V - W A|| / ||V|| in fp64 numpy, A from the gradients as given."""
    G, V64, W64 = (t.double().numpy() for t in (train, V, W))
    if flat:
        P = G.reshape(len(G), -1)
        V64, W64 = V64.reshape(len(V), -1), W64.reshape(len(W), -1)
        A = P.T @ P / len(P)
    else:
        A = np.einsum("nrd,nre->de", G, G) / len(G)
    E = V64 - W64 @ (A + lam * np.eye(len(A)))
    return float(np.linalg.norm(E) / np.linalg.norm(V64))


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5], ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda c: hk.HyperINF(hk.DataInfDamping(c)),
        lambda c: hk.HyperINF(hk.DataInfDamping(c), inverse="schulz"),
        lambda c: hk.Exact(hk.DataInfDamping(c)),
        lambda c: hk.CG(hk.DataInfDamping(c)),
        lambda c: hk.LiSSA(hk.DataInfDamping(c), iterations=50),
    ],
    ids=["hyperinf", "schulz", "exact", "cg", "lissa"],
)
def test_the_reported_residual_is_true_to_a_factor_of_two(make, damping: float) -> None:
    train, query = strained(60, 3, 40), torch.randn(4, 3, 40)
    solver = make(damping)
    for part in train.split((7, 1, 52)):
        solver.update({"b": part})
    W = solver.fit().apply({"b": query})["b"]
    (entry,) = solver.report()
    true = true_residual(train, query, W, entry.damping, flat=not isinstance(solver, hk.HyperINF))
    assert true / 2 <= entry.residual <= 2 * true
    # whatever is called converged holds its promise
    assert not entry.converged or true <= 2e-3


@pytest.mark.parametrize("method", ["exact", "hyperinf", "cg", "datainf"])
def test_converged_means_small_even_far_below_fp32(method: str) -> None:
    train, query = strained(30, 4, 32, seed=1), torch.randn(3, 4, 32)
    scores = hk.influence({"b": train}, {"b": query}, method, hk.DataInfDamping(1e-7))
    (entry,) = scores.report
    assert entry.converged == (entry.residual <= 1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_zero_damping_with_a_singular_block_never_passes_by_luck(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # 15 rows in all for a 16 x 16 matrix
    train = {"b": torch.randn(15, 1, 16, generator=generator)}
    query = {"b": torch.randn(2, 1, 16, generator=generator)}
    with pytest.raises(hk.InputError, match="block b: the GFIM of 15 samples .* is singular"):
        hk.influence(train, query, "hyperinf", 0.0)


def test_zero_damping_is_fine_where_the_gfim_is_regular() -> None:
    train, query = torch.randn(50, 2, 6), torch.randn(3, 2, 6)
    values = hk.influence({"b": train}, {"b": query}, "hyperinf", 0.0).values.double()
    G = train.double()
    C = torch.einsum("nrd,nre->de", G, G) / 50
    want = -(query.double() @ torch.linalg.inv(C)).flatten(1) @ G.flatten(1).T
    assert torch.allclose(values, want, rtol=1e-4, atol=1e-4)


def test_datainf_rows_that_cancel_in_fp32_are_redone_in_fp64() -> None:
    g = torch.randn(1, 2, 30) * 1e3
    train = g + torch.randn(6, 2, 30) * 1e-3
    # a strong query that survives the correction, and a weak one that it almost removes
    query = torch.cat([torch.randn(1, 2, 30) * 1e3, g * 1e-3])
    solver = hk.DataInf(hk.DataInfDamping(1e-8))
    solver.update({"b": train})
    W = solver.fit().apply({"b": query})["b"].double().flatten(1)
    P, Q = train.double().flatten(1), query.double().flatten(1)
    lam = 1e-8 * float(P.square().mean())
    want = torch.stack(
        [torch.stack([(v - (v @ p) / (lam + p @ p) * p) / lam for p in P]).mean(0) for v in Q]
    )
    errors = (W - want).norm(dim=1) / want.norm(dim=1)
    (entry,) = solver.report()
    assert float(errors.max()) <= max(1e-3, 2 * entry.residual)
    assert entry.converged


def test_scores_that_overflow_are_refused() -> None:
    huge = {"b": torch.full((2, 1, 3), 1e25)}
    with pytest.raises(hk.InputError, match="block b: its scores hold NaN or inf"):
        hk.influence(huge, huge, "grad_dot")


def test_loose_bounds_cannot_make_a_bad_inverse_look_converged() -> None:
    A = torch.diag(torch.linspace(1, 10, 20))
    for solve in (
        lambda: hk.schulz_inverse(A, bounds=(1e-9, 1e9), return_info=True),
        lambda: hk.schulz_solve(A, torch.eye(20), bounds=(1e-9, 1e9), return_info=True),
    ):
        X, info = solve()
        error = float((X.double() - torch.linalg.inv(A.double())).norm())
        assert not bool(info.converged) or error < 1e-4


def test_an_inverse_beyond_fp32_is_refused() -> None:
    with pytest.raises(ValueError, match="overflows"):
        hk.spd_inverse(1e-40 * torch.eye(3))

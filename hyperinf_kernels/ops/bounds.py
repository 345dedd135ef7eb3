"""Bounds of the spectrum of SPD matrices, from which Schulz steps are scheduled."""

from __future__ import annotations

import torch
from torch import Tensor

LANCZOS_STEPS = 24


def upper_bound(A: Tensor) -> Tensor:
    """A rigorous upper bound of the spectrum: least of trace, infinity norm and Frobenius norm."""
    norms = (
        A.diagonal(dim1=-2, dim2=-1).sum(-1),
        A.abs().sum(-1).amax(-1),
        A.square().sum((-2, -1)).sqrt(),
    )
    return torch.stack(norms).amin(0)


def lower_estimate(A: Tensor) -> Tensor:
    """An estimate of the smallest eigenvalue, by a few Lanczos steps with full reorthogonalisation.

    Not a bound: too large an estimate costs a few more products, it never diverges. k steps cannot
    resolve condition numbers beyond about k^2, so an estimate past that is squared.
    """
    d = A.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(0)
    v = torch.randn(d, generator=generator, dtype=torch.float64).to(A.device, A.dtype)
    v = (v / v.norm()).expand(A.shape[:-1]).unsqueeze(-1)
    steps = min(d, LANCZOS_STEPS)
    basis = v
    for _ in range(steps - 1):
        w = A @ basis[..., -1:]
        for _ in range(2):
            w = w - basis @ (basis.mT @ w)
        norm = w.norm(dim=-2, keepdim=True)
        basis = torch.cat([basis, w / norm.clamp_min(torch.finfo(A.dtype).tiny)], dim=-1)
    ritz = torch.linalg.eigvalsh(basis.mT @ (A @ basis))
    # a breakdown leaves null columns, whose Ritz value is 0
    top = ritz[..., -1]
    positive = torch.where(ritz > top[..., None] * torch.finfo(A.dtype).eps, ritz, top[..., None])
    ratio = positive.amin(-1) / top
    resolved = (steps == d) | (ratio * steps**2 > 4)
    return top * torch.where(resolved, ratio / 2, ratio**2)

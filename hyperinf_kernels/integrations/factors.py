"""A fitted HyperINF as Kronecker eigen-factors, which EK-FAC engines apply from files.

(C + lambda I)^-1 on one side of G (O, I) is Q_G [(Q_G^T G Q_A) / E] Q_A^T with the eigenvectors of
C on that side, the identity on the other, and E the same eigenvalues along it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import HyperINF
from .layout import LORA_B

__all__ = ["EigenFactors", "eigen_factors"]


@dataclass(frozen=True)
class EigenFactors:
    """Q_A (I, I), Q_G (O, O) and E (O, I), the damping inside E; fp64."""

    activation: Tensor
    gradient: Tensor
    eigenvalues: Tensor

    def apply(self, G: Tensor, power: float = -1.0) -> Tensor:
        """(B, O, I) -> H^power G, in G's dtype."""
        A, S = self.activation.to(G.device), self.gradient.to(G.device)
        rotated = S.mT @ G.double() @ A * self.eigenvalues.to(G.device) ** power
        return (S @ rotated @ A.mT).to(G.dtype)


def eigen_factors(solver: HyperINF) -> dict[str, EigenFactors]:
    """{block: factors} of a fitted HyperINF on either side, converged or as released.

    A released solver's E is 1 / x_k(mu), its filter after k steps instead of the inverse.

    Raises:
        InputError: not a fitted HyperINF, a singular block, or a released filter that diverges.
    """
    if not isinstance(solver, HyperINF):
        raise InputError(f"only HyperINF has one-sided factors, not {type(solver).__name__}")
    if solver.side == "both":
        raise InputError("one-sided factors need HyperINF(side='cols') or side='rows'")
    if not solver.lambdas:
        raise InputError("the solver is not fitted: call update() and fit() first")
    found = {}
    for name, state in solver.blocks.items():
        E, Q = torch.linalg.eigh(solver.curvature(name).cpu())
        E = E.clamp_min(solver.lambdas[name]) / state.unit
        if solver.mode == "paper":
            x = solver.start * E
            if float(x.max()) >= 2:
                raise InputError(f"block {name}: the released iteration diverges on it")
            log = torch.where(x < 0.5, torch.log1p(-x.clamp(max=0.5)), (1 - x).abs().log())
            E = E / -torch.expm1(2.0**solver.iterations * log)
        if float(E.min()) <= 0:
            raise InputError(f"block {name}: the GFIM is singular; add damping")
        # blocks are (r, d): for LoRA B that is the transpose of the parameter (d, r)
        transposed = bool(LORA_B.search(name))
        rows, cols = state.shape[::-1] if transposed else state.shape
        on_columns = (solver.side == "cols") != transposed
        other = torch.eye(rows if on_columns else cols, dtype=Q.dtype)
        if on_columns:
            found[name] = EigenFactors(Q, other, E.expand(rows, cols).contiguous())
        else:
            found[name] = EigenFactors(other, Q, E[:, None].expand(rows, cols).contiguous())
    return found

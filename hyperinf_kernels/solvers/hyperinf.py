"""HyperINF: the generalized Fisher (GFIM) of each block, inverted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import gfim_accumulate_, schulz_solve
from .base import BlockState, Solver
from .damping import DEFAULT_DAMPING, Damping
from .flat import relative
from .report import RESIDUAL_LIMIT, Outcome, precision_of

Mode = Literal["converged", "paper"]
Inverse = Literal["auto", "direct", "schulz"]

PAPER_LIMIT = 1e-2
EPS64 = torch.finfo(torch.float64).eps


class HyperINF(Solver):
    """W = V (C + lambda I)^-1 with C = mean_i g_i^T g_i (arXiv 2410.05090).

    `mode="converged"` solves to the accuracy of the dtype and certifies it. `mode="paper"` runs the
    released code's arithmetic step for step: fp32, X = start * I, `iterations` times
    X <- X (2 I - A X) without a stop test, with 0.001 added to the damping. Its k steps are the
    filter (1 - (1 - start mu)^(2^k)) / mu on the eigenvalues mu of A, so directions with
    start 2^k mu below 1 are scaled, not inverted, and mu over 2 / start diverges; the report
    carries both ends.

    Args:
        damping: as for every solver.
        side: "cols" is the d x d matrix that the released code uses for LoRA A and B alike;
            "rows" the r x r matrix mean_i g_i g_i^T, a different approximation.
        mode: "converged" or "paper".
        inverse: converged mode only. "direct" is one fp64 Cholesky, "schulz" Chebyshev-scaled
            Schulz steps with thin refinement, "auto" the faster of the two as measured.
        tol: converged mode only; residual to reach, None: as exact as fp32 allows.
        iterations, start, extra_damping: paper mode only.
    """

    method = "hyperinf"
    option_names = (
        "side", "mode", "inverse", "tol", "iterations", "start", "extra_damping",
    )  # fmt: skip

    def __init__(
        self,
        damping: Damping | float = DEFAULT_DAMPING,
        *,
        side: Literal["cols", "rows"] = "cols",
        mode: Mode = "converged",
        inverse: Inverse = "auto",
        tol: float | None = None,
        iterations: int = 30,
        start: float = 5e-5,
        extra_damping: float = 1e-3,
    ) -> None:
        for name, value, known in (
            ("side", side, ("cols", "rows")),
            ("mode", mode, ("converged", "paper")),
            ("inverse", inverse, ("auto", "direct", "schulz")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if iterations < 1 or not start > 0 or extra_damping < 0:
            raise ValueError(
                "iterations must be at least 1, start positive and extra_damping not negative, "
                f"got {iterations}, {start}, {extra_damping}"
            )
        self.side, self.mode, self.inverse, self.tol = side, mode, inverse, tol
        self.iterations, self.start, self.extra_damping = iterations, start, extra_damping
        super().__init__(damping)

    def reset(self) -> None:
        super().reset()
        self.sums: dict[str, Tensor] = {}

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        if name not in self.sums:
            size = self._size(self.blocks[name])
            self.sums[name] = torch.zeros(size, size, dtype=torch.float64, device=batch.device)
        # summed in fp64: what fp32 would lose here, no certificate could see later
        gfim_accumulate_(self.sums[name], batch, side=self.side)

    def _size(self, state: BlockState) -> int:
        return state.shape[1 if self.side == "cols" else 0]

    def _mean_eigenvalue(self, state: BlockState) -> float:
        return state.sum_square / state.n / self._size(state)

    def _fit_block(self, name: str, lam: float) -> None:
        if self.mode == "paper":
            self.lambdas[name] = lam + self.extra_damping

    def curvature(self, name: str) -> Tensor:
        """A = C + lambda I of a fitted block, in fp64."""
        state = self.blocks[name]
        A = self.sums[name] / state.n
        A.diagonal().add_(self.lambdas[name])
        return A

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        A = self.curvature(name)
        if self.mode == "paper":
            A = A.to(V.dtype)
        # the row side acts from the left: (A^-1 g)^T = g^T A^-1
        thin = (V if self.side == "cols" else V.mT).reshape(-1, A.shape[-1])
        if self.mode == "paper":
            W, outcome = self._paper(name, A, thin)
        elif self.inverse == "schulz":
            W, outcome = self._schulz(name, A, thin)
        else:
            W, outcome = self._direct(name, A, thin)
        if self.side == "cols":
            return W.view_as(V), outcome
        return W.view(len(V), V.shape[2], V.shape[1]).mT.contiguous(), outcome

    def _direct(self, name: str, A: Tensor, V: Tensor) -> tuple[Tensor, Outcome]:
        V64 = V.double()
        factor, info = torch.linalg.cholesky_ex(A)
        pivots = factor.diagonal().square()
        # without damping a singular matrix can pass by rounding luck, so its pivots are judged
        lucky = float(pivots.min()) <= 64 * len(A) * EPS64 * float(pivots.max())
        if int(info) > 0 or (self.lambdas[name] <= 0 and lucky):
            raise InputError(
                f"block {name}: the GFIM of {self.n} samples plus damping "
                f"{self.lambdas[name]:g} is singular; add damping"
            )
        W64 = torch.cholesky_solve(V64.mT, factor).mT
        W = W64.to(V.dtype)
        residual = relative(V64 - W.double() @ A, V64)
        return W, Outcome(
            precision="fp64",
            condition_bound=self._condition_bound(name),
            products=1,
            residual=residual,
            converged=residual <= (self.tol if self.tol is not None else RESIDUAL_LIMIT),
        )

    def _schulz(self, name: str, A: Tensor, V: Tensor) -> tuple[Tensor, Outcome]:
        lam = self.lambdas[name]
        if lam <= 0:
            raise InputError(f"block {name}: Schulz needs a positive damping, got {lam:g}")
        # inflated by rounding, since a bound 1 % too small diverges
        bounds = (lam, float(A.diagonal().sum()) * 1.01)
        W, info = schulz_solve(A.to(V.dtype), V, bounds=bounds, tol=self.tol, return_info=True)
        residual = relative(V.double() - W.double() @ A, V)
        return W, Outcome(
            backend=info.backend,
            precision=precision_of(W),
            condition_bound=self._condition_bound(name),
            products=info.products,
            iterations=info.iterations,
            residual=residual,
            converged=residual <= (self.tol if self.tol is not None else RESIDUAL_LIMIT),
            fallback=info.fallback,
        )

    def _paper(self, name: str, A: Tensor, V: Tensor) -> tuple[Tensor, Outcome]:
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        X = self.start * eye
        for _ in range(self.iterations):
            X = X @ (2 * eye - A @ X)
        W = V.to(A.dtype) @ X
        residual = relative(V.double() - W.double() @ A.double(), V)
        # diagonal entries lie between the extreme eigenvalues, and the trace bounds the largest
        low = self.start * self.lambdas[name]
        high = self.start * float(A.diagonal().sum())
        note = f"residual {residual:.1e}" if not residual <= PAPER_LIMIT else None
        if not bool(torch.isfinite(X).all()):
            note = f"start * mu reaches at most {high:.1e}; the iteration diverges above 2"
        elif low * 2.0**self.iterations < 1:
            note = (
                f"not converged: start * 2^{self.iterations} * lambda = "
                f"{low * 2.0**self.iterations:.1e}, directions below 1 are scaled, not inverted"
            )
        return W, Outcome(
            precision=precision_of(A),
            condition_bound=self._condition_bound(name),
            products=2 * self.iterations,
            iterations=self.iterations,
            residual=residual,
            converged=note is None,
            fallback=note,
        )

    def _tensors(self) -> dict[str, Tensor]:
        return dict(self.sums)

    def _take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.sums = dict(tensors)

"""Many methods and a whole grid of dampings from one Gram matrix per block."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.ambient import shielded
from ..ops.checks import accumulation_dtype
from .base import Solver
from .cg import CG
from .damping import DEFAULT_DAMPING, Damping, as_damping
from .datainf import DataInf
from .exact import Exact
from .flat import FlatSolver
from .grad_dot import GradDot, refuse_lost
from .gram import Seen
from .inputs import Gradients, not_finite
from .lissa import LiSSA
from .report import BlockReport, Check
from .scaling import TINY, Scaled, deliver

FLAT: dict[str, type[FlatSolver]] = {cls.method: cls for cls in (DataInf, Exact, CG, LiSSA)}
# measured at n = 900: one fp64 eigendecomposition takes as long as this many Cholesky factors
EIGH_PAYS = 50


@dataclass(frozen=True)
class GramScores:
    """influence[q, k] of one method at one damping, (m, n) summed over blocks; negative helps."""

    method: str
    damping: Damping
    values: Tensor
    report: list[BlockReport]


@shielded
class GramEngine:
    """Training gradients once, then any number of methods, dampings and queries.

    K = P P^T is formed once per block and call of `scores`, L = V P^T once per block and query set;
    DataInf, exact, CG, LiSSA and gradient dot all follow from the two at every damping. A grid of
    dampings costs a Cholesky factorisation each for the exact method, or one eigendecomposition per
    block in all where that is cheaper. Blocks are worked through one after the other, so memory is
    the rows plus a few n x n matrices, or neither with `folder`.

    Args:
        folder, check: as for the solvers of these methods; a solver object has its own `check`.
    """

    def __init__(
        self, *, folder: str | os.PathLike[str] | None = None, check: Check = "bound"
    ) -> None:
        self._store = Exact(folder=folder, check=check)

    @property
    def n(self) -> int:
        """Training samples seen so far."""
        return self._store.n

    def update(self, grads: Gradients, *, copy: bool = True) -> None:
        """Add a batch of per-sample training gradients, as `Solver.update`."""
        self._store.update(grads, copy=copy)

    def merge(self, other: Self) -> Self:
        """Append what another engine was updated with, as `Solver.merge`."""
        self._store.merge(other._store)
        return self

    def scores(
        self,
        queries: Gradients,
        methods: str | Solver | Sequence[str | Solver] = ("grad_dot", "datainf", "exact"),
        damping: Damping | float | Iterable[Damping | float] = DEFAULT_DAMPING,
    ) -> list[GramScores]:
        """Influence of every training row, one entry per method and damping, in that order.

        Args:
            queries: {block: (m, r, d)}.
            methods: one or several of "grad_dot" (which has no damping and so one entry),
                "datainf", "exact", "cg", "lissa", and solver objects for their options; their own
                damping is not used.
            damping: one or a grid of them.

        Raises:
            InputError: no training rows, or gradients that do not fit.
            ValueError: a method that has no Gram form.
        """
        asked = [methods] if isinstance(methods, str | Solver) else list(methods)
        grid = [as_damping(x) for x in _listed(damping)]
        store = self._store
        if store.n == 0:
            raise InputError("there are no training gradients: update() was given zero rows")
        solvers = [solver for method in asked for solver in self._solvers(method, grid)]
        given = {name: V.flat() for name, V in store.check_queries(queries).items()}
        dtype = accumulation_dtype(*queries.values())
        totals: list[Tensor | None] = [None] * len(solvers)
        small: list[Tensor] = []  # per block, the queries whose dot products fp32 cannot hold
        for name in store.blocks:
            V = given[name]
            seen = store.seen(name, V.values)
            for i, solver in enumerate(solvers):
                if solver is None:
                    S, bad, lost = deliver(-seen.L, V.powers(-store.blocks[name].exponent))
                    small.append(lost if V.lost is None else lost | V.lost)
                    if bool(bad.any()):
                        raise not_finite(name, "grad_dot")
                else:
                    S = self._block(solver, name, V, seen, len(grid))
                S, total = S.to(dtype), totals[i]
                totals[i] = S if total is None else total.add_(S)
            store.forget_grams()
        for solver, total in zip(solvers, totals, strict=True):
            if solver is None and small and total is not None and total.numel():
                refuse_lost(torch.stack(small).any(0) & (total.abs().amax(1) < TINY))
        return [
            GramScores("grad_dot", Damping(), total, [])
            if solver is None else GramScores(solver.method, solver.damping, total, solver.report())
            for solver, total in zip(solvers, totals, strict=True)
            if total is not None
        ]  # fmt: skip

    def _block(self, solver: FlatSolver, name: str, V: Scaled, seen: Seen, dampings: int) -> Tensor:
        rows = self._store.rows[name]
        if dampings >= EIGH_PAYS and isinstance(solver, Exact) and rows.n < rows.width:
            gram = solver.gram(name)
            if not gram.in_files:
                gram.diagonalise()
        return solver.block_scores(name, V, seen)

    def _solvers(
        self, method: str | Solver, grid: Sequence[Damping]
    ) -> Iterator[FlatSolver | None]:
        """The method at every damping, as solvers that share the store's rows and Gram matrices."""
        if method == "grad_dot" or isinstance(method, GradDot):
            yield None
            return
        template = (
            FLAT[method](check=self._store.check)
            if isinstance(method, str) and method in FLAT
            else method
        )
        if not isinstance(template, FlatSolver):
            name = method.method if isinstance(method, Solver) else repr(method)
            raise ValueError(f"{name} has no Gram form, only {', '.join(('grad_dot', *FLAT))} have")
        for damping in grid:
            solver = copy.copy(template)
            solver.reset()
            solver.damping = damping
            solver.share(self._store)
            yield solver.fit()


def _listed(damping: Damping | float | Iterable[Damping | float]) -> list[Damping | float]:
    return list(damping) if isinstance(damping, Iterable) else [damping]

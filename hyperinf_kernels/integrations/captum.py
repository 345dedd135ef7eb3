"""captum 0.8 and 0.9: HyperINF, or exact influence, as an influence function with embeddings.

Scores are captum's: (n_test, n_train), positive helps, curvature a sum over the Hessian data set,
so they are 1/n of ours; a number as damping is captum's `hessian_reg` on that sum.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..solvers import BlockReport, Damping, Solver, make_solver
from ..solvers.damping import DEFAULT_DAMPING
from .conventions import HOSTS
from .imports import require
from .layout import Layout

require("captum", "captum")

from captum.influence._core.influence_function import (
    NaiveInfluenceFunction,
    _basic_computation_naive_influence_function,
)
from captum.influence._utils.common import KMostInfluentialResults, _format_inputs_dataset

__all__ = ["ExactInfluenceFunction", "HyperInfInfluenceFunction"]

HOST = HOSTS["captum"]
PROBES = 8  # rows whose solution is judged, as embeddings are not


class HyperInfInfluenceFunction(NaiveInfluenceFunction):
    """captum's influence function with the GFIM's inverse instead of the Hessian's.

    The embedding of a sample is its gradient times (sum + lambda I)^-1/2, so dot products are
    scores and squared norms self-influences. k-most results use `test_loss_fn` where one is given,
    and form the test embeddings once.

    Args:
        model, train_dataset, checkpoint, layers, loss_fn, batch_size, test_loss_fn,
        checkpoints_load_func, hessian_dataset, sample_wise_grads_per_batch: captum's.
        damping: a `Damping` on the mean, or a number on the sum.
        solver_options: of `HyperINF`, such as `{"side": "rows"}`.
    """

    method: ClassVar[str] = "hyperinf"

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoint: str,
        *,
        damping: Damping | float = DEFAULT_DAMPING,
        solver_options: dict[str, Any] | None = None,
        **captum_options: Any,
    ) -> None:
        self._rule = damping
        # a wrong option is said before any data is read
        self.solver: Solver = make_solver(self.method, None, **(solver_options or {}))
        super().__init__(model, train_dataset, checkpoint, **captum_options)

    def _retrieve_projections_naive_influence_function(
        self, dataloader: DataLoader, projection_on_cpu: bool, show_progress: bool
    ) -> Tensor:
        """Fit instead of forming the Hessian; captum calls this at the end of its __init__."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        chosen = (
            list(self.model.parameters())
            if self.layer_modules is None
            else [p for module in self.layer_modules for p in module.parameters()]
        )
        self._layout = Layout.of((names[id(p)], p) for p in chosen)
        probe: dict[str, Tensor] = {}
        for batch in dataloader:
            grads = self._layout.split(self._rows(batch, self.loss_fn, self.reduction_type))
            probe = probe or {name: grad[:PROBES] for name, grad in grads.items()}
            self.solver.update(grads, copy=False)
        self.solver.redamp(HOST.our_damping(self._rule, self.solver.n)).fit().apply(probe)
        return torch.empty(0)

    def compute_intermediate_quantities(
        self,
        inputs_dataset: Any,
        aggregate: bool = False,
        show_progress: bool = False,
        return_on_cpu: bool = True,
        test: bool = False,
    ) -> Tensor:
        """Embeddings (N, D); with `aggregate` their sum (1, D)."""
        loss = (self.test_loss_fn, self.test_reduction_type) if test else (
            self.loss_fn, self.reduction_type)  # fmt: skip
        parts = [self._half(self._rows(batch, *loss))
                 for batch in _format_inputs_dataset(inputs_dataset)]  # fmt: skip
        rows = torch.cat(parts)
        rows = rows.sum(0, keepdim=True) if aggregate else rows
        return rows.cpu() if return_on_cpu else rows.to(self.model_device)

    def report(self) -> list[BlockReport]:
        """One entry per parameter: damping, and the residual of a few training rows."""
        return self.solver.report()

    def _half(self, rows: Tensor) -> Tensor:
        halves = self.solver.half(self._layout.split(rows))
        return torch.cat(list(halves.values()), 1) / self.solver.n**0.5

    def _rows(self, batch: Any, loss_fn: Any, reduction_type: str) -> Tensor:
        return _basic_computation_naive_influence_function(
            self, batch[:-1], batch[-1], loss_fn, reduction_type
        ).detach()

    def _get_k_most_influential(
        self, inputs: Any, k: int = 5, proponents: bool = True, show_progress: bool = False
    ) -> KMostInfluentialResults:
        queries = self.compute_intermediate_quantities(inputs, test=True)
        sign = 1.0 if proponents else -1.0
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.long)
        start = 0
        for batch in self.train_dataloader:
            scores = sign * queries @ self.compute_intermediate_quantities(tuple(batch)).mT
            ids = torch.arange(start, start + scores.shape[1]).expand_as(scores)
            start += scores.shape[1]
            best, order = torch.cat([best, scores], 1).sort(dim=1, descending=True, stable=True)
            rows = torch.cat([rows, ids], 1).gather(1, order)[:, :k]
            best = best[:, :k]
        return KMostInfluentialResults(rows, sign * best)


class ExactInfluenceFunction(HyperInfInfluenceFunction):
    """The exact damped empirical Fisher of each parameter for captum."""

    method: ClassVar[str] = "exact"

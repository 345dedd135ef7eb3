"""quanda 0.5.0: explainers for its metrics and benchmarks.

Scores are quanda's: (n_test, n_train), positive for proponents. All work on the training set is
done in `__init__`, because quanda calls `explain` once per small batch; `self_influence` is O(N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..attribution import Attributor
from ..solvers import BlockReport, Damping
from .conventions import HOSTS
from .imports import require

require("quanda", "quanda")

from quanda.explainers.base import Explainer

__all__ = ["DataInfExplainer", "ExactExplainer", "HyperINFExplainer", "InfluenceExplainer"]

HOST = HOSTS["quanda"]


def classification_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of every sample of (x, y)."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


class InfluenceExplainer(Explainer):
    """Any of our methods as a quanda explainer.

    Args:
        model, train_dataset, task, checkpoints, checkpoints_load_func: quanda's. The last
            checkpoint is loaded, if any is given.
        blocks: "lora", a regular expression, or a list of parameter names.
        method: "hyperinf", "datainf", "exact", "cg", "lissa" or "grad_dot".
        damping: a `Damping` or a number; None: `DataInfDamping(0.1)`.
        batch_size: of the passes over the training set.
        loss: `loss(model, (x, y)) -> (B,)`.
        **options: of the solver.
    """

    accepted_tasks: ClassVar[list[str]] = ["image_classification"]
    method = "hyperinf"

    def __init__(
        self,
        model: Any,
        train_dataset: Any,
        task: Any = "image_classification",
        checkpoints: Any = None,
        checkpoints_load_func: Any = None,
        *,
        blocks: str | Sequence[str] = "weight$",
        method: str | None = None,
        damping: Damping | float | None = None,
        batch_size: int = 64,
        loss: Any = classification_loss,
        **options: Any,
    ) -> None:
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        if self.checkpoints:
            self.checkpoints_load_func(self.model, self.checkpoints[-1])
        self.attributor = Attributor(
            self.model, loss=loss, blocks=blocks, method=method or self.method, damping=damping,
            **options,
        )  # fmt: skip
        self._loader = DataLoader(self.train_dataset, batch_size)
        self.attributor.fit(self._loader)
        self._self: Tensor | None = None

    def explain(self, test_data: Tensor, targets: Any) -> Tensor:
        """(n_test, n_train), positive for proponents."""
        labels = torch.as_tensor(targets, device=self.device)
        scores = self.attributor.score([(test_data.to(self.device), labels)], self._loader)
        return HOST.scores(scores.values, len(self.train_dataset)).to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """(n_train,): one pass over gradients at hand, where quanda's own is n_train times that."""
        if self._self is None:
            self._self = -self.attributor.self_influence(self._loader)
        return self._self.to(self.device)

    def report(self) -> list[BlockReport]:
        """One entry per block."""
        return self.attributor.report()


class HyperINFExplainer(InfluenceExplainer):
    """HyperINF for quanda."""


class DataInfExplainer(InfluenceExplainer):
    """DataInf for quanda."""

    method = "datainf"


class ExactExplainer(InfluenceExplainer):
    """The exact damped empirical Fisher for quanda."""

    method = "exact"

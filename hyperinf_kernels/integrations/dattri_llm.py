"""dattri-llm 0.1.0: our methods as an attributor on its gradients, live or stored.

Scores are dattri-llm's: (n_train, n_test), positive helps. Its captured factors are materialised
per layer as (out, in), with a column for the bias where the layer has one; LoRA B is transposed.
Its per-sample gradients are those of the loss that was differentiated, so that loss must be summed
over the batch, or `loss_reduction="mean"` said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import BlockReport, Damping, HyperINF, Solver, make_solver
from .conventions import own_loss
from .imports import require
from .layout import LORA_B

require("dattri-llm", "dattri_llm")

from dattri_llm import (
    BaseInnerProductAttributor,
    DiskGradientSource,
    Factorized,
    Gradient,
    GradientStorageManager,
)
from dattri_llm.gradient import ops

__all__ = ["HyperINFAttributor", "InfluenceAttributor", "fisher_factors", "gradient_batches"]

Shapes = Mapping[str, tuple[int, int]]


class InfluenceAttributor(BaseInnerProductAttributor):
    """Any of our methods as a dattri-llm attributor: `attribute`, `attribute_from_cache`.

    The preconditioner is fitted on the training gradients of every pass, which therefore has to be
    readable twice: a store, or `attribute(..., gradient_cache_residency="memory")`.

    Args:
        args: `AttributionArguments`.
        method: "hyperinf", "datainf", "exact", "cg", "lissa" or "grad_dot".
        damping: a `Damping` or a number; None: `DataInfDamping(0.1)`.
        task: for `attribute` and `cache`.
        loss_reduction: of the loss over the batch that was differentiated.
        shapes: {layer: (r, d)} of layers stored dense, whose shape the store does not hold; only
            HyperINF asks for it.
        **options: of the solver, such as `mode="paper"`.
    """

    algorithm = "InfluenceAttributor"

    def __init__(
        self,
        args: Any,
        method: str = "hyperinf",
        *,
        damping: Damping | float | None = None,
        task: Any = None,
        loss_reduction: Literal["sum", "mean"] = "sum",
        shapes: Shapes | None = None,
        **options: Any,
    ) -> None:
        super().__init__(args, task=task)
        self.algorithm = type(self).algorithm + f"({method})"  # type: ignore[misc]
        self.solver: Solver = make_solver(method, damping, **options)
        self.loss_reduction, self.shapes = loss_reduction, shapes

    def prepare_scoring(self, train_source: Any, test_source: Any) -> None:
        """Fit every layer's curvature in one pass over the training gradients."""
        if not train_source.reusable:
            raise InputError(
                "the training gradients stream by once, but are needed for the fit and for the "
                "scores: use cache() and attribute_from_cache(), or "
                "attribute(..., gradient_cache_residency='memory')"
            )
        self.solver.reset()
        for _, block, _ in train_source:
            grads = self._blocks(block.to(self.args.device))
            self.solver.update(own_loss(grads, self.loss_reduction), copy=False)
        self.solver.fit()

    def transform_test_rep(self, test_rep: Gradient) -> Gradient:
        """H^-1 v of every layer, dense."""
        applied = self.solver.apply(own_loss(self._blocks(test_rep), self.loss_reduction))
        return test_rep.map_layers(lambda name, value, kind: _flat(name, applied[name]))

    def transform_train_rep(self, train_rep: Gradient) -> Gradient:
        if self.loss_reduction == "sum":
            return train_rep
        scale = train_rep.batch_size
        return train_rep.map_layers(lambda name, value, kind: ops.materialize(value, kind) * scale)

    def report(self) -> list[BlockReport]:
        """One entry per layer, of the last pass."""
        return self.solver.report()

    def _blocks(self, gradient: Gradient) -> dict[str, Tensor]:
        return blocks_of(gradient, self.shapes, needs_shape=isinstance(self.solver, HyperINF))


class HyperINFAttributor(InfluenceAttributor):
    """HyperINF for dattri-llm."""

    algorithm = "HyperINF"

    def __init__(self, args: Any, **options: Any) -> None:
        super().__init__(args, "hyperinf", **options)


def blocks_of(
    gradient: Gradient, shapes: Shapes | None = None, *, needs_shape: bool = True
) -> dict[str, Tensor]:
    """A dattri-llm gradient block as {layer: (B, r, d)}, factors multiplied out.

    Raises:
        InputError: a layer stored dense whose (r, d) is not in `shapes`.
    """
    found = {}
    for name in sorted(gradient.layer_names):
        value, kind = gradient.data[name], gradient.layer_types[name]
        flat = ops.materialize(value, kind)
        if shapes is not None and name in shapes:
            grad = flat.view(len(flat), *shapes[name])
        elif isinstance(value, Factorized) and not (ops.is_norm(kind) or ops.is_embedding(kind)):
            _, _, inputs, outputs = ops.effective_dims(value, kind)
            grad = flat.view(len(flat), inputs if ops.is_conv_transpose(kind) else outputs, -1)
        elif needs_shape and not ops.is_norm(kind):
            raise InputError(
                f"layer {name} is stored dense, so its shape is not known: give "
                f"shapes={{{name!r}: (r, d)}} with r d = {flat.shape[1]}"
            )
        else:
            grad = flat[:, None]
        found[name] = grad.mT if LORA_B.search(name) and grad.shape[1] > 1 else grad
    return found


def _flat(name: str, block: Tensor) -> Tensor:
    rows = block.mT if LORA_B.search(name) and block.shape[1] > 1 else block
    return rows.reshape(len(block), -1)


def gradient_batches(
    store: str | GradientStorageManager, args: Any, *, steps: Iterable[int] | None = None,
    shapes: Shapes | None = None,
) -> Iterator[tuple[list[str], dict[str, Tensor]]]:  # fmt: skip
    """(sample hashes, {layer: (B, r, d)}) of a dattri-llm store, for `solver.update`."""
    manager = GradientStorageManager(store) if isinstance(store, str) else store
    for _, block, hashes in DiskGradientSource(manager, args, steps=steps):
        yield list(hashes), blocks_of(block.to("cpu"), shapes, needs_shape=False)


def fisher_factors(
    solver: HyperINF, device: torch.device | str = "cpu"
) -> dict[str, tuple[Tensor, Tensor]]:
    """HyperINF as K-FAC factors {layer: (A, G)}, for scripts that cannot load an attributor.

    `KFACAttributor(args).fit(train_dir, covariances=fisher_factors(solver))` persists them, and
    `attribute_from_cache(..., fisher_dir=..., damping=0.0)` then scores with HyperINF: the damping
    is inside, the other factor is the identity.

    Raises:
        InputError: the solver is not a fitted converged HyperINF on its column side.
    """
    if not isinstance(solver, HyperINF) or (solver.side, solver.mode) != ("cols", "converged"):
        raise InputError("only a converged HyperINF with side='cols' is a pair of K-FAC factors")
    if not solver.lambdas:
        raise InputError("the solver is not fitted: call update() and fit() first")
    factors = {}
    for name, state in solver.blocks.items():
        A, other = (solver.curvature(name) / state.unit).float(), torch.eye(state.shape[0])
        pair = (other, A) if LORA_B.search(name) else (A, other)
        factors[name] = (pair[0].to(device), pair[1].to(device))
    return factors

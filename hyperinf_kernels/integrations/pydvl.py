"""pyDVL 0.10.0: our methods as composable influence models.

Scores are pyDVL's: (n_test, n_train), positive helps, curvature a mean over the training samples,
damping as given. `fit` reads the training set once for all blocks; every batch's gradients are
formed once and shared by the blocks. Dask and zarr calculators take these models like pyDVL's own.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attribution.stream import default_budget
from ..errors import InputError
from ..solvers import BlockReport, Damping, HyperINF, Solver, make_solver
from .imports import require
from .layout import Layout, block_of

require("pydvl", "pydvl")

from pydvl.influence.torch.base import (
    TensorOperator,
    TorchBatch,
    TorchBlockMapper,
    TorchComposableInfluence,
    TorchGradientProvider,
    TorchOperatorGradientComposition,
)
from pydvl.influence.torch.util import BlockMode

__all__ = ["DataInfInfluence", "ExactInfluence", "HyperInfInfluence", "SolverInfluence"]

Rule = Damping | float | None


class SolverInfluence(TorchComposableInfluence):  # type: ignore[type-arg]
    """Any of our methods as a pyDVL influence model.

    Args:
        model: returns what `loss` takes; not vmapped over what vmap cannot trace.
        loss: `loss(model(x[None]), y[None])` of one sample.
        method: "hyperinf", "datainf", "exact", "cg", "lissa" or "grad_dot".
        regularization: a `Damping`, a number, or {block: either}; None: `DataInfDamping(0.1)`.
        block_structure: a pyDVL `BlockMode`, or an OrderedDict {block: parameter names}. The flat
            methods invert a block as a whole; HyperINF inverts each of its parameters.
        **options: of the solver, such as `mode="paper"`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        method: str = "hyperinf",
        regularization: Rule | Mapping[str, Rule] = None,
        block_structure: Any = BlockMode.PARAMETER_WISE,
        **options: Any,
    ) -> None:
        super().__init__(model, block_structure, regularization=None)
        self.loss, self.method, self.solver_options = loss, method, options
        self.rules = self._rules(regularization)
        for rule in self.rules.values():
            make_solver(method, rule, **options)  # a wrong name or option is said now

    def with_regularization(self, regularization: Rule | Mapping[str, Rule]) -> SolverInfluence:  # type: ignore[override]
        """The same model with another damping, without reading any data."""
        self.rules = self._rules(regularization)
        if self.is_fitted:
            for name, block in self.block_mapper.composable_block_dict.items():
                block.op.redamp(make_solver(self.method, self.rules[name]).damping)
        return self

    def report(self) -> list[BlockReport]:
        """One entry per parameter or block, over everything since `fit`."""
        blocks = self.block_mapper.composable_block_dict.values()
        return [entry for block in blocks for entry in block.op.solver.report()]

    @property
    def is_thread_safe(self) -> bool:
        return False

    def _rules(self, regularization: Rule | Mapping[str, Rule]) -> dict[str, Rule]:
        if not isinstance(regularization, Mapping):
            return dict.fromkeys(self.block_names, regularization)
        unknown = sorted(set(regularization) - set(self.block_names))
        if unknown:
            raise InputError(f"regularization names no such block: {unknown[:3]}")
        return {name: regularization.get(name) for name in self.block_names}

    def _create_block_mapper(self, data: Any) -> TorchBlockMapper:
        shared = SharedGradients(self.model, self.loss, self.parameter_dict)
        blocks = OrderedDict(
            (name, self._create_block(parameters, data, None))
            for name, parameters in self.parameter_dict.items()
        )
        operators = {}
        for (name, parameters), composition in zip(
            self.parameter_dict.items(), blocks.values(), strict=True
        ):
            solver = make_solver(self.method, self.rules[name], **self.solver_options)
            operator = SolverOperator(name, solver, Layout.of(parameters.items()), self)
            operators[name] = operator
            composition.op, composition.gp = operator, shared.of(name)
        for x, y in data:
            batch = TorchBatch(x.to(self.device), y.to(self.device))
            grads = shared.all(batch)
            for name, operator in operators.items():
                grads |= operator.update({p: grads[p] for p in self.parameter_dict[name]})
            shared.keep(batch, grads)
        for operator in operators.values():
            operator.solver.fit()
        return TorchBlockMapper(blocks)

    def _create_block(
        self, block_params: Any, data: Any, regularization: float | None
    ) -> TorchOperatorGradientComposition:
        # filled by _create_block_mapper, which reads the data once for all blocks
        return TorchOperatorGradientComposition(None, None)


class HyperInfInfluence(SolverInfluence):
    """HyperINF for pyDVL."""

    def __init__(self, model: nn.Module, loss: Any,
                 regularization: Rule | Mapping[str, Rule] = None,
                 block_structure: Any = BlockMode.PARAMETER_WISE,
                 **options: Any) -> None:  # fmt: skip
        super().__init__(model, loss, "hyperinf", regularization, block_structure, **options)


class DataInfInfluence(SolverInfluence):
    """DataInf: `InverseHarmonicMeanInfluence`, right for any number of batches and queries."""

    def __init__(self, model: nn.Module, loss: Any,
                 regularization: Rule | Mapping[str, Rule] = None,
                 block_structure: Any = BlockMode.FULL) -> None:  # fmt: skip
        super().__init__(model, loss, "datainf", regularization, block_structure)


class ExactInfluence(SolverInfluence):
    """The exact inverse of the damped empirical Fisher of each block."""

    def __init__(self, model: nn.Module, loss: Any,
                 regularization: Rule | Mapping[str, Rule] = None,
                 block_structure: Any = BlockMode.FULL) -> None:  # fmt: skip
        super().__init__(model, loss, "exact", regularization, block_structure)


class SolverOperator(TensorOperator):
    """H^-1 of one pyDVL block on flat gradients (M, D)."""

    def __init__(self, name: str, solver: Solver, layout: Layout, owner: SolverInfluence) -> None:
        super().__init__()
        self.name, self.solver, self.layout = name, solver, layout
        self._last: tuple[Tensor, Tensor] | None = None
        self.by_parameter = isinstance(solver, HyperINF)
        self._device, self._dtype = owner.device, owner.dtype

    def update(self, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add one batch of per-sample gradients {parameter: (B, *shape)}.

        Returns:
            The same gradients, as views of what the solver keeps where it keeps rows.
        """
        if self.by_parameter:
            self.solver.update({p: block_of(p, grad) for p, grad in grads.items()}, copy=False)
            return dict(grads)
        flat = torch.cat([grad.flatten(1) for grad in grads.values()], 1)
        self.solver.update({self.name: flat[:, None]}, copy=False)
        parts = flat.split([grad[0].numel() for grad in grads.values()], 1)
        return {
            p: part.view(grad.shape) for (p, grad), part in zip(grads.items(), parts, strict=True)
        }

    def redamp(self, damping: Damping) -> None:
        """Another damping, without data."""
        self.solver.redamp(damping)
        self._last = None

    @property
    def input_size(self) -> int:
        return self.layout.width

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def to(self, device: torch.device) -> SolverOperator:
        if torch.device(device) != self._device:
            raise InputError(f"this model was fitted on {self._device}; fit it again on {device}")
        return self

    def _apply_to_vec(self, vec: Tensor) -> Tensor:
        return self._apply_to_mat(vec[None])[0]

    def _apply_to_mat(self, mat: Tensor) -> Tensor:
        # pyDVL asks again for the same queries with every training batch
        if self._last is not None and torch.equal(self._last[0], mat):
            return self._last[1].clone()
        if self.by_parameter:
            applied = self.layout.join(self.solver.apply(self.layout.split(mat)))
        else:
            applied = self.solver.apply({self.name: mat[:, None]})[self.name][:, 0]
        self._last = mat.clone(), applied.clone()
        return applied


class SharedGradients:
    """One vmapped backward pass per batch for all blocks.

    The training batches' gradients of `fit` are kept, as far as a quarter of the free memory goes
    (methods that keep rows share theirs), and the last two batches' of any other data. A batch is
    the same if its numbers and the model's are.
    """

    def __init__(self, model: nn.Module, loss: Any, blocks: Mapping[str, Any]) -> None:
        self.model, self.loss, self.blocks = model, loss, blocks
        everything = {p: t for block in blocks.values() for p, t in block.items()}
        self.provider = TorchGradientProvider(model, loss, restrict_to=everything)
        self.recent: list[Remembered] = []
        self.kept: dict[Any, list[Remembered]] = {}
        on_gpu = self.provider.device.type == "cuda"
        self.budget = torch.cuda.mem_get_info()[0] // 4 if on_gpu else default_budget()

    def all(self, batch: TorchBatch) -> dict[str, Tensor]:
        """{parameter: (B, *shape)}."""
        state = self._state()
        for found in [*self.recent, *self.kept.get(_key(batch), ())]:
            if found.is_of(batch, state):
                return dict(found.grads)
        grads = self.provider.grads(batch)
        self.recent = [*self.recent[-1:], Remembered(batch.x, batch.y, state, grads)]
        return dict(grads)

    def keep(self, batch: TorchBatch, grads: dict[str, Tensor]) -> None:
        """Remember a training batch's gradients while there is room."""
        self.recent = []
        self.budget -= sum(grad.nbytes for grad in grads.values())
        if self.budget >= 0:
            found = Remembered(batch.x, batch.y, self._state(), grads)
            self.kept.setdefault(_key(batch), []).append(found)

    def of(self, block: str) -> BlockGradients:
        return BlockGradients(self, block)

    def __getstate__(self) -> dict[str, Any]:
        # Dask sends models to its workers, which form their own gradients
        return {**vars(self), "recent": [], "kept": {}}

    def _state(self) -> tuple[Any, ...]:
        """Changes whenever a parameter or buffer, or the model's mode, does."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return (self.model.training, *((t.data_ptr(), t._version) for t in tensors))


@dataclass(frozen=True)
class Remembered:
    """A batch, the state of the model, and the per-sample gradients of both."""

    x: Tensor
    y: Tensor
    state: tuple[Any, ...]
    grads: dict[str, Tensor]

    def is_of(self, batch: TorchBatch, state: tuple[Any, ...]) -> bool:
        same = self.x is batch.x and self.y is batch.y
        return self.state == state and (
            same or (_equal(self.x, batch.x) and _equal(self.y, batch.y))
        )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _key(batch: TorchBatch) -> Any:
    """Equal for equal batches, and rarely for others."""
    return tuple(batch.x.shape), tuple(batch.x.flatten()[:8].tolist())


class BlockGradients(TorchGradientProvider):
    """pyDVL's gradient provider of one block, fed from `SharedGradients`."""

    def __init__(self, shared: SharedGradients, block: str) -> None:
        super().__init__(shared.model, shared.loss, restrict_to=shared.blocks[block])
        self.shared = shared

    def _grads(self, batch: TorchBatch) -> dict[str, Tensor]:
        grads = self.shared.all(batch)
        return {name: grads[name] for name in self.params_to_restrict_to}

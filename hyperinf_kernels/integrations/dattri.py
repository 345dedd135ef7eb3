"""dattri 0.3.0: attributors for HyperINF, DataInf and exact, and a faster `IFAttributorDataInf`.

Scores are dattri's: (n_train, n_test), positive helps, curvature a mean over the cached samples,
damping as given. Its per-sample gradients, data loaders, checkpoints and layer names are used as
they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import gram_accumulate_, sherman_morrison
from ..solvers import BlockReport, Damping, Solver, make_solver
from ..solvers.damping import DEFAULT_DAMPING
from .conventions import HOSTS
from .imports import require
from .layout import Layout

require("dattri", "dattri")

from dattri.algorithm.base import BaseInnerProductAttributor
from dattri.algorithm.influence_function import IFAttributorDataInf
from dattri.algorithm.utils import _check_shuffle

from .dattri_blocks import patches, stable_inverse

__all__ = [
    "IFAttributor", "IFAttributorDataInfFast", "IFAttributorExact", "IFAttributorHyperINF",
    "accelerate", "stable_inverse",
]  # fmt: skip

HOST = HOSTS["dattri"]


def _mean_over_checkpoints(task: Any, scores: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([scores(index) for index in range(len(task.get_checkpoints()))]).mean(0)


class _OncePerSide(BaseInnerProductAttributor):
    """dattri's train and test loops, un-nested: every gradient and transform is made once."""

    def attribute(
        self, train_dataloader: Any, test_dataloader: Any, relatif_method: str | None = None
    ) -> Tensor:
        """Scores (n_train, n_test), the mean over the task's checkpoints.

        Args:
            train_dataloader: the samples to score; not shuffled.
            test_dataloader: the queries; not shuffled.
            relatif_method: None; "l" divides a sample's scores by sqrt(<g, H^-1 g>), "theta" by
                ||H^-1 g||.
        """
        _check_shuffle(train_dataloader)
        _check_shuffle(test_dataloader)
        _check_relatif(relatif_method)
        if self.full_train_dataloader is None:
            self.cache(train_dataloader)

        def scores(index: int) -> Tensor:
            tests = [
                self.transform_test_rep(index, self.generate_test_rep(index, batch))
                for batch in self._batches(test_dataloader)
            ]
            queries = torch.cat(tests)
            parts = []
            for rep in self._train_reps(index, train_dataloader):
                part = _dots(self.transform_train_rep(index, rep), queries)
                parts.append(part / self._norm(index, rep, relatif_method)[:, None])
            return torch.cat(parts)

        return _mean_over_checkpoints(self.task, scores)

    def self_attribute(self, train_dataloader: Any, relatif_method: str | None = None) -> Tensor:
        """Each sample's score on itself, (n_train,); one pass, any batch size."""
        _check_shuffle(train_dataloader)
        _check_relatif(relatif_method)
        if self.full_train_dataloader is None:
            self.cache(train_dataloader)

        def scores(index: int) -> Tensor:
            parts = [
                self._own(index, rep) / self._norm(index, rep, relatif_method)
                for rep in self._train_reps(index, train_dataloader)
            ]
            return torch.cat(parts)

        return _mean_over_checkpoints(self.task, scores)

    def _own(self, index: int, rep: Tensor) -> Tensor:
        """<g, H^-1 g> of every row, (B,)."""
        return (rep * self.transform_test_rep(index, rep)).sum(1)

    def _norm(self, index: int, rep: Tensor, relatif_method: str | None) -> Tensor:
        """RelatIF's divisor of every row, (B,)."""
        if relatif_method == "l":
            return self._own(index, rep).clamp_min(1e-12).sqrt()
        if relatif_method == "theta":
            return self.transform_test_rep(index, rep).norm(dim=1).clamp_min(1e-12)
        return rep.new_ones(len(rep))

    def _batches(self, loader: Any) -> Iterator[tuple[Tensor, ...]]:
        # dattri's tasks expect a leading axis of one
        for batch in loader:
            yield tuple(part.to(self.device).unsqueeze(0) for part in batch)

    def _train_reps(self, index: int, loader: Any) -> Iterator[Tensor]:
        for batch in self._batches(loader):
            yield self.generate_train_rep(index, batch).detach()


class IFAttributor(_OncePerSide):
    """Any of our methods as a dattri attributor.

    Args:
        task: an `AttributionTask`; its loss is one sample's own.
        method: "hyperinf", "datainf", "exact", "cg", "lissa" or "grad_dot".
        layer_name: parameter names to attribute, in any order; None: all that require grad.
        device: where the model is.
        damping: a `Damping` or a number; None: `DataInfDamping(0.1)`.
        **options: of the solver, such as `mode="paper"`.
    """

    def __init__(
        self,
        task: Any,
        method: str = "hyperinf",
        layer_name: str | Sequence[str] | None = None,
        device: str = "cpu",
        damping: Damping | float | None = None,
        **options: Any,
    ) -> None:
        names = [layer_name] if isinstance(layer_name, str) else layer_name
        super().__init__(task, None if names is None else list(names), device)
        self.method, self.damping, self.options = method, damping, options
        make_solver(method, damping, **options)  # a wrong name is said now
        self.solvers: list[Solver] = []
        self._layouts: list[Layout] = []
        self._reps: list[list[Tensor]] = []
        self._cached_loader: Any = None

    def cache(self, full_train_dataloader: Any) -> None:
        """Read the training set once per checkpoint, fit every block, keep its gradients."""
        self.full_train_dataloader = self._cached_loader = full_train_dataloader
        self.solvers, self._layouts, self._reps = [], [], []
        for index in range(len(self.task.get_checkpoints())):
            solver = make_solver(self.method, self.damping, **self.options)
            layout, reps = self._layout(index), []
            for batch in self._batches(full_train_dataloader):
                rep = self.generate_train_rep(index, batch).detach()
                solver.update(layout.split(rep), copy=False)
                reps.append(rep)
            self.solvers.append(solver.fit())
            self._layouts.append(layout)
            self._reps.append(reps)

    def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
        """H^-1 v of every row, (m, D)."""
        if not self.solvers:
            raise InputError("the attributor is not fitted: call cache(train_dataloader) first")
        layout = self._layouts[ckpt_idx]
        return layout.join(self.solvers[ckpt_idx].apply(layout.split(test_rep.detach())))

    def _own(self, index: int, rep: Tensor) -> Tensor:
        return -self.solvers[index].self_influence(self._layouts[index].split(rep))

    def report(self) -> list[BlockReport]:
        """One entry per block and checkpoint: damping, residual, fallback."""
        return [entry for solver in self.solvers for entry in solver.report()]

    def _train_reps(self, index: int, loader: Any) -> Iterator[Tensor]:
        # gradients of the cached loader are at hand; any other loader is read
        if loader is self._cached_loader:
            yield from self._reps[index]
        else:
            yield from super()._train_reps(index, loader)

    def _layout(self, index: int) -> Layout:
        self.task.get_param(index)  # loads the checkpoint
        named = self.task.named_parameters
        names = list(named) if self.layer_name is None else self.layer_name
        unknown = [name for name in names if name not in named]
        if unknown:
            raise InputError(f"the task's model has no trainable parameter {unknown[0]!r}")
        return Layout.of((name, named[name]) for name in names)


class IFAttributorHyperINF(IFAttributor):
    """HyperINF: V (mean g^T g + lambda I)^-1 per block."""

    def __init__(self, task: Any, layer_name: Any = None, device: str = "cpu",
                 damping: Damping | float = DEFAULT_DAMPING, **options: Any) -> None:  # fmt: skip
        super().__init__(task, "hyperinf", layer_name, device, damping, **options)


class IFAttributorExact(IFAttributor):
    """The exact inverse of the damped empirical Fisher of each block."""

    def __init__(self, task: Any, layer_name: Any = None, device: str = "cpu",
                 damping: Damping | float = DEFAULT_DAMPING) -> None:  # fmt: skip
        super().__init__(task, "exact", layer_name, device, damping)


class IFAttributorDataInfFast(_OncePerSide, IFAttributorDataInf):
    """`IFAttributorDataInf` by products instead of loops, with layers split as they are.

    dattri's own numbers where those are right: its layers (a weight and its bias are one), its
    absolute `regularization` (None: 0.1), its `fim_estimate_data_ratio`. A `layer_name` subset is
    split by its own sizes, and a regularisation of zero, dattri's default, is refused.
    """

    def transform_test_rep(self, ckpt_idx: int, test_rep: Tensor) -> Tensor:
        lam = 0.1 if self.regularization is None else float(self.regularization)
        if lam <= 0:
            raise InputError(
                f"IFAttributorDataInf divides by its regularization, which is {lam:g}: give a "
                "positive one, such as IFAttributorDataInf(..., regularization=0.1)"
            )
        tests = self._get_layer_wise_reps(ckpt_idx, test_rep.detach())
        cached = self._get_layer_wise_reps(ckpt_idx, self._cached_train_reps[ckpt_idx].detach())
        return torch.cat(
            [
                sherman_morrison(V.contiguous(), G.contiguous(), lam)
                for V, G in zip(tests, cached, strict=True)
            ],
            1,
        )

    def _get_layer_wise_reps(self, ckpt_idx: int, query: Tensor) -> list[Tensor]:
        parameters, layers = self.task.get_param(
            ckpt_idx, layer_name=self.layer_name, layer_split=True
        )
        sizes = [0] * (layers[-1] + 1)
        for parameter, layer in zip(parameters, layers, strict=True):
            sizes[layer] += parameter.numel()
        return list(query.split(sizes, dim=1))

    def _train_reps(self, index: int, loader: Any) -> Iterator[Tensor]:
        if loader is self.full_train_dataloader and self.fim_estimate_data_ratio >= 1:
            yield self._cached_train_reps[index].detach()
        else:
            # not super(): `accelerate` gives this function to dattri's own class
            yield from _OncePerSide._train_reps(self, index, loader)


PATCHED = ("attribute", "self_attribute", "transform_test_rep", "_get_layer_wise_reps",
           "_train_reps", "_batches", "_own", "_norm")  # fmt: skip


@contextlib.contextmanager
def _restoring(saved: dict[tuple[Any, str], Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for (owner, name), value in saved.items():
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def accelerate() -> contextlib.AbstractContextManager[None]:
    """Make existing scripts fast: call once before them; the scripts stay as they are.

    `IFAttributorDataInf` becomes `IFAttributorDataInfFast`, under its own name, and LoGra and
    FactGraSS invert all blocks of one size in one call of `stable_inverse`. As
    `with accelerate(): ...` the change ends with the block.
    """
    members = {(IFAttributorDataInf, name): _member(name) for name in PATCHED} | patches()
    saved = {place: vars(place[0]).get(place[1]) for place in members}
    for (owner, name), value in members.items():
        setattr(owner, name, value)
    return _restoring(saved)


def _member(name: str) -> Any:
    owner = next(c for c in IFAttributorDataInfFast.__mro__ if name in vars(c))
    return vars(owner)[name]


def _dots(train: Tensor, queries: Tensor) -> Tensor:
    S = train.new_zeros(len(train), len(queries))
    return gram_accumulate_(S, train.contiguous(), queries.to(train.dtype).contiguous())


def _check_relatif(method: str | None) -> None:
    if method not in (None, "l", "theta"):
        raise InputError(f"relatif_method must be None, 'l' or 'theta', got {method!r}")

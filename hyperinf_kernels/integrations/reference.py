"""`IFEngine` and `IFEngineGeneration`, the interface of the HyperINF and DataInf repositories.

Same methods, attributes, keys and signs, the loops over samples replaced by one product per block.
`integrations.hyperinf`, `.hyperinf_optimized` and `.datainf` carry each repository's own keys, so a
notebook changes its import and nothing else.
"""

from __future__ import annotations

import pickle
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import row_dots
from ..solvers import DataInf, DataInfDamping, Exact, HyperINF, LiSSA, Solver
from .imports import require
from .released import RELEASED
from .samples import Sample, samples_of

__all__ = ["Engine", "GenerationEngine"]

Blocks = dict[str, Tensor]
Mode = Literal["parity", "converged"]


class _Gradients:
    """What both engines share: dictionaries of samples in, products of whole blocks out."""

    keys: ClassVar[Mapping[str, str]]

    def __init__(self, mode: Mode = "parity", device: torch.device | str | None = None) -> None:
        """Like the original, without arguments.

        Args:
            mode: "parity" gives the released code's numbers, its slips included: 0.001 added for
                HyperINF, 30 Schulz steps from 5e-5 I (in closed form), ten LiSSA steps with the
                damping subtracted. "converged" solves every method's own equation, certified in
                `reports[key]`; the accurate method is the flattened Fisher's.
            device: where to work; None: where the gradients are.
        """
        if mode not in ("parity", "converged"):
            raise ValueError(f"mode must be 'parity' or 'converged', got {mode!r}")
        self.mode, self.device = mode, device
        self.time_dict: dict[str, Any] = defaultdict(list)
        self.hvp_dict: dict[str, Any] = defaultdict(list)
        self.IF_dict: dict[str, Any] = defaultdict(list)
        self.reports: dict[str, Any] = {}

    def compute_hvp_identity(self) -> None:
        self._timed("identity", self._products("identity", 10))

    def compute_hvp_proposed(self, lambda_const_param: float = 10) -> None:
        """DataInf."""
        self._timed("datainf", self._products("datainf", lambda_const_param))

    compute_hvp_datainf = compute_hvp_proposed

    def compute_hvp_iterative(self, lambda_const_param: float = 10) -> None:
        """HyperINF."""
        self._timed("hyperinf", self._products("hyperinf", lambda_const_param))

    def _take(
        self, tr_grad_dict: Mapping[int, Sample], val_grad_dict: Mapping[int, Sample]
    ) -> None:
        self.tr_grad_dict, self.val_grad_dict = tr_grad_dict, val_grad_dict
        self.n_train, self.n_val = len(tr_grad_dict), len(val_grad_dict)
        self._train = samples_of(tr_grad_dict, "tr_grad_dict", self.device)
        val = samples_of(val_grad_dict, "val_grad_dict", self.device)
        self._val = {name: samples.whole for name, samples in val.items()}
        if set(self._train) != set(self._val):
            odd = sorted(set(self._train) ^ set(self._val))
            raise InputError(f"tr_grad_dict and val_grad_dict differ in their weights: {odd[:3]}")

    def _timed(self, method: str, work: Callable[[], Blocks]) -> None:
        """Fill hvp_dict and time_dict under the repository's own key."""
        key = self.keys[method]
        start = time.time()
        self.hvp_dict[key] = self._as_dict(work())
        self.time_dict[key] = time.time() - start

    def _as_dict(self, hvps: Blocks) -> Any:
        raise NotImplementedError

    def _products(self, method: str, lambda_const_param: float) -> Callable[[], Blocks]:
        """H^-1 v of every query row, {weight: (m, r, d)}."""
        queries = self._queries()
        damping = DataInfDamping(1 / lambda_const_param)
        if method == "identity":
            return lambda: dict(queries)
        solvers: dict[str, Callable[[], Solver]] = {
            "datainf": lambda: DataInf(damping),
            "hyperinf": lambda: HyperINF(damping),
            "lissa": lambda: LiSSA(damping),
            "accurate": lambda: Exact(damping),
            "accurate_gfim": lambda: HyperINF(damping),
        }
        if self.mode == "parity" and method in RELEASED:
            step = RELEASED[method]
            return lambda: {
                name: step(self._train[name], V, lambda_const_param) for name, V in queries.items()
            }
        if self.mode == "converged" and method == "accurate_gfim":
            method = "accurate"
        return lambda: self._solved(method, solvers[method](), queries)

    def _solved(self, method: str, solver: Solver, queries: Blocks) -> Blocks:
        solver.update({name: t.whole for name, t in self._train.items()}, copy=False)
        applied = solver.fit().apply(queries)
        self.reports[self.keys.get(method, method)] = solver.report()
        return applied

    def _queries(self) -> Blocks:
        raise NotImplementedError

    def _scores(self, hvps: Blocks) -> Tensor:
        """-sum over weights of <hvp, g_k>, (m, n)."""
        total: Tensor | None = None
        for name, W in hvps.items():
            flat = W.flatten(1)
            part = row_dots(self._train[name].parts(flat), flat)[0].mT
            total = part if total is None else total + part
        assert total is not None
        return -total


class Engine(_Gradients):
    """All training scores on the averaged query: the repositories' `IFEngine`."""

    def preprocess_gradients(
        self,
        tr_grad_dict: Mapping[int, Sample],
        val_grad_dict: Mapping[int, Sample],
        noise_index: Any = None,
    ) -> None:
        """Take {sample: {weight: (r, d)}} for training and validation samples.

        Raises:
            InputError: keys that are not 0 to n - 1, weights or shapes that differ.
        """
        self._take(tr_grad_dict, val_grad_dict)
        self.noise_index = noise_index
        self.compute_val_grad_avg()

    def compute_val_grad_avg(self) -> None:
        self.val_grad_avg_dict = {name: V.mean(0) for name, V in self._val.items()}

    def compute_hvps(self, lambda_const_param: float = 10, compute_accurate: bool = True) -> None:
        """Every method's H^-1 v into `hvp_dict`, its seconds into `time_dict`."""
        for method in self.keys:
            if compute_accurate or not method.startswith("accurate"):
                self._timed(method, self._products(method, lambda_const_param))

    def compute_hvp_LiSSA(self, lambda_const_param: float = 10) -> None:  # noqa: N802
        self._timed("lissa", self._products("lissa", lambda_const_param))

    def compute_hvp_accurate(self, lambda_const_param: float = 10) -> None:
        method = next(name for name in self.keys if name.startswith("accurate"))
        self._timed(method, self._products(method, lambda_const_param))

    def compute_IF(self) -> None:  # noqa: N802, the repositories' name
        """`IF_dict[method]`: numpy (n_train,), negative helps."""
        for key, hvps in self.hvp_dict.items():
            rows = {name: W[None].to(self._train[name].device) for name, W in hvps.items()}
            self.IF_dict[key] = self._scores(rows)[0].cpu().numpy()

    def save_result(self, noise_index: Any = None, run_id: int = 0) -> None:
        """Pickle runtimes, noise index and influence as ./results_RUN.pkl, for the notebooks."""
        index = self.noise_index if noise_index is None else noise_index
        _save(run_id, runtime=self.time_dict, noise_index=index, influence=self.IF_dict)

    def _queries(self) -> Blocks:
        return {name: v[None] for name, v in self.val_grad_avg_dict.items()}

    def _as_dict(self, hvps: Blocks) -> Any:
        return {name: W[0] for name, W in hvps.items()}


class GenerationEngine(_Gradients):
    """Scores of every query: the repositories' `IFEngineGeneration`, with HyperINF added."""

    methods: ClassVar[tuple[str, ...]] = ("identity", "datainf", "hyperinf")

    def preprocess_gradients(
        self, tr_grad_dict: Mapping[int, Sample], val_grad_dict: Mapping[int, Sample]
    ) -> None:
        """As in `IFEngine`; queries are kept apart.

        Raises:
            InputError: keys that are not 0 to n - 1, weights or shapes that differ.
        """
        require("reference", "pandas")
        self._take(tr_grad_dict, val_grad_dict)

    def compute_hvps(self, lambda_const_param: float = 10) -> None:
        """`hvp_dict[method][query][weight]` for identity, DataInf and HyperINF."""
        for method in self.methods:
            if method in self.keys:
                self._timed(method, self._products(method, lambda_const_param))

    def compute_IF(self) -> None:  # noqa: N802
        """`IF_dict[method]`: DataFrame, a row per query and a column per training sample."""
        import pandas

        for key, hvps in self.hvp_dict.items():
            rows = {name: torch.stack([hvps[q][name] for q in range(self.n_val)])
                    for name in self._train}  # fmt: skip
            self.IF_dict[key] = pandas.DataFrame(self._scores(rows).cpu().numpy())

    def save_result(self, run_id: int = 0) -> None:
        """Pickle runtimes and influence as ./results_RUN.pkl, for the notebooks."""
        _save(run_id, runtime=self.time_dict, influence=self.IF_dict)

    def _queries(self) -> Blocks:
        return self._val

    def _as_dict(self, hvps: Blocks) -> Any:
        split = {name: W.unbind(0) for name, W in hvps.items()}
        return {q: {name: rows[q] for name, rows in split.items()} for q in range(self.n_val)}


def _save(run_id: int, **results: Any) -> None:
    with open(f"./results_{run_id}.pkl", "wb") as file:
        pickle.dump({key: _plain(value) for key, value in results.items()}, file)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, defaultdict) else value

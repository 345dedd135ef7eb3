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
from ..ops import gfim_accumulate_, gram_accumulate_, sherman_morrison
from ..solvers import DataInf, DataInfDamping, Exact, HyperINF, LiSSA, Solver
from .imports import require

__all__ = ["Engine", "GenerationEngine", "released_inverse"]

Sample = Mapping[str, Tensor]
Samples = Mapping[int, Sample]
Blocks = dict[str, Tensor]
Mode = Literal["parity", "converged"]

ITERATIONS, START, EXTRA = 30, 5e-5, 1e-3
CHUNK = 256


class _Gradients:
    """What both engines share: dictionaries of samples in, one (n, r, d) tensor per block kept."""

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

    def _take(self, tr_grad_dict: Samples, val_grad_dict: Samples) -> None:
        self.tr_grad_dict, self.val_grad_dict = tr_grad_dict, val_grad_dict
        self.n_train, self.n_val = len(tr_grad_dict), len(val_grad_dict)
        self._train = _stacked(tr_grad_dict, "tr_grad_dict", self.device)
        self._val = _stacked(val_grad_dict, "val_grad_dict", self.device)
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
        solver.update(self._train, copy=False)
        applied = solver.fit().apply(queries)
        self.reports[self.keys.get(method, method)] = solver.report()
        return applied

    def _queries(self) -> Blocks:
        raise NotImplementedError

    def _scores(self, hvps: Blocks) -> Tensor:
        """-sum over weights of <hvp, g_k>, (m, n)."""
        total: Tensor | None = None
        for name, W in hvps.items():
            G = self._train[name].flatten(1)
            if len(W) == 1:
                part = (G @ W.flatten().to(G.dtype))[None]
            else:
                part = gram_accumulate_(W.new_zeros(len(W), len(G)), W.flatten(1), G)
            total = part.double() if total is None else total + part
        assert total is not None
        return -total


class Engine(_Gradients):
    """All training scores on the averaged query: the repositories' `IFEngine`."""

    def preprocess_gradients(
        self, tr_grad_dict: Samples, val_grad_dict: Samples, noise_index: Any = None
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

    def compute_hvp_identity(self) -> None:
        self._timed("identity", self._products("identity", 10))

    def compute_hvp_proposed(self, lambda_const_param: float = 10) -> None:
        """DataInf."""
        self._timed("datainf", self._products("datainf", lambda_const_param))

    compute_hvp_datainf = compute_hvp_proposed

    def compute_hvp_iterative(self, lambda_const_param: float = 10) -> None:
        """HyperINF."""
        self._timed("hyperinf", self._products("hyperinf", lambda_const_param))

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

    def preprocess_gradients(self, tr_grad_dict: Samples, val_grad_dict: Samples) -> None:
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

    def compute_hvp_identity(self) -> None:
        self._timed("identity", self._products("identity", 10))

    def compute_hvp_proposed(self, lambda_const_param: float = 10) -> None:
        """DataInf."""
        self._timed("datainf", self._products("datainf", lambda_const_param))

    compute_hvp_datainf = compute_hvp_proposed

    def compute_hvp_iterative(self, lambda_const_param: float = 10) -> None:
        """HyperINF."""
        self._timed("hyperinf", self._products("hyperinf", lambda_const_param))

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


def _stacked(samples: Samples, what: str, device: torch.device | str | None) -> Blocks:
    """{sample: {weight: (r, d)}} -> {weight: (n, r, d)}; a vector counts as one row."""
    if not samples or set(samples) != set(range(len(samples))):
        raise InputError(f"{what} must hold samples 0 to n - 1, got {len(samples)} other keys")
    first = samples[0]
    for index, sample in samples.items():
        shapes = {name: tuple(grad.shape) for name, grad in sample.items()}
        if shapes != {name: tuple(grad.shape) for name, grad in first.items()}:
            raise InputError(f"{what}: sample {index} has other weights or shapes than sample 0")
    out = {}
    for name in first:
        whole = torch.stack([samples[i][name] for i in range(len(samples))])
        out[name] = (whole[:, None] if whole.ndim == 2 else whole.flatten(2)).to(device)
    return out


def _norms_square(G: Tensor) -> Tensor:
    """||g_i||^2 in fp64, (n,)."""
    return torch.linalg.vector_norm(G.flatten(1), dim=1).double().square()


def _lambda(G: Tensor, lambda_const_param: float) -> float:
    """The mean squared gradient entry over `lambda_const_param`."""
    return float(_norms_square(G).sum()) / G.numel() / lambda_const_param


def _released_datainf(G: Tensor, V: Tensor, lambda_const_param: float) -> Tensor:
    """mean_i (g_i g_i^T + lambda I)^-1 v, in the gradients' dtype."""
    P, v = G.flatten(1), V.flatten(1)
    squares = _norms_square(G)
    lam = float(squares.sum()) / G.numel() / lambda_const_param
    if len(v) > 1:
        return sherman_morrison(v, P, lam).view_as(V)
    # one query is two matrix-vector products, which torch runs at the speed of memory
    weights = (P @ v[0]) / (lam + squares).to(P.dtype)
    return ((v[0] - (weights @ P) / len(P)) / lam).view_as(V)


def _released_schulz(G: Tensor, V: Tensor, lambda_const_param: float) -> Tensor:
    """V X_30 with A = mean_i g_i^T g_i + (lambda + 0.001) I, C built in the gradients' dtype."""
    size = G.shape[2]
    C = torch.zeros(size, size, dtype=torch.float64, device=G.device)
    part_sum = torch.empty(size, size, dtype=G.dtype, device=G.device)
    for part in G.split(CHUNK):
        # as released, products are in the gradients' dtype; only the sum of chunks is wider
        C += gfim_accumulate_(part_sum.zero_(), part)
    C /= len(G)
    lam = _lambda(G, lambda_const_param) + EXTRA
    C.diagonal().add_(lam)
    W = released_inverse(C, V.double().flatten(0, 1), lam)
    return W.view_as(V).to(V.dtype)


def released_inverse(A: Tensor, V: Tensor, smallest: float) -> Tensor:
    """V X_30 of the released Schulz iteration, in fp64 and in closed form.

    X_k = (1 - (1 - 5e-5 mu)^(2^k)) / mu on the eigenvalues mu of A. Where every direction has
    converged beyond fp64 that is A^-1, and one Cholesky gives it.

    Args:
        A: (d, d) symmetric positive definite. V: (m, d). smallest: a lower bound of A's spectrum.

    Raises:
        InputError: the largest eigenvalue is over 4e4, where the iteration diverges.
    """
    converged = START * 2.0**ITERATIONS * smallest > 45  # exp(-45) is below fp64 rounding
    if converged and float(A.diagonal().sum()) * START < 1:
        return torch.cholesky_solve(V.mT, torch.linalg.cholesky(A)).mT
    mu, Q = torch.linalg.eigh(A)
    if float(mu[-1]) * START >= 2:
        raise InputError(
            f"the released Schulz iteration diverges: the largest eigenvalue is {float(mu[-1]):.2e}"
            f", its limit {2 / START:.0e}; use mode='converged'"
        )
    x = START * mu
    # log1p keeps digits where x is small; beyond x = 1 the power of 1 - x is even
    log = torch.where(x < 0.5, torch.log1p(-x.clamp(max=0.5)), (1 - x).abs().log())
    gain = -torch.expm1(2.0**ITERATIONS * log) / mu
    return (V @ Q * gain) @ Q.mT


def _released_lissa(G: Tensor, V: Tensor, lambda_const_param: float) -> Tensor:
    """Ten steps r <- v + r - (mean_i <g_i, r> g_i - lambda r): the damping's sign is released."""
    P, v = G.flatten(1), V.flatten(1)
    lam = _lambda(G, lambda_const_param)
    r = v
    for _ in range(10):
        r = v + r - ((r @ P.mT) @ P / len(P) - lam * r)
    return r.view_as(V)


RELEASED: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "datainf": _released_datainf,
    "hyperinf": _released_schulz,
    "lissa": _released_lissa,
}


def _save(run_id: int, **results: Any) -> None:
    with open(f"./results_{run_id}.pkl", "wb") as file:
        pickle.dump({key: _plain(value) for key, value in results.items()}, file)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, defaultdict) else value

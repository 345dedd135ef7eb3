"""What surrounds a call does not change it: every public function in every state of torch.

The neutral result and the result in a state are compared bit for bit, except for the number of
threads, which may cut torch's own sums elsewhere: there two fp32 results agree to their rounding.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import hyperinf_kernels as hk
from hyperinf_kernels.ops.topk import topk_empty, topk_merge_
from hyperinf_kernels.solvers import METHODS, FlatSolver, Solver

FLAT = [name for name, kind in METHODS.items() if issubclass(kind, FlatSolver)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator)


# all data are drawn here, before any state is entered
DELTA, ACT = draw(6, 5, 4), draw(6, 5, 40)
MATRICES, MANY = draw(3, 4, 40), draw(20, 4, 40)
ROWS, OTHER = draw(40, 700), draw(33, 700, seed=1)
QUERIES = draw(3, 700, seed=2)
SPD = torch.linalg.inv(ROWS[:, :12].mT @ ROWS[:, :12] / 40).expand(3, 12, 12).contiguous()
LARGE = ROWS[:, :200].mT @ ROWS[:, :200] / 40 + torch.eye(200)
SCORES = draw(3, 50)
TRAIN = [{"a": draw(n, 4, 40, seed=n), "b": draw(n, 8, 150, seed=n)} for n in (9, 20, 5)]
WHOLE = {name: torch.cat([batch[name] for batch in TRAIN]) for name in TRAIN[0]}
QUERY = {"a": draw(3, 4, 40, seed=90), "b": draw(3, 8, 150, seed=91)}
TOKENS = [{name: [(draw(30, g.shape[1], seed=7), draw(30, g.shape[2], seed=8))]
           for name, g in batch.items()} for batch in TRAIN]  # fmt: skip
torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
BATCHES = [{"x": draw(n, 12, seed=n), "y": torch.arange(n) % 3} for n in (4, 7, 2)]


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


# --- every public function, as a call that gives tensors ----------------------------------------


def ops(name: str) -> Any:
    zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
    if name == "gfim_accumulate_":
        return [
            hk.gfim_accumulate_(zeros(40, 40), MATRICES), hk.gfim_accumulate_(zeros(4, 4), MANY,
            side="rows"), hk.gfim_accumulate_(zeros(40, 40), DELTA, ACT, alpha=0.5),
            hk.gfim_accumulate_(zeros(40, 40).double(), DELTA.bfloat16(), ACT),
        ]  # fmt: skip
    if name == "gram_accumulate_":
        return [
            hk.gram_accumulate_(zeros(40, 40), ROWS), hk.gram_accumulate_(zeros(3, 40), QUERIES,
            ROWS), hk.gram_accumulate_(zeros(40, 33).double(), ROWS, OTHER.bfloat16()),
        ]  # fmt: skip
    if name == "pairwise_dot":
        return [
            hk.pairwise_dot(DELTA, ACT, DELTA[:2], ACT[:2]),
            hk.pairwise_dot(DELTA[None].half(), ACT[None].half(), DELTA[None, :2], ACT[None, :2]),
        ]
    if name == "per_sample_dot":
        return [
            hk.per_sample_dot(DELTA, ACT, V, method=method)
            for V in (MATRICES, MANY, MATRICES[0], MATRICES.double())
            for method in ("auto", "ghost", "materialise")
        ]
    if name == "per_sample_grad":
        return [hk.per_sample_grad(d, ACT) for d in (DELTA, DELTA.bfloat16(), DELTA.half())]
    if name == "per_sample_norm_sq":
        return [
            hk.per_sample_norm_sq(DELTA.to(dtype), ACT, method=method)
            for dtype in (torch.float32, torch.float16, torch.float64)
            for method in ("ghost", "materialise")
        ]
    if name == "sherman_morrison":
        return [
            hk.sherman_morrison(QUERIES, ROWS, 0.1), hk.sherman_morrison(MANY.flatten(1)[:, :60],
            ROWS[:, :60], torch.tensor(0.3, dtype=torch.float64, device="cpu")),
            hk.sherman_morrison(MATRICES, DELTA, 0.1, ACT),
            hk.sherman_morrison(MATRICES.double(), DELTA, 0.1, ACT),
        ]  # fmt: skip
    raise AssertionError(name)


def inverses(name: str) -> Any:
    if name == "spd_inverse":
        calls = [partial(hk.spd_inverse, method=m) for m in ("auto", "direct", "schulz")]
    elif name == "schulz_inverse":
        calls = [hk.schulz_inverse, partial(hk.schulz_inverse, precision="bf16"),
                 partial(hk.schulz_inverse, bounds=(1e-3, 1e3))]  # fmt: skip
    else:
        calls = [lambda A, **more: hk.schulz_solve(A, A[..., :2, :], **more)]
    results = []
    for call in calls:
        for A in (SPD, SPD.double(), LARGE):
            X, info = call(A, return_info=True)
            results += [X, info.residual, info.converged, call(A)]
    return results


def topk() -> Any:
    """Not in the package's own list, and public in `ops`."""
    kept = []
    for largest in (True, False):
        values, positions = topk_empty(3, 7)
        for part in (slice(0, 20), slice(20, 50)):
            topk_merge_(values, positions, SCORES[:, part], part.start, largest=largest)
        kept += [values, positions]
    return kept


def everything(solver: Solver, **more: Any) -> Any:
    """Whatever a solver can be asked, its training batches seen in two of it and merged."""
    other = copy.deepcopy(solver)
    tokens = [{"tokens": t} for t in TOKENS] if more.pop("tokens", False) else [{}] * len(TRAIN)
    solver.update(TRAIN[0], **tokens[0])
    for batch, further in zip(TRAIN[1:], tokens[1:], strict=True):
        other.update(batch, copy=False, **further)
    solver.merge(other)
    if solver.second_pass:
        for batch in TRAIN:
            solver.revisit(batch)
    results: list[Any] = [solver.fit().apply(QUERY), solver.self_influence(QUERY)]
    if type(solver)._half is not Solver._half and getattr(solver, "mode", "") != "paper":
        # the basis of an embedding is free, and eigenvectors may differ by their sign
        halves = [half.double() for half in solver.half(QUERY).values()]
        results += [half @ half.mT for half in halves]
    if isinstance(solver, FlatSolver):
        results += [
            solver.scores(QUERY),
            solver.own_influence(),
            dict(solver.scores_by_block(QUERY)),
        ]
    solver.redamp(hk.DataInfDamping(0.3))
    results.append(solver.apply(QUERY))
    tensors, meta = solver.state()
    again = type(solver)(solver.damping, **solver.options())
    again.restore({name: t.clone() for name, t in tensors.items()}, meta)
    if not again.second_pass:
        results.append(again.fit().apply(QUERY))
    return results


def influences() -> Any:
    """Of every method, dense, by block and as top-k."""
    results: list[Any] = []
    for method in METHODS:
        if method == "lissa":
            continue  # thousands of steps, and its own entry has them all
        scores = hk.influence(WHOLE, QUERY, method=method, per_block=True)
        best = hk.influence(WHOLE, QUERY, method=method, top_k=4)
        results += [scores.values, scores.per_block, best.values]
    return results


def grid() -> Any:
    engine, other = hk.GramEngine(), hk.GramEngine()
    engine.update(TRAIN[0])
    for batch in TRAIN[1:]:
        other.update(batch, copy=False)
    dampings = (hk.DataInfDamping(0.1), hk.TraceDamping(0.5))
    found = engine.merge(other).scores(QUERY, ("grad_dot", *FLAT), dampings)
    return [scores.values for scores in found]


def attributed() -> Any:
    results: list[Any] = []
    for method in ("datainf", "hyperinf", "ekfac"):
        attributor = hk.Attributor(MODEL, loss=loss, blocks=r".*weight", method=method)
        attributor.fit(BATCHES)
        results += [attributor.score(BATCHES[:1]).values, attributor.self_influence(BATCHES)]
    return results


NOTHING = nullcontext  # a name that computes nothing with tensors
Entry = Callable[[], Any]
ENTRIES: dict[str, Entry | type[NOTHING]] = {
    **{name: partial(ops, name) for name in (
        "gfim_accumulate_", "gram_accumulate_", "pairwise_dot", "per_sample_dot",
        "per_sample_grad", "per_sample_norm_sq", "sherman_morrison",
    )},
    **{name: partial(inverses, name) for name in (
        "schulz_inverse", "schulz_solve", "spd_inverse",
    )},
    "HyperINF": lambda: [everything(hk.HyperINF(side=side, mode=mode)) for side, mode in (
        ("cols", "converged"), ("rows", "converged"), ("both", "converged"), ("cols", "paper"),
    )],
    "DataInf": lambda: everything(hk.DataInf()),
    "Exact": lambda: everything(hk.Exact()),
    "CG": lambda: everything(hk.CG()),
    "LiSSA": lambda: everything(hk.LiSSA(iterations=20)),
    "GradDot": lambda: everything(hk.GradDot()),
    "KFAC": lambda: [everything(hk.KFAC()), everything(hk.KFAC(), tokens=True)],
    "EKFAC": lambda: [everything(hk.EKFAC()), everything(hk.EKFAC(two_pass=True))],
    "GramEngine": grid,
    "influence": influences,
    "InfluenceScores": lambda: hk.influence(WHOLE, QUERY, method="datainf").values,
    "per_sample_gradients": lambda: [
        hk.per_sample_gradients(MODEL, batch, loss=loss, blocks=r".*weight")
        for batch in BATCHES
    ],
    "Attributor": attributed,
    **dict.fromkeys((
        "__version__", "AbsoluteDamping", "BackendError", "BlockReport", "CausalLM", "Damping",
        "DataInfDamping", "GramScores", "InputError", "MaskedLM", "Plan", "Seq2SeqLM",
        "SequenceClassification", "SolveInfo", "TokenClassification", "TraceDamping", "explain",
        "trace_backends",
    ), NOTHING),
}  # fmt: skip
CALLS = {name: entry for name, entry in ENTRIES.items() if entry is not NOTHING}
CALLS["topk_merge_"] = topk
# their forward pass is the caller's, who may want it in lower precision
FORWARD = ("per_sample_gradients", "Attributor")


# --- every state ---------------------------------------------------------------------------------


@contextmanager
def setting(enter: Callable[[], object], leave: Callable[[], object]) -> Iterator[None]:
    enter()
    try:
        yield
    finally:
        leave()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(lambda: torch.set_default_dtype(dtype),
                   lambda: torch.set_default_dtype(torch.float32))  # fmt: skip


def matmul_precision(word: str) -> AbstractContextManager[None]:
    return setting(lambda: torch.set_float32_matmul_precision(word),
                   lambda: torch.set_float32_matmul_precision("highest"))  # fmt: skip


@contextmanager
def onednn(backend: Any, word: str) -> Iterator[None]:
    before, backend.fp32_precision = backend.fp32_precision, word
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def flushing() -> AbstractContextManager[None]:
    return setting(lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False))


def threads(count: int) -> AbstractContextManager[None]:
    before = torch.get_num_threads()
    return setting(lambda: torch.set_num_threads(count), lambda: torch.set_num_threads(before))


def default_device(name: str) -> AbstractContextManager[None]:
    return setting(lambda: torch.set_default_device(name), lambda: torch.set_default_device(None))


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "default dtype fp16": lambda: default_dtype(torch.float16),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "autocast bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast fp16": lambda: torch.autocast("cpu", torch.float16),
    "matmul precision high": lambda: matmul_precision("high"),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "oneDNN products in bf16": lambda: onednn(torch.backends.mkldnn.matmul, "bf16"),
    "oneDNN in tf32": lambda: onednn(torch.backends.mkldnn, "tf32"),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "dual level": forward_ad.dual_level,
    "flush to zero": flushing,
    "two threads": lambda: threads(2),
    "another seed": lambda: setting(lambda: torch.manual_seed(5), lambda: torch.manual_seed(0)),
}
PRODUCTS = ("autocast", "matmul", "oneDNN")  # states in which the caller's forward pass differs


def flat(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from flat(value)
    elif result is not None:
        for value in result:
            yield from flat(value)


def test_every_public_name_has_its_entry() -> None:
    assert set(ENTRIES) == set(hk.__all__)


@functools.cache
def neutral(name: str) -> list[Tensor]:
    return [t.clone() for t in flat(CALLS[name]())]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_around_a_call_changes_it(name: str, state: str) -> None:
    if name in FORWARD and state.startswith(PRODUCTS):
        return  # the model's own forward pass differs, as its owner asked
    want, seed = neutral(name), torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*torch.jit.*")
        with STATES[state]():
            inside = torch.get_rng_state() if state == "another seed" else seed
            got = list(flat(CALLS[name]()))
            assert torch.equal(torch.get_rng_state(), inside), "torch's own generator was used"
    assert len(got) == len(want) > 0
    for mine, plain in zip(got, want, strict=True):
        assert (mine.dtype, mine.device, mine.shape) == (plain.dtype, plain.device, plain.shape)
        if state == "two threads" and plain.dtype.is_floating_point:
            # torch's own products are cut elsewhere: rounding times the solve's condition
            off = float((mine.double() - plain.double()).norm())
            assert off <= 1e-4 * float(plain.double().norm()) + 1e-6
        else:
            torch.testing.assert_close(mine, plain, rtol=0, atol=0, equal_nan=True)

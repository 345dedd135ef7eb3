"""The Python side of the CUDA kernels, with einsums in the kernels' place: no device is needed.

What is checked is what the kernels are called with, and what becomes of their results: joined batch
dimensions, one dtype, the exchange of the factors, and the routes for many matrices or tokens.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from hyperinf_kernels.ops import cuda
from tests import oracle
from tests.native_cases import needs_kernels, random

pytestmark = needs_kernels
BF16 = torch.bfloat16
LEADS = [(), (3,), (2, 3)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was called; every call is checked as the binding would."""
    counted: Counter[str] = Counter()

    def formed(name: str, delta: Tensor, act: Tensor) -> Tensor:
        counted[name] += 1
        assert delta.ndim == act.ndim == 3
        assert delta.dtype == act.dtype
        assert delta.shape[:2] == act.shape[:2]
        return torch.einsum("bto,bti->boi", delta.float(), act.float())

    def grad(delta: Tensor, act: Tensor) -> Tensor:
        return formed("grad", delta, act)

    def norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
        return formed("norm", delta, act).square().sum((1, 2))

    def dot(delta: Tensor, act: Tensor, V: Tensor) -> Tensor:
        assert V.dtype == torch.float32
        assert V.is_contiguous()
        return torch.einsum("boi,moi->bm", formed("dot", delta, act), V)

    def gfim(C: Tensor, delta: Tensor, act: Tensor, alpha: float) -> None:
        assert C.ndim == 2
        rows = formed("gfim", delta, act).flatten(0, 1)
        C.add_(rows.T @ rows, alpha=alpha)

    kernels = {"per_sample_grad": grad, "per_sample_norm_sq": norm_sq, "per_sample_dot": dot,
               "gfim_accumulate_": gfim}  # fmt: skip
    for name, kernel in kernels.items():
        monkeypatch.setattr(torch.ops.hyperinf, name, kernel)
    return counted


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (BF16, torch.float32)], ids=["one", "mixed"])
@pytest.mark.parametrize("lead", LEADS, ids=str)
def test_gradients_norms_and_dots(
    lead: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], calls: Counter[str]
) -> None:
    delta, act = random(*lead, 5, 4, dtype=dtypes[0]), random(*lead, 5, 6, dtype=dtypes[1], seed=1)
    V = random(3, 6, 4, seed=2).mT
    results = {
        "per_sample_grad": (cuda.per_sample_grad(delta, act), ()),
        "per_sample_norm_sq": (cuda.per_sample_norm_sq(delta, act, False), ()),
        "per_sample_dot": (cuda.per_sample_dot(delta, act, V, False), (V,)),
    }
    for op, (actual, more) in results.items():
        truth = getattr(oracle, op)(delta, act, *more)
        torch.testing.assert_close(actual.double(), torch.from_numpy(truth), atol=1e-4, rtol=1e-4)
    assert calls == {"grad": 1, "norm": 1, "dot": 1}


def test_dots_with_many_matrices_form_gradients_in_slices(calls: Counter[str]) -> None:
    delta, act, V = random(7, 5, 4), random(7, 5, 6, seed=1), random(9, 4, 6, seed=2)
    actual = cuda.per_sample_dot(delta, act, V, False)
    truth = torch.from_numpy(oracle.per_sample_dot(delta, act, V))
    torch.testing.assert_close(actual.double(), truth, atol=1e-4, rtol=1e-4)
    assert calls == {"grad": 1}


@pytest.mark.parametrize("side", ["cols", "rows"])
@pytest.mark.parametrize("lead", LEADS[:2], ids=str)
def test_gfim_of_each_side_and_block(lead: tuple[int, ...], side: str, calls: Counter[str]) -> None:
    delta, act = random(*lead, 2, 4, 5, 4), random(*lead, 2, 4, 5, 6, seed=1)
    size = 6 if side == "cols" else 4
    C = torch.ones(*lead, size, size)
    assert cuda.gfim_accumulate_(C, delta, act, side=side, alpha=0.5) is C
    for block in range(len(C) if lead else 1):
        of = (lambda t: t[block]) if lead else (lambda t: t)
        grads = oracle.per_sample_grad(of(delta), of(act)).reshape(8, 4, 6)
        truth = torch.from_numpy(1 + 0.5 * oracle.gfim_sum(grads, side))
        torch.testing.assert_close(of(C).double(), truth, atol=1e-4, rtol=1e-4)
    assert calls == {"gfim": lead[0] if lead else 1}


def test_gfim_of_many_tokens_and_tiles_forms_gradients_in_slices(calls: Counter[str]) -> None:
    delta, act = random(2, 2, 129, 3), random(2, 2, 129, 130, seed=1)
    C = torch.zeros(2, 130, 130)
    cuda.gfim_accumulate_(C, delta, act, side="cols", alpha=2.0)
    for block in range(2):
        grads = oracle.per_sample_grad(delta[block], act[block])
        truth = torch.from_numpy(2 * oracle.gfim_sum(grads))
        torch.testing.assert_close(C[block].double(), truth, atol=1e-2, rtol=1e-4)
    assert calls == {"grad": 1}


@pytest.mark.parametrize(
    ("tokens", "side", "fused"),
    [(4096, 128, True), (128, 4096, True), (129, 129, False), (512, 1024, False)],
)
def test_the_fused_sum_is_for_few_tiles_or_few_tokens(tokens: int, side: int, fused: bool) -> None:
    assert cuda.prefer_fused_gfim(tokens, side) == fused

"""The choice of a backend is pure, explained, recorded, and an error when strict."""

from __future__ import annotations

import logging

import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import dispatch
from hyperinf_kernels.ops.dispatch import Capability, Kernel, TensorMeta, select

CPU = (TensorMeta((4, 8), torch.float32, "cpu", (8, 1)),)
CUDA = (TensorMeta((4, 8), torch.float32, "cuda", (8, 1)),)
HALF = (TensorMeta((4, 8), torch.float16, "cuda", (8, 1)),)
ALL = Capability()


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that every machine has, so that plans are the same with and without kernels."""
    monkeypatch.setenv("HYPERINF_BACKEND", "torch")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op with a kernel on every backend; triton's refuses fp16."""

    def only_fp32(metas: tuple[TensorMeta, ...]) -> str | None:
        return None if metas[0].dtype == torch.float32 else f"takes fp32, not {metas[0].dtype}"

    table = {
        backend: Kernel(f"{backend}.probe", lambda *args: args, only_fp32 if backend == "triton"
                        else lambda metas: None)
        for backend in ("cuda", "triton", "cpu", "torch")
    }  # fmt: skip
    monkeypatch.setitem(dispatch.KERNELS, "probe", table)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("metas", "machine", "requested", "backend", "reason"),
    [
        (CUDA, ALL, "auto", "triton", "first choice"),
        (HALF, ALL, "auto", "cuda", "triton: takes fp32"),
        (CUDA, Capability({"triton": "not installed"}), "auto", "cuda", "triton: not installed"),
        (CUDA, Capability({"triton": "a", "cuda": "b"}), "auto", "torch", "triton: a; cuda: b"),
        (CPU, ALL, "auto", "cpu", "first choice"),
        (CPU, Capability({"cpu": "no AVX2"}), "auto", "torch", "cpu: no AVX2"),
        (CUDA, ALL, "cuda", "cuda", "first choice"),
        (CUDA, ALL, "torch", "torch", "first choice"),
        (CPU, ALL, "triton", "torch", "triton kernels do not take cpu"),
        ((), ALL, "auto", "cpu", "first choice"),
    ],
    ids=["cuda", "refused", "no-triton", "nothing-fast", "cpu", "no-extension", "asked-cuda",
         "asked-torch", "wrong-device", "no-tensor"],
)  # fmt: skip
def test_selection(metas, machine: Capability, requested: str, backend: str, reason: str) -> None:
    plan = select("probe", metas, machine, requested)
    assert plan.backend == backend
    assert plan.kernel == f"{backend}.probe"
    assert reason in plan.reason


def test_unknown_names_are_refused() -> None:
    with pytest.raises(hk.BackendError, match="unknown op 'no_such_op'; known: .*sherman_morrison"):
        select("no_such_op", CPU, ALL)
    with pytest.raises(hk.BackendError, match="HYPERINF_BACKEND='gpu'.*known: auto, cuda"):
        select("sherman_morrison", CPU, ALL, "gpu")


def test_every_public_op_can_be_explained_without_running(plain_torch: None) -> None:
    for op in (
        "schulz_inverse", "schulz_solve", "spd_inverse", "sherman_morrison", "per_sample_grad",
        "per_sample_norm_sq", "per_sample_dot", "pairwise_dot", "gfim_accumulate_",
        "gram_accumulate_",
    ):  # fmt: skip
        with hk.trace_backends() as log:
            plan = hk.explain(op, torch.zeros(2, 3, 3))
        assert plan._fields == ("backend", "kernel", "config", "reason")
        assert plan.backend == "torch"
        assert log == []


def test_trace_lists_plans_in_call_order_and_nests(plain_torch: None) -> None:
    G = torch.randn(3, 4)
    with hk.trace_backends() as outer:
        hk.sherman_morrison(G, G, 0.1)
        with hk.trace_backends() as inner:
            hk.gram_accumulate_(torch.zeros(3, 3), G)
        hk.spd_inverse(torch.eye(2))
    kernels = ["reference.sherman_morrison", "reference.gram_accumulate_", "reference.spd_inverse"]
    assert [plan.kernel for plan in outer] == kernels
    assert [plan.kernel for plan in inner] == kernels[1:2]
    hk.spd_inverse(torch.eye(2))
    assert len(outer) == 3


def test_trace_ends_with_an_error_too() -> None:
    with pytest.raises(RuntimeError, match="stop"), hk.trace_backends():
        raise RuntimeError("stop")
    assert dispatch._traces == []


def test_a_backend_asked_for_falls_back_unless_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(3, 4)
    monkeypatch.setenv("HYPERINF_BACKEND", "triton")
    plan = hk.explain("sherman_morrison", G, G)
    assert plan.backend == "torch"
    assert plan.reason.startswith("triton: ")
    assert hk.sherman_morrison(G, G, 0.1).shape == (3, 4)
    monkeypatch.setenv("HYPERINF_STRICT", "1")
    with pytest.raises(hk.BackendError, match="would fall back to plain torch: triton: "):
        hk.sherman_morrison(G, G, 0.1)
    monkeypatch.setenv("HYPERINF_BACKEND", "auto")
    assert hk.sherman_morrison(G, G, 0.1).shape == (3, 4)


def test_each_op_and_backend_is_logged_once(
    caplog: pytest.LogCaptureFixture, plain_torch: None
) -> None:
    dispatch._log_once.cache_clear()
    G = torch.randn(3, 4)
    with caplog.at_level(logging.INFO, logger="hyperinf_kernels"):
        for _ in range(3):
            hk.sherman_morrison(G, G, 0.1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["sherman_morrison runs on torch (reference.sherman_morrison; first choice)"]

"""The choice of a backend is pure, explained, recorded, and an error when strict."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import dispatch
from hyperinf_kernels.ops.dispatch import Capability, Kernel, Plan, TensorMeta, select

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
    dispatch._used.clear()
    G = torch.randn(3, 4)
    with caplog.at_level(logging.INFO, logger="hyperinf_kernels"):
        for _ in range(3):
            hk.sherman_morrison(G, G, 0.1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == ["sherman_morrison runs on torch (reference.sherman_morrison; first choice)"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_autocast_changes_no_result(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", backend)
    delta, act = torch.randn(3, 5, 40), torch.randn(3, 5, 33)
    K = torch.zeros(3, 3)
    plain = [hk.per_sample_grad(delta, act), hk.gram_accumulate_(K.clone(), act.flatten(1))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = [hk.per_sample_grad(delta, act), hk.gram_accumulate_(K.clone(), act.flatten(1))]
    for one, other in zip(plain, cast, strict=True):
        assert torch.equal(one, other)


# --- invented machines --------------------------------------------------------------------------

ARCHS = ("sm_80", "sm_90", "sm_100", "compute_100")
NO_TRITON = {"triton": "triton is not installed"}
NOT_BUILT = {"cpu": "not built (reinstall)", "cuda": "not built (reinstall)", **NO_TRITON}
BF16 = TensorMeta((4, 8, 16), torch.bfloat16, "cuda", (128, 16, 1))
ROWS = TensorMeta((4, 64), torch.float32, "cpu", (64, 1))


@pytest.mark.parametrize(
    ("device", "archs", "arch"),
    [
        ((8, 0), ARCHS, "sm_80"),
        ((8, 6), ARCHS, "sm_80"),
        ((9, 0), ARCHS, "sm_90"),
        ((10, 0), ARCHS, "sm_100"),
        ((12, 0), ARCHS, "compute_100"),
        ((9, 0), ("sm_80", "compute_80"), "compute_80"),
        ((9, 0), ("sm_80", "compute_100"), None),
        ((7, 5), ARCHS, None),
    ],
)
def test_cuda_kernels_run_where_a_built_architecture_serves(
    device: tuple[int, int], archs: tuple[str, ...], arch: str | None
) -> None:
    machine = Capability(NO_TRITON, cuda=device, cuda_archs=archs, isas=("avx512", "portable"))
    plan = select("per_sample_grad", (BF16, BF16), machine)
    if arch:
        assert plan[:3] == ("cuda", "cuda.per_sample_grad", {"arch": arch})
        assert plan.reason.startswith("triton: ")
    else:
        assert plan.backend == "torch"
        number = "{}{}".format(*device)
        assert f"this device is sm_{number}" in plan.reason
        assert f"HYPERINF_CUDA_ARCHS={number}" in plan.reason


@pytest.mark.parametrize(
    ("machine", "backend", "config"),
    [
        (Capability(NO_TRITON, isas=("avx512", "avx2", "portable")), "cpu", {"isa": "avx512"}),
        (Capability(NO_TRITON, isas=("avx2", "portable")), "cpu", {"isa": "avx2"}),
        (Capability(NOT_BUILT), "torch", {}),
    ],
    ids=["avx512", "avx2 only", "no extension"],
)
def test_plans_name_the_instruction_set(
    machine: Capability, backend: str, config: dict[str, str]
) -> None:
    plan = select("sherman_morrison", (ROWS, ROWS), machine)
    assert (plan.backend, plan.config) == (backend, config)
    if backend == "torch":
        assert plan.reason == "cpu: not built (reinstall)"


def test_no_extension_leaves_cuda_tensors_to_torch_with_the_reason() -> None:
    machine = Capability(NOT_BUILT, cuda=(9, 0))
    plan = select("per_sample_norm_sq", (BF16, BF16), machine)
    assert plan.backend == "torch"
    assert "cuda: not built (reinstall)" in plan.reason


@pytest.mark.parametrize(
    ("op", "metas", "reason"),
    [
        ("per_sample_grad", (BF16._replace(dtype=torch.float64),) * 2, "not float64"),
        ("per_sample_grad", (BF16._replace(requires_grad=True), BF16), "no backward"),
        ("gfim_accumulate_", (BF16._replace(dtype=torch.float32), BF16), "vendor library's"),
        ("gfim_accumulate_", (BF16, BF16, BF16), "sums are float32, not bfloat16"),
    ],
    ids=["fp64", "gradients", "formed", "bf16 sum"],
)
def test_what_the_cuda_kernels_refuse(op: str, metas, reason: str) -> None:
    plan = select(op, metas, Capability(NO_TRITON, cuda=(9, 0), cuda_archs=ARCHS))
    assert plan.backend == "torch"
    assert reason in plan.reason


def test_a_kernel_may_need_more_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def hopper(machine: Capability) -> str | None:
        return None if machine.cuda and machine.cuda >= (9, 0) else "needs sm_90 or later"

    table = {
        "triton": Kernel("triton.probe", lambda *args: args, needs=hopper),
        "torch": Kernel("torch.probe", lambda *args: args),
    }
    monkeypatch.setitem(dispatch.KERNELS, "probe", table)
    assert select("probe", CUDA, Capability(cuda=(9, 0))).backend == "triton"
    plan = select("probe", CUDA, Capability(cuda=(8, 0)))
    assert plan[:2] == ("torch", "torch.probe")
    assert plan.reason == "triton: needs sm_90 or later; cuda: no cuda kernel for probe"


def test_the_environment_chooses_and_strict_mode_refuses_what_is_slow() -> None:
    machine = Capability({**NO_TRITON, "cuda": "no kernels"}, cuda=(9, 0), isas=("avx512",))
    metas = (BF16, BF16)
    plan, slow = dispatch.resolve("per_sample_grad", metas, machine, {})
    assert (plan.backend, slow) == ("torch", True)
    _, slow = dispatch.resolve("per_sample_grad", metas, machine, {"HYPERINF_BACKEND": "torch"})
    assert not slow
    with pytest.raises(hk.BackendError, match="fall back to plain torch: .*cuda: no kernels"):
        dispatch.resolve("per_sample_grad", metas, machine, {"HYPERINF_STRICT": "1"})
    # fp64 is summed in torch by design: solvers on a GPU must pass strict mode
    wide = (BF16._replace(dtype=torch.float64), BF16)
    plan, slow = dispatch.resolve("gfim_accumulate_", wide, machine, {"HYPERINF_STRICT": "1"})
    assert (plan.backend, slow) == ("torch", False)
    plan, _ = dispatch.resolve("sherman_morrison", (ROWS, ROWS), machine,
                               {"HYPERINF_CPU_ISA": "avx2", "HYPERINF_STRICT": "1"})  # fmt: skip
    assert plan.config == {"isa": "avx2"}


def test_one_warning_per_op_and_one_line_per_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(dispatch, "_used", {})
    with pytest.warns(RuntimeWarning, match="per_sample_dot: a CUDA tensor runs in plain torch"):
        dispatch._warn_once("per_sample_dot", "cuda: one reason")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._warn_once("per_sample_dot", "cuda: another reason")
    with caplog.at_level(logging.INFO, logger="hyperinf_kernels"):
        for backend, reason in (("torch", "a"), ("torch", "b"), ("cpu", "c"), ("cpu", "d")):
            dispatch._log_once("per_sample_dot", Plan(backend, f"{backend}.k", {}, reason))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "per_sample_dot runs on torch (torch.k; a)", "per_sample_dot runs on cpu (cpu.k; c)"
    ]  # fmt: skip

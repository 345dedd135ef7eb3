"""The CUDA kernels on a device: the emulator's cases, and what only a device can show."""

from __future__ import annotations

import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import native
from tests.kernel_cases import CASES, LAYOUTS, MODES, Case, assert_exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device and a CUDA build of torch; run `pytest -m gpu` where they are",
    ),
    pytest.mark.skipif(
        not native.cuda_archs(), reason=f"no CUDA kernels: {native.missing() or native.no_cuda()}"
    ),
]
FAR = (1 << 31) + 64
BUILT = [case for case in CASES if "scalar" not in case.mode]


def placed(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values on the device, in the layout that the emulator's cases name."""
    batch, tokens, features = tensor.shape
    wide = -(-features // 16) * 16
    strides = {
        "plain": (tokens * features, features, 1),
        "shifted": (tokens * features, features, 1),
        "transposed": (tokens * features, 1, tokens),
        "padded": (tokens * wide, wide, 1),
        "far samples": (FAR, wide, 1),
        "far tokens": (FAR * tokens, FAR, 1),
    }[layout]
    numbers = batch * strides[0] + 1
    if numbers * tensor.element_size() > torch.cuda.mem_get_info()[0] // 3:
        pytest.skip("needs a device with more free memory")
    buffer = torch.empty(numbers, dtype=tensor.dtype, device="cuda")
    if layout not in LAYOUTS[4:]:
        buffer.fill_(torch.nan)
    view = buffer.as_strided(tensor.shape, strides, int(layout == "shifted"))
    return view.copy_(tensor)


def run(case: Case) -> torch.Tensor:
    delta, act, other = case.numbers()
    delta, act, other = placed(delta, case.layout), placed(act, case.layout), other.cuda()
    if case.op == "grad":
        return hk.per_sample_grad(delta, act)
    if case.op == "norm":
        return hk.per_sample_norm_sq(delta, act, "ghost" if case.ghost else "materialise")
    if case.op == "dot":
        return hk.per_sample_dot(delta, act, other)
    return hk.gfim_accumulate_(other, delta, act, alpha=case.alpha)


@pytest.fixture(autouse=True)
def _cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "cuda")
    monkeypatch.setenv("HYPERINF_STRICT", "1")


@pytest.mark.parametrize("case", BUILT, ids=str)
def test_kernels_match_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERINF_TF32", "1" if case.mode == "tf32" else "0")
    with hk.trace_backends() as log:
        first = run(case)
    assert [plan.backend for plan in log] == ["cuda"]
    assert torch.equal(first, run(case)), "results differ between runs"
    assert_exact(case, first.double().cpu().numpy())


def test_kernels_follow_the_current_stream() -> None:
    """Work queued behind a long product on a side stream sees what that product wrote."""
    case = Case("norm", "fp32", (4, 33, 20, 70))
    delta, act, _ = (tensor.cuda() for tensor in case.numbers())
    stream, late = torch.cuda.Stream(), torch.zeros_like(delta)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(delta)
        norms = hk.per_sample_norm_sq(late, act)
    stream.synchronize()
    assert torch.equal(norms, hk.per_sample_norm_sq(delta, act))


def test_the_device_of_the_tensors_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    delta, act, _ = (tensor.to("cuda:1") for tensor in CASES[4].numbers())
    assert hk.per_sample_grad(delta, act).device.index == 1
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("mode", [mode for mode in MODES if "scalar" not in mode])
def test_schema_and_fakes_agree_with_the_kernels(mode: str) -> None:
    delta, act, V = (t.cuda() for t in Case("dot", mode, (2, 5, 8, 16), count=3).numbers())
    ops = torch.ops.hyperinf
    torch.library.opcheck(ops.per_sample_grad.default, (delta, act))
    torch.library.opcheck(ops.per_sample_norm_sq.default, (delta, act, True))
    torch.library.opcheck(ops.per_sample_dot.default, (delta, act, V, False))
    C = torch.zeros(16, 16, device="cuda")
    torch.library.opcheck(ops.gfim_accumulate_.default, (C, delta, act, 0.5))


def test_launch_errors_name_the_argument() -> None:
    ones = torch.ones(2, 3, 4, device="cuda")
    with pytest.raises(RuntimeError, match="delta and act must have one dtype"):
        torch.ops.hyperinf.per_sample_grad(ones, ones.half())
    with pytest.raises(RuntimeError, match=r"C must be \(I, I\)"):
        torch.ops.hyperinf.gfim_accumulate_(torch.zeros(3, 3, device="cuda"), ones, ones, 1.0)


def test_nothing_of_the_gradients_size_is_allocated() -> None:
    delta, act = (torch.randn(64, 16, 1024, device="cuda") for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hk.per_sample_norm_sq(delta, act, "materialise")
    hk.gfim_accumulate_(torch.zeros(1024, 1024, device="cuda"), delta, act)
    all_gradients = 64 * 1024 * 1024 * 4
    assert torch.cuda.max_memory_allocated() - before < all_gradients / 2

"""When the Triton kernels are chosen, with which settings, and what happens without them."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import dispatch, gpu, schedule
from hyperinf_kernels.ops.dispatch import Capability, TensorMeta, select
from hyperinf_kernels.ops.triton import entry


def meta(*shape: int, dtype: torch.dtype = torch.float32, **more: object) -> TensorMeta:
    strides = tuple(torch.empty(shape, device="meta").stride())
    return TensorMeta(shape, dtype, "cuda", strides, **more)


# a machine with a GPU of this capability, a CUDA build and everything else
MACHINES = {80: Capability(cuda=(8, 0)), 90: Capability(cuda=(9, 0)),
            100: Capability(cuda=(10, 0))}  # fmt: skip
CASES = {
    "schulz": (meta(4, 64, 64),),
    "sherman_morrison": (meta(8, 4096), meta(1000, 4096, dtype=torch.bfloat16)),
    "gfim_accumulate_": (meta(512, 512), meta(32, 16, 512)),
    "gram_accumulate_": (meta(100, 200), meta(100, 4096), meta(200, 4096)),
    "per_sample_norm_sq": (meta(8, 128, 16), meta(8, 128, 1024)),
    "per_sample_grad": (meta(8, 128, 16), meta(8, 128, 1024)),
    "per_sample_dot": (meta(8, 128, 16), meta(8, 128, 1024), meta(4, 16, 1024)),
    "sherman_morrison_factored": (meta(4, 16, 1024), meta(8, 128, 16), meta(8, 128, 1024)),
    "topk_merge_": (meta(3, 100), meta(3, 100, dtype=torch.int64), meta(3, 5000)),
}


@pytest.mark.parametrize("arch", MACHINES)
@pytest.mark.parametrize("op", CASES)
def test_chosen_on_every_architecture_with_its_own_settings(op: str, arch: int) -> None:
    plan = select(op, CASES[op], MACHINES[arch])
    assert plan.backend == "triton"
    assert plan.kernel.endswith(f".{op}")
    assert plan.reason == "first choice"
    assert plan.config["arch"] == f"sm_{arch}"
    assert {"num_warps", "num_stages"} < set(plan.config)


@pytest.mark.parametrize(
    ("side", "variant"), [(16, "registers"), (32, "registers"), (33, "resident"),
                          (128, "resident"), (129, "product"), (4096, "product")]
)  # fmt: skip
def test_the_side_decides_how_a_chain_runs(side: int, variant: str) -> None:
    plan = select("schulz", (meta(2, side, side),), MACHINES[90])
    assert plan.config["variant"] == variant


@pytest.mark.parametrize(
    ("op", "metas", "reason"),
    [
        ("schulz", (meta(2, 8, 8, dtype=torch.float64),), "takes float32, not float64"),
        ("schulz", (meta(1, 40000, 40000),), "up to 32768 on a side"),
        ("schulz", (meta(2, 8, 8, requires_grad=True),), "has no backward"),
        ("sherman_morrison", (meta(2, 8), meta(5, 8, dtype=torch.float64)), "not float64"),
        ("sherman_morrison", (meta(2, 8), meta(5, 8)._replace(stride=(1, 5))), "unit stride"),
        ("gfim_accumulate_", (meta(8, 8, dtype=torch.float64), meta(4, 2, 8)), "not float64"),
        ("per_sample_dot", (meta(2, 4, 65), meta(2, 4, 9), meta(1, 65, 9)), "more than 64 rows"),
        ("per_sample_grad", (meta(2, 4, 8), meta(2, 4, 9, dtype=torch.float64)), "not float64"),
        ("sherman_morrison_factored", (meta(2, 65, 9), meta(3, 4, 65), meta(3, 4, 9)), "64 rows"),
        ("topk_merge_", (meta(2, 513), meta(2, 513), meta(2, 9)), "keeps up to 512 entries"),
        ("topk_merge_", (meta(2, 9, dtype=torch.float64),) * 3, "not float64"),
        ("spd_inverse", (meta(2, 8, 8),), "no triton kernel for spd_inverse"),
        ("pairwise_dot", (meta(2, 4, 8),) * 4, "no triton kernel for pairwise_dot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_take_runs_in_torch_with_the_reason(
    op: str, metas: tuple[TensorMeta, ...], reason: str
) -> None:
    plan = select(op, metas, Capability({"cuda": "not built"}, (9, 0)))
    assert plan.backend == "torch"
    assert "triton: " in plan.reason
    assert reason in plan.reason


@pytest.mark.parametrize(
    ("version", "device", "reason"),
    [("3.9.0", (9, 0), None), ("3.6.0", (8, 0), None), ("4.0", (12, 0), None),
     ("3.5.1", (9, 0), "triton 3.5.1 is too old, the kernels need 3.6"),
     ("3.9.0", None, "no CUDA device is visible"),
     ("3.9.0", (7, 5), "compute capability 7.5, the kernels need 8.0")],
)  # fmt: skip
def test_what_the_machine_must_have(
    version: str, device: tuple[int, int] | None, reason: str | None
) -> None:
    said = gpu.refusal(version, device)
    assert (said is None) == (reason is None)
    assert reason is None or reason in str(said)


@pytest.fixture
def fresh_probe() -> object:
    dispatch.capability.cache_clear()
    dispatch._kept.clear()
    yield
    dispatch.capability.cache_clear()
    dispatch._kept.clear()


@pytest.mark.usefixtures("fresh_probe")
@pytest.mark.parametrize("state", ["missing", "old"])
def test_without_a_usable_triton_everything_works_and_says_so(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "triton")
    found = object() if state == "old" else None
    original, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: found if name == "triton" else original(name)
    )
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "3.1.0" if name == "triton" else version(name)
    )
    said = "not installed" if state == "missing" else "3.1.0 is too old"
    A = torch.eye(3)
    assert said in hk.explain("schulz", A).reason
    torch.testing.assert_close(hk.schulz_inverse(A), A)
    V, G = torch.randn(2, 5), torch.randn(4, 5)
    with hk.trace_backends() as log:
        hk.sherman_morrison(V, G, 0.1)
    assert log[0].backend == "torch"
    assert said in log[0].reason
    monkeypatch.setenv("HYPERINF_STRICT", "1")
    with pytest.raises(hk.BackendError, match=said):
        hk.sherman_morrison(V, G, 0.1)


def test_half_inputs_use_the_cheapest_exact_products() -> None:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    assert entry.products_of([bf16, bf16]) == "bf16"
    assert entry.products_of([fp16, fp16]) == "tf32"
    assert entry.products_of([fp16, bf16]) == "tf32"
    assert entry.products_of([fp32, bf16]) == "tf32x3"


@pytest.mark.parametrize(("queries", "variant"), [(1, "fused"), (8, "fused"), (9, "slices in L2")])
def test_many_queries_are_scored_in_slices(queries: int, variant: str) -> None:
    tensors = (meta(8, 128, 16), meta(8, 128, 1024), meta(queries, 16, 1024))
    assert select("per_sample_dot", tensors, MACHINES[90]).config["variant"] == variant


def test_gfim_tells_what_its_sum_runs_in() -> None:
    C, bf16 = meta(512, 512), torch.bfloat16
    rows = select("gfim_accumulate_", (C, meta(32, 16, 512, dtype=bf16)), MACHINES[90])
    assert rows.config["precision"] == "bf16"
    factors = (meta(32, 128, 16, dtype=bf16), meta(32, 128, 512, dtype=bf16))
    plan = select("gfim_accumulate_", (C, *factors), MACHINES[90])
    assert plan.config["precision"] == "tf32x3"
    assert plan.config["variant"] == "gradients in slices"


def test_tiny_matrices_run_exactly_whatever_is_permitted() -> None:
    assert entry.arithmetic(16, "bf16") == "ieee"
    assert entry.arithmetic(64, "bf16") == "bf16"


def test_every_chain_that_can_be_scheduled_has_coefficients_for_the_kernels() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    from hyperinf_kernels.ops.triton.schulz import COEFFICIENTS

    for degree in schedule.PRODUCTS:
        scalars, _ = schedule._STEPS[degree](torch.tensor([0.9], dtype=torch.float64))
        assert set(COEFFICIENTS[degree]) <= set(scalars)
        # degree 2 has two names, degree 3 and 5 leave the unit term out
        assert set(scalars) == set(COEFFICIENTS[degree])

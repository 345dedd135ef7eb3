"""The compiled kernels: how they are built, loaded, reported, traced, and done without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import dispatch, info, native
from tests.native_cases import ISAS, needs_kernels, random

ROOT = Path(__file__).parents[1]


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(autouse=True)
def _automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPERINF_BACKEND", "auto")


# --- building -----------------------------------------------------------------------------------


def test_build_without_kernels_says_so_in_one_line() -> None:
    done = run("setup.py", "--name", HYPERINF_CPU="0")
    assert done.stderr.splitlines() == ["hyperinf_kernels: built as pure Python: HYPERINF_CPU=0"]


def test_a_compiler_that_fails_leaves_a_pure_python_build(tmp_path: Path) -> None:
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    done = run("setup.py", "build_ext", *folders, CC="false", CXX="false", HYPERINF_CPU="auto")
    lines = [line for line in done.stderr.splitlines() if line.startswith("hyperinf_kernels:")]
    assert len(lines) == 1
    assert "pure Python: compiling the CPU kernels failed" in lines[0]
    assert not list(tmp_path.rglob("*.so"))


# --- loading ------------------------------------------------------------------------------------

HIDDEN = """
import sys
sys.modules["hyperinf_kernels._C"] = None
import torch, hyperinf_kernels as hk
plan = hk.explain("sherman_morrison", torch.ones(2, 3), torch.ones(4, 3))
assert plan.backend == "torch", plan
print(plan.reason)
assert hk.sherman_morrison(torch.ones(2, 3), torch.ones(4, 3), 0.5).shape == (2, 3)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"HYPERINF_CPU": "auto"}, "not built (reinstall with pip install --no-build-isolation"),
        ({"HYPERINF_CPU": "0"}, "turned off by HYPERINF_CPU=0"),
    ],
    ids=["not-built", "turned-off"],
)
def test_without_the_extension_torch_serves_and_the_plan_says_why(
    environment: dict[str, str], reason: str
) -> None:
    done = run("-c", HIDDEN, **environment, HYPERINF_BACKEND="auto", HYPERINF_STRICT="0")
    assert reason in done.stdout


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    monkeypatch.delenv("HYPERINF_CPU", raising=False)
    assert "need torch 2.10 or later, this is 2.9.1+cpu" in str(native.missing.__wrapped__())


def test_a_binary_that_does_not_load_keeps_the_linkers_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: torch_parallel_for")

    monkeypatch.setattr(native.importlib, "import_module", broken)
    monkeypatch.delenv("HYPERINF_CPU", raising=False)
    assert "undefined symbol: torch_parallel_for" in str(native.missing.__wrapped__())


def test_info_shows_the_compiled_kernels() -> None:
    facts = info.collect()
    text = info.as_text()
    assert f"compiled CPU kernels: {facts['cpu_kernels']}" in text
    answer = facts["ops"]["sherman_morrison"]["cpu"]
    if native.missing():
        assert native.missing() in answer
        assert dispatch.capability().missing["cpu"] == native.missing()
    else:
        assert answer == "yes"
        assert facts["cpu_kernels"].split(", ")[-1] == "portable"


# --- running ------------------------------------------------------------------------------------


@needs_kernels
def test_portable_code_is_always_there_and_an_unknown_set_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert ISAS[-1] == "portable"
    monkeypatch.setenv("HYPERINF_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="HYPERINF_CPU_ISA=sse9 is not one of avx512bf16, "):
        hk.sherman_morrison(torch.ones(2, 3), torch.ones(4, 3), 0.5)


@needs_kernels
@pytest.mark.parametrize("which", ["V", "G"])
def test_tensors_that_need_gradients_stay_in_torch(which: str) -> None:
    tensors = {"V": random(2, 5), "G": random(3, 5)}
    tensors[which].requires_grad_()
    plan = hk.explain("sherman_morrison", *tensors.values())
    assert plan.backend == "torch"
    assert "no backward" in plan.reason
    hk.sherman_morrison(*tensors.values(), 0.5).sum().backward()
    assert tensors[which].grad is not None
    with torch.no_grad():
        assert hk.explain("sherman_morrison", *tensors.values()).backend == "cpu"


OPS = {
    "sherman_morrison": lambda: (random(2, 3, 9), random(2, 5, 9), torch.tensor([0.5, 2.0])),
    "gram_accumulate_": lambda: (random(2, 5, 7), random(2, 5, 9), random(2, 7, 9), 0.5),
    "spd_inverse": lambda: (torch.eye(5) + random(3, 5, 1) * random(3, 5, 1).mT,),
    "per_sample_grad": lambda: (random(2, 5, 3), random(2, 5, 9)),
    "per_sample_norm_sq": lambda: (random(2, 5, 3), random(2, 5, 9), True),
    "per_sample_dot": lambda: (random(2, 5, 3), random(2, 5, 9), random(4, 3, 9)),
    "pairwise_dot": lambda: (random(2, 5, 3), random(2, 5, 9), random(4, 6, 3), random(4, 6, 9),
                             False),
    "schulz": lambda: (random(2, 5, 5), torch.ones(2), random(2, 3, 8), [2, 3, 9]),
    "gram_accumulate_ in fp64": lambda: (random(2, 5, 5).double(), random(2, 5, 9), None, 0.5),
    "gram_accumulate_ of one set": lambda: (random(2, 5, 5), random(2, 5, 9), None, 0.5),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_schema_fake_and_tracing_agree_with_the_kernel(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.hyperinf, op.split()[0]).default, OPS[op]())


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_every_argument_must_be_on_the_device_of_the_others(op: str) -> None:
    """A tensor without memory of its own beside one on the CPU would be read all the same."""
    function = getattr(torch.ops.hyperinf, op.split()[0])
    places = [i for i, arg in enumerate(OPS[op]()) if isinstance(arg, torch.Tensor)]
    if len(places) == 1:
        return  # nothing beside it
    for i in places:
        args = list(OPS[op]())
        args[i] = args[i].to("meta")
        with pytest.raises(RuntimeError, match="must be on the CPU|tensors on cpu and meta"):
            function(*args)


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op: str) -> None:
    # the inputs' dtypes decide, and sums are fp32 or wider
    function = getattr(torch.ops.hyperinf, op.split()[0])
    plain_args, cast_args = OPS[op](), OPS[op]()
    plain = function(*plain_args)
    with torch.autocast("cpu", torch.bfloat16):
        cast = function(*cast_args)
    torch.testing.assert_close(cast, plain, rtol=0, atol=0)
    torch.testing.assert_close(cast_args, plain_args, rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_compiled_graphs_take_the_op_whole(op: str) -> None:
    function = getattr(torch.ops.hyperinf, op.split()[0])
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    eager_args, graph_args = OPS[op](), OPS[op]()
    eager, graph = function(*eager_args), compiled(*graph_args)
    torch.testing.assert_close(graph, eager, rtol=0, atol=0)
    torch.testing.assert_close(graph_args, eager_args, rtol=0, atol=0)

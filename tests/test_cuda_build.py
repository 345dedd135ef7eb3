"""What the built binary holds, and how the build decides about CUDA: by nvcc, never by a device."""

from __future__ import annotations

import collections
import ctypes
import importlib
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from build_support import cuda
from hyperinf_kernels.ops import info, native
from tests.native_cases import needs_kernels

ROOT = Path(__file__).parents[1]
needs_cuda_kernels = pytest.mark.skipif(
    not native.cuda_archs(),
    reason=f"no CUDA kernels: {native.missing() or native.no_cuda()}",
)
OPS = ("per_sample_grad", "per_sample_norm_sq", "per_sample_dot", "gfim_accumulate_")
MODES = ("Scalar<float>", "Tf32", "Tensor<__nv_bfloat16>", "Tensor<__half>")
KINDS = {1: "compute", 2: "sm"}  # PTX and machine code in a fat binary
# the smallest of sm_80, sm_90 and sm_100 without asking for more
SHARED_BYTES = 48 << 10


def binary() -> Path:
    return Path(str(importlib.import_module("hyperinf_kernels._C").__file__))


# --- what the binary holds ----------------------------------------------------------------------


def fat_entries(data: bytes) -> collections.Counter[str]:
    """Architectures in the fat sections: {"sm_90": files of machine code, "compute_90": of PTX}."""
    found: collections.Counter[str] = collections.Counter()
    at = data.find(magic := struct.pack("<IHH", 0xBA55ED50, 1, 16))
    while at >= 0:
        end = at + 16 + struct.unpack_from("<Q", data, at + 8)[0]
        entry = at + 16
        while entry < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, entry)
            arch = struct.unpack_from("<I", data, entry + 28)[0]
            found[f"{KINDS[kind]}_{arch}"] += 1
            entry += header + size
        at = data.find(magic, end)
    return found


@needs_cuda_kernels
def test_the_fat_sections_hold_every_architecture() -> None:
    found = fat_entries(binary().read_bytes())
    assert set(found) == set(native.cuda_archs())
    files = len(list(ROOT.glob("csrc/cuda/*.cu")))
    assert set(found.values()) == {files}


def build_facts() -> dict[str, Any]:
    facts = native.build_info()
    if isinstance(facts, str):
        pytest.skip(facts)
    return facts


@needs_cuda_kernels
@pytest.mark.parametrize("arch", [a for a in native.cuda_archs() if a.startswith("sm_")])
def test_no_kernel_spills_and_shared_memory_fits(arch: str) -> None:
    kernels = [entry for entry in build_facts()["cuda_kernels"] if entry["arch"] == arch]
    names = [entry["kernel"] for entry in kernels]
    for mode in MODES:
        own = [name for name in names if mode in name]
        # four tiles for each of three reductions, the ghost norm, two sides of the GFIM
        assert len(own) == 15, own
    assert [entry for entry in kernels if entry["spill_bytes"]] == []
    assert [entry for entry in kernels if entry["shared_bytes"] > SHARED_BYTES] == []
    assert max(entry["registers"] for entry in kernels) <= 255


@needs_kernels
def test_the_binary_asks_torch_for_its_stable_interface_only() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm (apt-get install binutils)")
    listed = subprocess.run(
        [nm, "-DC", "--undefined-only", binary()], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()]
    foreign = re.compile(r"\b(at|c10|torch|caffe2)::|^(cuda|cu[A-Z])|torch")
    ours = re.compile(r"^(aoti_torch_|torch_)\w+$")
    assert [name for name in symbols if foreign.search(name) and not ours.match(name)] == []
    assert any(ours.match(name) for name in symbols)


@needs_cuda_kernels
def test_ops_are_registered_for_cuda_without_a_device() -> None:
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"hyperinf::{op}", "CUDA")


@needs_cuda_kernels
def test_the_stream_symbol_resolves_where_torch_has_streams() -> None:
    found = ctypes.CDLL(str(binary())).hyperinf_has_stream()
    assert found == (torch.version.cuda is not None)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fakes_give_the_shapes_of_cuda_results(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        delta, act = (torch.empty(3, 5, size, dtype=dtype, device="cuda") for size in (4, 7))
        V, C = torch.empty(2, 4, 7, device="cuda"), torch.empty(7, 7, device="cuda")
        results = [
            torch.ops.hyperinf.per_sample_grad(delta, act),
            torch.ops.hyperinf.per_sample_norm_sq(delta, act, True),
            torch.ops.hyperinf.per_sample_dot(delta, act, V),
        ]
        torch.ops.hyperinf.gfim_accumulate_(C, delta, act, 0.5)
    assert [tuple(result.shape) for result in results] == [(3, 4, 7), (3,), (3, 2)]
    assert {result.dtype for result in results} == {torch.float32}
    assert {result.device.type for result in results} == {"cuda"}


def test_info_tells_what_was_built_and_every_no_has_its_reason() -> None:
    facts, text = info.collect(), info.as_text()
    assert f"compiled CUDA kernels: {facts['cuda_kernels']}" in text
    for op in OPS:
        for answer in facts["ops"][op].values():
            assert answer == "yes" or len(answer) > len("no: ")
    if not torch.cuda.is_available():
        assert facts["ops"]["per_sample_grad"]["cuda"].startswith("no: ")
    for reason in {answer for op in facts["ops"].values() for answer in op.values()} - {"yes"}:
        assert reason.removeprefix("no: ") in text


# --- how the build decides ----------------------------------------------------------------------

KNOWN = {"75", "80", "86", "90", "100", "120"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("80", "90", "100")),
        ({"HYPERINF_CUDA_ARCHS": "90"}, ("90",)),
        ({"HYPERINF_CUDA_ARCHS": "9.0+PTX; 8.0"}, ("80", "90")),
        ({"HYPERINF_CUDA_ARCHS": "sm_86,120"}, ("86", "120")),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0+PTX"}, ("80", "90")),
        ({"HYPERINF_CUDA_ARCHS": "80", "TORCH_CUDA_ARCH_LIST": "9.0"}, ("80",)),
        ({"HYPERINF_CUDA_ARCHS": ""}, ("80", "90", "100")),
    ],
)
def test_architectures(environment: dict[str, str], expected: tuple[str, ...]) -> None:
    assert cuda.architectures(environment, KNOWN) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"HYPERINF_CUDA_ARCHS": "75"}, "HYPERINF_CUDA_ARCHS=75: .* for 80, 86, 90, 100, 120"),
        ({"HYPERINF_CUDA_ARCHS": "80;Hopper"}, "HYPERINF_CUDA_ARCHS=80;Hopper"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST=7.5"),
    ],
)
def test_architectures_that_cannot_be_built(environment: dict[str, str], message: str) -> None:
    with pytest.raises(cuda.CudaError, match=message):
        cuda.architectures(environment, KNOWN)


def test_an_nvcc_without_any_of_the_defaults_is_too_old() -> None:
    with pytest.raises(cuda.CudaError, match="a newer one is needed"):
        cuda.architectures({}, {"52", "75"})


FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
  --dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_90\\n' ;;
  *) echo "kernels.cu(1): error: out of registers" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """A toolkit that answers every question and compiles nothing."""
    nvcc = tmp_path / "toolkit/bin/nvcc"
    (tmp_path / "toolkit/lib64").mkdir(parents=True)
    (tmp_path / "toolkit/lib64/libcudart_static.a").touch()
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC.format(root=tmp_path / "toolkit"))
    nvcc.chmod(nvcc.stat().st_mode | stat.S_IXUSR)
    return nvcc


def test_nvcc_is_found_by_cuda_home_then_path(fake_nvcc: Path) -> None:
    for environment in ({"CUDA_HOME": str(fake_nvcc.parents[1])}, {"PATH": str(fake_nvcc.parent)}):
        found = cuda.find({"PATH": "", **environment})
        assert isinstance(found, cuda.Toolkit)
        assert found.root == fake_nvcc.parents[1]
        assert found.targets == ("sm_80", "sm_90", "compute_90")
        assert found.libraries()[0] == [str(fake_nvcc.parents[1] / "lib64")]
    command = found.command(Path("a.cu"), Path("a.o"), [])
    assert [flag for flag in command if "gencode" in flag] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_no_nvcc_is_a_reason_or_an_error_by_the_users_choice(tmp_path: Path) -> None:
    nowhere = {"PATH": str(tmp_path)}
    assert cuda.find(nowhere) == "no nvcc on PATH or in CUDA_HOME"
    assert cuda.find({**nowhere, "HYPERINF_CUDA": "0"}) == "HYPERINF_CUDA=0"
    with pytest.raises(cuda.CudaError, match="HYPERINF_CUDA=1, but no nvcc"):
        cuda.find({**nowhere, "HYPERINF_CUDA": "1"})
    with pytest.raises(cuda.CudaError, match="HYPERINF_CUDA=yes is not one of auto, 0, 1"):
        cuda.find({**nowhere, "HYPERINF_CUDA": "yes"})


def setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A whole build into `folder`, its CPU kernels without optimisation."""
    quick = folder / "quick-g++"
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    folders = ["--build-lib", str(folder), "--build-temp", str(folder / "temp")]
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders], cwd=ROOT, check=False,
        env={**os.environ, "HYPERINF_CPU": "auto", "CC": str(quick), "CXX": str(quick),
             **environment},
        capture_output=True, text=True,
    )  # fmt: skip


@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ (apt-get install g++)")
def test_an_nvcc_that_fails_leaves_cpu_kernels_and_one_line(
    fake_nvcc: Path, tmp_path: Path
) -> None:
    home = str(fake_nvcc.parents[1])
    done = setup(tmp_path, CUDA_HOME=home, HYPERINF_CUDA="auto", HYPERINF_CUDA_ARCHS="")
    lines = [line for line in done.stderr.splitlines() if line.startswith("hyperinf_kernels:")]
    assert len(lines) == 1, done.stderr
    assert "built with CPU kernels (portable" in lines[0]
    assert "no CUDA: nvcc failed: kernels.cu(1): error: out of registers" in lines[0]
    assert list(tmp_path.glob("hyperinf_kernels/_C.*"))


def test_cuda_asked_for_and_turned_off_at_once_is_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"], cwd=ROOT, check=False, capture_output=True,
        env={**os.environ, "HYPERINF_CPU": "0", "HYPERINF_CUDA": "1"}, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "HYPERINF_CUDA=1, but there is no extension: HYPERINF_CPU=0" in done.stderr


def test_ptxas_words_are_read() -> None:
    log = (
        "ptxas info    : Compiling entry function 'one' for 'sm_80'\n"
        "ptxas info    : Function properties for one\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem\n"
        "ptxas info    : Compiling entry function 'two' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers\n"
    )
    one, two = cuda.resources(log)
    assert one == {"kernel": "one", "arch": "sm_80", "registers": 40, "spill_bytes": 28,
                   "shared_bytes": 4096}  # fmt: skip
    assert (two["arch"], two["spill_bytes"], two["shared_bytes"]) == ("sm_90", 0, 0)

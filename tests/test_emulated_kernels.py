"""The CUDA kernels, executed from their own source on the CPU, against the fp64 oracle.

Every case runs with the threads in both orders, under AddressSanitizer and UBSan, and with numbers
of its own; the tensor-core path runs on an emulation of the warp matrix products.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import emulated
from tests.kernel_cases import CASES, MODES, Case, assert_exact

pytestmark = pytest.mark.skipif(emulated.UNAVAILABLE is not None, reason=str(emulated.UNAVAILABLE))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def _executed(program: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    emulated.run_all(program, CASES, tmp_path_factory.mktemp("cases"))


@pytest.mark.usefixtures("_executed")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_oracle_in_both_orders(case: Case) -> None:
    forward = case.out["forward"]
    assert np.array_equal(forward, case.out["reversed"]), "results depend on the order of threads"
    assert_exact(case, forward)


@pytest.mark.parametrize("mode", MODES)
def test_outputs_beyond_two_to_the_31_entries(program: Path, mode: str, tmp_path: Path) -> None:
    """The last block of two samples of 1 x (2^30 + 5): its offsets do not fit in 32 bits."""
    case = Case("far_output", mode, (0, 0, 0, 0))
    emulated.run_all(program, [case], tmp_path)
    for values in case.out.values():
        # the factor 3 of sample 1 times 1, 2, .. from the end; the first two of seven entries of
        # the last tile's left neighbour are not written
        assert values[:5].tolist() == [3.0, 6.0, 9.0, 12.0, 15.0]
        assert values[5:].tolist() == [0.0, 0.0]


# --- the emulator itself ------------------------------------------------------------------------

MAIN = """
int main(int, char** arguments) {
  emu::reversed = arguments[2][0] == 'r';
  std::vector<float> in(64), out(64);
  for (int k = 0; k < 64; ++k) in[k] = static_cast<float>(k);
  void (*const probes[])(const float*, float*) = {%s};
  emu::launch(1, 64, [&] { probes[std::atoi(arguments[1])](in.data(), out.data()); });
  for (int k = 0; k < 64; ++k) if (out[k] != in[63 - k]) return 2;
  return 0;
}
"""
SOUND = """__global__ void probe(const float* in, float* out) {
  struct S { float x[64]; };
  HYPERINF_SHARED(S, s);
  const int k = static_cast<int>(threadIdx.x);
  s.x[k] = in[k];
  __syncthreads();
  out[k] = s.x[63 - k];
}"""
ASYNC = SOUND.replace(
    "s.x[k] = in[k];",
    """
  if (k % 4 == 0) __pipeline_memcpy_async(s.x + k, in + k, 16);
  __pipeline_commit();
  __pipeline_wait_prior(0);""",
)
PROBES = {
    "sound": (SOUND, 0, ""),
    "sound copies": (ASYNC, 0, ""),
    "no barrier": (SOUND.replace("__syncthreads();", ""), 2, ""),
    "divergent barrier": (
        SOUND.replace("__syncthreads();", "if (k < 40) __syncthreads(); else __syncwarp();"),
        3, "threads wait at different barriers"),
    "copies not waited for": (ASYNC.replace("__pipeline_wait_prior(0);", ""), 2, ""),
    "copies waited for too late": (ASYNC.replace("wait_prior(0)", "wait_prior(1)"), 2, ""),
    "unaligned copy": (
        ASYNC.replace("in + k, 16", "in + k + 1, 16"), 3, "asynchronous copy is not aligned"),
    "shared overrun": (SOUND.replace("s.x[63 - k]", "s.x[127 - k]"), 1, "heap-buffer-overflow"),
    "global overrun": (SOUND.replace("in[k];", "in[k + 1];"), 1, "heap-buffer-overflow"),
    "int32 offset": (
        SOUND.replace("s.x[k] = in[k];", "s.x[k] = in[k]; int far = 7864320; far *= k + 300;"
                      " if (far == 1) out[0] = 1;"), 1, "signed integer overflow"),
}  # fmt: skip


@pytest.fixture(scope="module")
def probes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One program of all probes, each in a namespace of its own."""
    folder = tmp_path_factory.mktemp("probes")
    kernels = [f"namespace p{k} {{ {PROBES[name][0]} }}" for k, name in enumerate(PROBES)]
    names = ", ".join(f"p{k}::probe" for k in range(len(PROBES)))
    headers = '#include "hyperinf/device.cuh"\n#include <vector>\n'
    source = folder / "probes.cpp"
    source.write_text(headers + "\n".join(kernels) + MAIN % names)
    command = [str(emulated.COMPILER), *emulated.FLAGS, "-Wno-array-bounds"]
    emulated.compile_all([[*command, str(source), "-o", str(folder / "probes")]])
    return folder / "probes"


@pytest.mark.parametrize("name", PROBES)
def test_the_emulator_sees_what_is_wrong_with_a_kernel(probes: Path, name: str) -> None:
    _, code, message = PROBES[name]
    number = str(list(PROBES).index(name))
    done = [
        subprocess.run([probes, number, order], capture_output=True, text=True, check=False)
        for order in ("forward", "reversed")
    ]
    assert max(d.returncode for d in done) == code, done
    assert message in "".join(d.stderr for d in done)

"""The CUDA kernels, executed from their own source on the CPU, against the fp64 oracle.

Every case runs with the threads in both orders, under AddressSanitizer and UBSan, and with numbers
of its own; the tensor-core path runs on an emulation of the warp matrix products.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import emulated, oracle
from tests.emulated import MODES, Case

pytestmark = pytest.mark.skipif(emulated.UNAVAILABLE is not None, reason=str(emulated.UNAVAILABLE))
# largest error <= K x largest error of torch's fp32 product of the same numbers, plus roundings
K = 4.0
FLOOR = 16 * float(np.finfo(np.float32).eps)
TF32 = 2.0**-10  # relative rounding of both factors together, at most

# each tile's own size, one more, ragged, one token, one row; LoRA ranks on either side
SHAPES = [(2, 1, 1, 1), (3, 5, 1, 130), (2, 33, 8, 129), (2, 17, 16, 128), (2, 40, 131, 4),
          (1, 35, 20, 70), (2, 3, 64, 64), (1, 18, 129, 136)]  # fmt: skip
BOTH, WHOLE = ("fp32", "bf16"), tuple(MODES)
CASES = [
    *(Case("grad", mode, shape) for shape in SHAPES for mode in BOTH),
    *(Case("norm", mode, shape) for shape in SHAPES for mode in BOTH),
    *(Case("norm", mode, shape, ghost=True) for shape in [(2, 1, 1, 1), (2, 65, 9, 33),
                                                          (1, 130, 3, 70)] for mode in WHOLE),
    *(Case("dot", mode, shape, count=m) for shape, m in [((2, 9, 8, 130), 1), ((1, 5, 65, 66), 5),
                                                         ((2, 1, 1, 1), 4)] for mode in BOTH),
    *(Case("gfim", mode, shape) for shape in [(1, 1, 1, 1), (3, 5, 8, 33), (2, 7, 17, 130)]
      for mode in WHOLE),
    Case("gfim", "fp32", (300, 1, 2, 3), alpha=-2.0),
    Case("gfim", "fp32", (2, 3, 4, 65), alpha=1e30),
    *(Case(op, mode, (2, 19, 24, 40), count=2) for op in ("grad", "norm", "dot")
      for mode in WHOLE[1:]),
    *(Case(op, mode, (2, 6, 20, 23), layout, count=2) for layout in emulated.LAYOUTS[1:]
      for op in ("grad", "norm", "gfim") for mode in BOTH),
    *(Case("norm", mode, (2, 6, 20, 23), layout, ghost=True)
      for layout in emulated.LAYOUTS[1:] for mode in BOTH),
    Case("grad", "fp32", (3, 0, 4, 5)), Case("norm", "bf16", (3, 0, 4, 5)),
    Case("norm", "fp32", (3, 0, 4, 5), ghost=True), Case("gfim", "fp32", (3, 0, 4, 5)),
]  # fmt: skip


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def _executed(program: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    emulated.run_all(program, CASES, tmp_path_factory.mktemp("cases"))


def expected(case: Case) -> tuple[oracle.Array, oracle.Array, float]:
    """The oracle's result, torch's fp32 result, and the size of what was summed."""
    delta, act, other = case.numbers()
    grads = oracle.per_sample_grad(delta, act)
    peer = delta.float().mT @ act.float()
    sizes = oracle.per_sample_grad(delta.abs(), act.abs())
    if case.op == "grad":
        return grads, oracle.f64(peer), float(sizes.max(initial=0))
    if case.op == "norm":
        of_sizes = float(oracle.per_sample_norm_sq(delta.abs(), act.abs()).max(initial=0))
        return (oracle.per_sample_norm_sq(delta, act), oracle.f64(peer.square().sum((-2, -1))),
                of_sizes)  # fmt: skip
    if case.op == "dot":
        dots = peer.flatten(1) @ other.flatten(1).T
        of_sizes = float(oracle.per_sample_dot(delta.abs(), act.abs(), other.abs()).max(initial=0))
        return oracle.per_sample_dot(delta, act, other), oracle.f64(dots), of_sizes
    total = oracle.f64(other) + case.alpha * oracle.gfim_sum(grads)
    of_sizes = np.abs(oracle.f64(other)) + abs(case.alpha) * oracle.gfim_sum(sizes)
    rows = peer.flatten(0, 1)
    return total, oracle.f64(other.add(rows.T @ rows, alpha=case.alpha)), float(of_sizes.max())


@pytest.mark.usefixtures("_executed")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_oracle_in_both_orders(case: Case) -> None:
    truth, peer, size = expected(case)
    assert np.array_equal(case.out["forward"], case.out["reversed"]), "threads depend on order"
    bound = K * np.abs(peer - truth).max(initial=0) + FLOOR * size
    if case.mode == "tf32":
        bound += 4 * TF32 * size
    error = np.abs(case.out["forward"].reshape(truth.shape) - truth).max(initial=0)
    assert error <= bound


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

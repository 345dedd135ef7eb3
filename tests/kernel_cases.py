"""The cases of the CUDA kernels: run by the emulator everywhere, and on a device where one is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from tests import oracle
from tests.oracle import Array

# the order of the table in run.cpp; each mode is (function, C++ type, dtype of the factors)
MODES = {
    "fp32": ("run_scalar_float", "Scalar<float>", torch.float32),
    "tf32": ("run_tf32", "Tf32", torch.float32),
    "bf16": ("run_tensor_bf16", "Tensor<__nv_bfloat16>", torch.bfloat16),
    "fp16": ("run_tensor_half", "Tensor<__half>", torch.float16),
    "bf16 scalar": ("run_scalar_bf16", "Scalar<__nv_bfloat16>", torch.bfloat16),
}
OPS = ("grad", "norm", "dot", "gfim", "far_output")
LAYOUTS = ("plain", "shifted", "transposed", "padded", "far samples", "far tokens")


@dataclass(frozen=True)
class Case:
    """One call of a launcher; the numbers follow from the sizes and the name of the mode."""

    op: str
    mode: str
    sizes: tuple[int, int, int, int]  # samples, tokens, rows, columns
    layout: str = "plain"
    count: int = 0
    ghost: bool = False
    alpha: float = 0.5
    out: dict[str, Array] = field(default_factory=dict, compare=False)  # by order of the threads

    def __str__(self) -> str:
        shape = "x".join(map(str, self.sizes))
        ghost = " ghost" if self.ghost else ""
        many = f" m={self.count}" if self.op == "dot" else ""
        return f"{self.op}{ghost}{many} {self.mode} {shape} {self.layout}"

    def numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """delta, act in the mode's dtype, and V of dots or C of GFIM in fp32; new in every case."""
        batch, tokens, rows, cols = self.sizes
        generator = torch.Generator().manual_seed(sum(map(ord, str(self))))

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        dtype = MODES[self.mode][2]
        delta, act = random(batch, tokens, rows), random(batch, tokens, cols)
        other = random(cols, cols) if self.op == "gfim" else random(self.count, rows, cols)
        return delta.to(dtype), act.to(dtype), other

    def packed(self) -> bytes:
        header = (list(MODES).index(self.mode), OPS.index(self.op), LAYOUTS.index(self.layout),
                  *self.sizes, self.count, self.ghost)  # fmt: skip
        parts = [np.array(header, dtype=np.int64).tobytes(), np.float64(self.alpha).tobytes()]
        for tensor in self.numbers():
            parts.append(np.int64(tensor.numel()).tobytes())
            parts.append(tensor.float().numpy().tobytes())
        return b"".join(parts)


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
    # one strip, so tiles add to C at once; many runs of strips, summed in their order
    *(Case("gfim", mode, (1, 9, 12, 140)) for mode in BOTH),
    Case("gfim", "fp32", (300, 1, 2, 3), alpha=-2.0),
    Case("gfim", "fp32", (2, 3, 4, 65), alpha=1e30),
    *(Case(op, mode, (2, 19, 24, 40), count=2) for op in ("grad", "norm", "dot")
      for mode in WHOLE[1:]),
    *(Case(op, mode, (2, 6, 20, 23), layout, count=2) for layout in LAYOUTS[1:]
      for op in ("grad", "norm", "gfim") for mode in BOTH),
    *(Case("norm", mode, (2, 6, 20, 23), layout, ghost=True)
      for layout in LAYOUTS[1:] for mode in BOTH),
    Case("grad", "fp32", (3, 0, 4, 5)), Case("norm", "bf16", (3, 0, 4, 5)),
    Case("norm", "fp32", (3, 0, 4, 5), ghost=True), Case("gfim", "fp32", (3, 0, 4, 5)),
]  # fmt: skip


def expected(case: Case) -> tuple[Array, Array, float]:
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


def assert_exact(case: Case, actual: Array) -> None:
    """Within K x the error of torch's fp32 product of the same numbers, and roundings."""
    truth, peer, size = expected(case)
    bound = K * np.abs(peer - truth).max(initial=0) + FLOOR * size
    if case.mode == "tf32":
        bound += 4 * TF32 * size
    assert np.abs(actual.reshape(truth.shape) - truth).max(initial=0) <= bound

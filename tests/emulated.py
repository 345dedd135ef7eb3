"""Builds the emulated CUDA kernels with g++ and sanitizers, and runs cases through them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from tests.oracle import Array

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")
UNAVAILABLE = None if COMPILER else "emulated kernels need g++ 12 or later (apt-get install g++)"
FLAGS = [
    "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    f"-I{ROOT / 'csrc/emulator'}", f"-I{ROOT / 'csrc/include'}",
]  # fmt: skip
# the order of the table in run.cpp; each mode is (function, C++ type, dtype of the factors)
MODES = {
    "fp32": ("run_scalar_float", "Scalar<float>", torch.float32),
    "tf32": ("run_tf32", "Tf32", torch.float32),
    "bf16": ("run_tensor_bf16", "Tensor<__nv_bfloat16>", torch.bfloat16),
    "fp16": ("run_tensor_half", "Tensor<__half>", torch.float16),
    "bf16 scalar": ("run_scalar_bf16", "Scalar<__nv_bfloat16>", torch.bfloat16),
    "fp16 scalar": ("run_scalar_half", "Scalar<__half>", torch.float16),
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


def compile_all(commands: Sequence[Sequence[str]]) -> None:
    def compile_one(command: Sequence[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, commands))


def build(folder: Path) -> Path:
    """The runner of all modes: one object per mode, compiled side by side."""
    source = ROOT / "tests/emulator"
    objects = [folder / f"{name}.o" for name, _, _ in MODES.values()]
    commands = [
        [str(COMPILER), *FLAGS, f"-DRUN={name}", f"-DMODE={mode}", "-c",
         str(source / "kernels.cpp"), "-o", str(out)]
        for (name, mode, _), out in zip(MODES.values(), objects, strict=True)
    ]  # fmt: skip
    main = folder / "run.o"
    commands.append([str(COMPILER), *FLAGS, "-c", str(source / "run.cpp"), "-o", str(main)])
    compile_all(commands)
    program = folder / "run"
    compile_all([[str(COMPILER), *FLAGS, str(main), *map(str, objects), "-o", str(program)]])
    return program


def run_all(program: Path, cases: Sequence[Case], folder: Path) -> None:
    """Fill every case's `out`, with the threads in both orders; a sanitizer's report raises."""
    given = folder / "cases"
    given.write_bytes(b"".join(case.packed() for case in cases))

    def run(order: str) -> bytes:
        results = folder / order
        done = subprocess.run(
            [program, given, results, order], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            finished = results.stat().st_size if results.exists() else 0
            raise RuntimeError(f"{order}, after {finished} bytes: {done.stderr[-4000:]}")
        return results.read_bytes()

    orders = ("forward", "reversed")
    with ThreadPoolExecutor(2) as pool:
        for order, data in zip(orders, pool.map(run, orders), strict=True):
            at = 0
            for case in cases:
                count = int(np.frombuffer(data, np.int64, 1, at)[0])
                case.out[order] = np.frombuffer(data, np.float32, count, at + 8).astype(np.float64)
                at += 8 + 4 * count

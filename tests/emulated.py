"""Builds the emulated CUDA kernels with g++ and sanitizers, and runs cases through them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from tests.kernel_cases import MODES, Case

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")
UNAVAILABLE = None if COMPILER else "emulated kernels need g++ 12 or later (apt-get install g++)"
FLAGS = [
    "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
    f"-I{ROOT / 'csrc/emulator'}", f"-I{ROOT / 'csrc/include'}",
]  # fmt: skip


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

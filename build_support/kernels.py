"""The build step: CPU kernels once per instruction set, CUDA kernels where nvcc is, one binary."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from . import cuda, say

ROOT = Path(__file__).parents[1]
# the stable ABI of torch 2.10: one binary serves every later torch
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030B0000"]
FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
# contraction to fused multiply-add is wanted, -ffast-math is not: NaN has to stay NaN
KERNEL_FLAGS = [*FLAGS, "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-DHYPERINF_LANES=16", *AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
          "-mprefer-vector-width=512"]  # fmt: skip
ISAS = {
    "portable": ["-DHYPERINF_LANES=4"],
    "avx2": ["-DHYPERINF_LANES=8", *AVX2],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16", "-DHYPERINF_BF16_DOT"],
}
if platform.machine().lower() not in ("x86_64", "amd64"):
    ISAS = {"portable": ISAS["portable"]}
# compiled last, when it is known which CUDA kernels there are
SCHEMAS = "csrc/ops.cpp"
Job = TypeVar("Job")
Result = TypeVar("Result")


def absent() -> str | None:
    """Why the extension cannot be built here at all, or None."""
    if os.environ.get("HYPERINF_CPU", "auto") == "0":
        return "HYPERINF_CPU=0"
    if os.name == "nt":
        return "the kernels need GCC or Clang"
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build (pip install --no-build-isolation)"
    import torch

    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < (2, 10):
        return f"torch {torch.__version__} has no stable ABI (2.10 or later needed)"
    return None


def without(reason: str) -> None:
    """Go on as pure Python, unless CUDA kernels were asked for by name."""
    if os.environ.get("HYPERINF_CUDA") == "1":
        say(f"HYPERINF_CUDA=1, but there is no extension: {reason}")
        sys.exit(1)
    say(f"built as pure Python: {reason}")


def extensions() -> list[Extension]:
    """_C with the kernels, and _build, which says how it was made; none when pure Python."""
    reason = absent()
    if reason:
        without(reason)
        return []
    from torch.utils import cpp_extension

    files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file())
    kernels = Extension(
        "hyperinf_kernels._C",
        sources=[f for f in files if f.startswith("csrc/cpu/") and f.endswith(".cpp")] + [SCHEMAS],
        depends=files,
        include_dirs=["csrc/include", "csrc"],
        # system headers: their warnings are not ours
        extra_compile_args=[f"-isystem{path}" for path in cpp_extension.include_paths()],
        library_dirs=cpp_extension.library_paths(),
        libraries=["torch_cpu"],
        language="c++",
        py_limited_api=True,
        optional=True,
    )
    found = [kernels]
    if importlib.util.find_spec("pybind11"):
        import pybind11

        found.append(
            Extension(
                "hyperinf_kernels._build",
                sources=["csrc/build_info.cpp"],
                include_dirs=[pybind11.get_include()],
                extra_compile_args=["-std=c++20", "-g0", "-fvisibility=hidden"],
                language="c++",
                optional=True,
            )
        )
    return found


class BuildKernels(build_ext):
    """Compiles several files at a time and says in one line what came of it."""

    facts: dict[str, Any] | None = None
    resources: list[dict[str, str | int]]

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "hyperinf_kernels._build":
            if self.facts is None:  # the kernels failed, so there is nothing to tell of
                return None
            # as a C string literal that holds JSON
            header = Path(self.build_temp) / "build_facts.h"
            header.write_text(json.dumps(json.dumps(self.facts)))
            ext.include_dirs.append(self.build_temp)
            self.force = True  # the facts can change while the source does not
            return super().build_extension(ext)
        try:
            self._build_kernels(ext)
        except cuda.CudaError as error:
            say(str(error))
            sys.exit(1)
        except Exception as error:
            without(f"compiling the CPU kernels failed: {error}")
            raise

    def _build_kernels(self, ext: Extension) -> None:
        toolkit = cuda.find(os.environ)
        self.resources = []
        folder = Path(self.build_temp)
        jobs = []
        for source in ext.sources[:-1]:
            once = not source.startswith("csrc/cpu/isa/")
            for isa, flags in [("", [])] if once else ISAS.items():
                own = FLAGS + TORCH_FLAGS if once else [*KERNEL_FLAGS, f"-DHYPERINF_ISA={isa}"]
                jobs.append((source, folder / isa, [*own, *flags]))
        objects = _side_by_side(lambda job: self._compile(ext, *job)[0], jobs)
        targets: tuple[str, ...] = ()
        if isinstance(toolkit, cuda.Toolkit):
            try:
                objects += self._compile_cuda(ext, toolkit)
                targets = toolkit.targets
            except cuda.CudaError as error:
                if os.environ.get("HYPERINF_CUDA") == "1":
                    raise
                toolkit = f"nvcc failed: {error}"
        archs = [f'-DHYPERINF_CUDA_ARCHS="{",".join(targets)}"']
        objects += self._compile(ext, SCHEMAS, folder, FLAGS + TORCH_FLAGS + archs)
        ext.sources, ext.extra_objects, ext.depends = [], objects, objects
        super().build_extension(ext)
        self.facts = self._facts(toolkit)
        cuda_line = f"CUDA kernels ({', '.join(targets)})" if targets else f"no CUDA: {toolkit}"
        details = "" if importlib.util.find_spec("pybind11") else "; no build_info: no pybind11"
        say(f"built with CPU kernels ({', '.join(ISAS)}), {cuda_line}{details}")

    def _compile(self, ext: Extension, source: str, folder: Path, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source], output_dir=str(folder), include_dirs=[*self.include_dirs, *ext.include_dirs],
            extra_postargs=[*flags, *ext.extra_compile_args], depends=ext.depends,
        )  # fmt: skip

    def _compile_cuda(self, ext: Extension, toolkit: cuda.Toolkit) -> list[str]:
        from torch.utils import cpp_extension

        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        directories, libraries = toolkit.libraries()
        flags = [f"-I{ROOT / path}" for path in ext.include_dirs]
        flags.append(TORCH_FLAGS[0])
        for path in cpp_extension.include_paths():
            flags += ["-isystem", path]
        jobs = [
            (source, folder / f"{source.stem}.o") for source in sorted(ROOT.glob("csrc/cuda/*.cu"))
        ]
        told = _side_by_side(lambda job: cuda.compile_one(toolkit.command(*job, flags)), jobs)
        self.resources = [kernel for kernels in told for kernel in kernels]
        ext.library_dirs += directories
        ext.libraries += libraries
        return [str(target) for _, target in jobs]

    def _facts(self, toolkit: cuda.Toolkit | str) -> dict[str, Any]:
        import torch

        found = isinstance(toolkit, cuda.Toolkit)
        return {
            "torch": torch.__version__,
            "torch_target": "2.10",
            "python": platform.python_version(),
            "flags": KERNEL_FLAGS,
            "isas": list(ISAS),
            "nvcc": toolkit.version if found else None,
            "nvcc_flags": cuda.FLAGS if found else [],
            "cuda_archs": list(toolkit.targets) if found else [],
            "cuda_kernels": self.resources,
            "no_cuda": None if found else toolkit,
        }


def _side_by_side(run: Callable[[Job], Result], jobs: Iterable[Job]) -> list[Result]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run, jobs))

"""Builds hyperinf_kernels._C, the compiled CPU kernels, where a compiler and torch >= 2.10 are.

Everything else is in pyproject.toml. The extension is optional: without it the package is pure
Python and every op runs in plain torch. One summary line on stderr says which of the two it is.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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
X86 = platform.machine().lower() in ("x86_64", "amd64")


def say(text: str) -> None:
    print(f"hyperinf_kernels: {text}", file=sys.stderr, flush=True)


def absent() -> str | None:
    """Why the extension cannot be built here at all, or None."""
    if os.environ.get("HYPERINF_CPU", "auto") == "0":
        return "HYPERINF_CPU=0"
    if os.name == "nt":
        return "the kernels need GCC or Clang"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build (pip install --no-build-isolation)"
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < (2, 10):
        return f"torch {torch.__version__} has no stable ABI (2.10 or later needed)"
    return None


class BuildKernels(build_ext):
    """Compiles the kernels once per instruction set, the bindings once, several files at a time."""

    def build_extension(self, ext: Extension) -> None:
        try:
            jobs = [
                (source, Path(self.build_temp) / isa, [*KERNEL_FLAGS, f"-DHYPERINF_ISA={isa}",
                                                       *flags])
                for isa, flags in ISAS.items()
                if isa == "portable" or X86
                for source in ext.depends
                if source.startswith("csrc/cpu/isa/")
            ]  # fmt: skip
            jobs += [(source, Path(self.build_temp), FLAGS + TORCH_FLAGS) for source in ext.sources]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda job: self._compile(ext, *job), jobs))
            ext.sources, ext.extra_objects = [], [name for names in objects for name in names]
            ext.depends = ext.extra_objects
            super().build_extension(ext)
            say(f"built with CPU kernels ({', '.join(ISAS if X86 else ['portable'])})")
        except Exception as error:
            say(f"built as pure Python, compiling the CPU kernels failed: {error}")
            raise

    def _compile(self, ext: Extension, source: str, folder: Path, flags: list[str]) -> list[str]:
        return self.compiler.compile(
            [source], output_dir=str(folder), include_dirs=[*self.include_dirs, *ext.include_dirs],
            extra_postargs=[*flags, *ext.extra_compile_args], depends=ext.depends,
        )  # fmt: skip


def extensions() -> list[Extension]:
    reason = absent()
    if reason:
        say(f"built as pure Python: {reason}")
        return []
    from torch.utils import cpp_extension

    here = Path(__file__).parent
    files = sorted(str(p.relative_to(here)) for p in here.glob("csrc/**/*") if p.is_file())
    kernels = [f for f in files if f.startswith("csrc/cpu/isa/") or f.endswith(".h")]
    return [
        Extension(
            "hyperinf_kernels._C",
            sources=[f for f in files if f.endswith(".cpp") and f not in kernels],
            depends=kernels,
            include_dirs=["csrc/include", "csrc"],
            # system headers: their warnings are not ours
            extra_compile_args=[f"-isystem{path}" for path in cpp_extension.include_paths()],
            library_dirs=cpp_extension.library_paths(),
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ]


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {},
)

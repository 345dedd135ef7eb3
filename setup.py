"""Builds hyperinf_kernels._C, the compiled kernels, where a compiler and torch >= 2.10 are.

Everything else is in pyproject.toml. The extension is optional: without it the package is pure
Python and every op runs in plain torch. CUDA kernels join the CPU's in the same binary where nvcc
is found; docs/cuda.md lists the settings. One line on stderr says what was built.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))

from build_support.kernels import BuildKernels, extensions

modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules else {},
)

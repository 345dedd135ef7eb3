"""The GPU cases in Triton's interpreter, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is decorated, and cannot compile in such a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.triton_cases import INTERPRETING, TRITON

FILES = {
    "tests/test_triton_schulz.py": 60,
    "tests/test_triton_sums.py": 145,
    "tests/test_triton_traffic.py": 28,
}


@pytest.mark.skipif(not TRITON, reason="triton is not installed: pip install triton")
@pytest.mark.skipif(INTERPRETING, reason="this process interprets already: run FILES in it")
@pytest.mark.parametrize("file", FILES)
def test_cases_pass_in_the_interpreter(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= FILES[file], done.stdout[-500:]
    assert "skipped" not in done.stdout

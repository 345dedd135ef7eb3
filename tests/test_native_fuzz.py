"""Hostile arguments end in numbers or in an error that names the argument, never in a crash."""

from __future__ import annotations

import pytest

from tests.fuzz_native import OPS, run
from tests.native_cases import needs_kernels

CASES = 150  # per op and here; `python -m tests.fuzz_native` runs 10,000


@needs_kernels
@pytest.mark.parametrize("op", OPS)
def test_hostile_calls(op: str) -> None:
    outcomes = {run(op, seed) for seed in range(CASES)}
    # both happen, so the cases are neither all broken nor all harmless
    assert outcomes == {"computed", "refused"}

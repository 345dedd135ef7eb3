"""One thread per test process, no network, and a fixed seed before every test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from hyperinf_kernels.ops import native

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=native.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every compiled instruction set that this processor runs, whatever the environment asks."""
    monkeypatch.setenv("HYPERINF_BACKEND", "auto")
    monkeypatch.setenv("HYPERINF_CPU_ISA", request.param)
    return str(request.param)

"""Every example runs as a newcomer runs it, where its host is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
HOST = {
    "ifengine": "torch",
    "dattri_datainf": "dattri",
    "dattri_llm_store": "dattri_llm",
    "pydvl_datainf": "pydvl",
    "bergson_hessian": "bergson",
    "kronfluence_factors": "kronfluence",
    "captum_influence": "captum",
    "quanda_explainer": "quanda",
    "opacus_gradients": "opacus",
    "trak_scores": "trak",
    "less_files": "torch",
    "transformers_trainer": "peft",
    "trl_sft": "trl",
}


def test_every_example_is_run() -> None:
    assert set(HOST) == {path.stem for path in EXAMPLES.glob("*.py")} - {"data"}


@pytest.mark.parametrize("name", HOST)
def test_example(name: str) -> None:
    if importlib.util.find_spec(HOST[name]) is None:
        pytest.skip(f"{HOST[name]} is missing: run `make test-integrations`")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, f"{name}.py"], cwd=EXAMPLES, env=environment, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert any(word in ran.stdout for word in ("most helpful", "selected", "detection"))

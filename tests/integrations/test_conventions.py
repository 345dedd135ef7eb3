"""The conventions of all hosts: conversions, layouts, the table in the docs, missing libraries."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from hyperinf_kernels import AbsoluteDamping, DataInfDamping, InputError
from hyperinf_kernels.integrations import imports
from hyperinf_kernels.integrations.conventions import HOSTS, own_loss, table
from hyperinf_kernels.integrations.layout import Layout

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("host", HOSTS)
def test_scores_go_to_the_host_and_back(host: str) -> None:
    ours = torch.randn(3, 7)
    convention = HOSTS[host]
    theirs = convention.scores(ours, n=5)
    if convention.layout == "train_only":
        assert torch.equal(theirs, ours.mean(0))
        return
    torch.testing.assert_close(convention.influence(theirs, n=5), ours)
    helps = theirs if convention.positive == "helps" else -theirs
    best = helps.argmax(0) if convention.layout == "train_major" else helps.argmax(1)
    assert torch.equal(best, ours.argmin(1))


def test_a_sum_over_samples_is_n_times_the_mean() -> None:
    captum = HOSTS["captum"]
    assert captum.our_damping(0.5, 10) == AbsoluteDamping(0.05)
    assert captum.our_damping(DataInfDamping(0.1), 10) == DataInfDamping(0.1)
    assert HOSTS["dattri"].our_damping(0.5, 10) == AbsoluteDamping(0.5)
    assert captum.scores(torch.tensor([[-4.0]]), 8).item() == 0.5
    with pytest.raises(InputError, match="two dimensions"):
        captum.scores(torch.zeros(3), 8)


def test_a_mean_loss_is_undone_only_when_said() -> None:
    grads = {"w": torch.ones(4, 2, 3)}
    assert own_loss(grads, "sum") is grads
    assert float(own_loss(grads, "mean")["w"].mean()) == 4
    assert float(own_loss(grads, "mean", batch_size=16)["w"].mean()) == 16
    with pytest.raises(ValueError, match="reduction"):
        own_loss(grads, "guess")


def test_layouts_split_and_join_without_loss() -> None:
    layout = Layout(
        {"conv.weight": (4, 3, 2, 2), "a.lora_A.x.weight": (2, 5), "a.lora_B.x.weight": (6, 2),
         "bias": (3,)}
    )  # fmt: skip
    flat = torch.randn(7, layout.width)
    blocks = layout.split(flat)
    shapes = {name: tuple(block.shape[1:]) for name, block in blocks.items()}
    assert shapes == {"conv.weight": (4, 12), "a.lora_A.x.weight": (2, 5),
                      "a.lora_B.x.weight": (2, 6), "bias": (1, 3)}  # fmt: skip
    assert torch.equal(layout.join(blocks), flat)
    with pytest.raises(InputError, match=str(layout.width)):
        layout.split(flat[:, 1:])


def test_the_docs_hold_the_table_of_all_hosts() -> None:
    assert table() in (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("dattri", "dattri", "dattri"), ("dattri_llm", "dattri_llm", "dattri-llm"),
     ("pydvl", "pydvl", "pydvl"), ("bergson", "bergson", "bergson"),
     ("kronfluence", "kronfluence", "kronfluence"), ("captum", "captum", "captum"),
     ("quanda", "quanda", "quanda"), ("opacus", "opacus", "opacus"), ("trak", "trak", "trak")],
)  # fmt: skip
def test_a_missing_host_is_one_line_that_names_the_extra(
    module: str, package: str, extra: str
) -> None:
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == {package!r} else real(name, *a)
import hyperinf_kernels.integrations.{module}
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    said = f"{package} is not installed: pip install 'hyperinf_kernels[{extra}]'"
    assert ran.stderr.strip().splitlines()[-1] == f"ImportError: {said}"


def test_a_host_of_another_series_is_one_line_that_names_the_tested_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imports.importlib.util, "find_spec", lambda name: object())
    for package, (distribution, series) in imports.TESTED.items():
        for version, told in ((f"{series[-1]}.7", False), (f"{series[-1]}9.0", True)):
            monkeypatch.setattr(imports.metadata, "version", lambda name, v=version: v)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                imports.require(package, package)
            assert bool(found) == told
            if told:
                assert f"{distribution} {version} was not tested" in str(found[0].message)


def test_no_adapter_is_imported_by_the_package() -> None:
    code = "import sys, hyperinf_kernels as hk; hk.influence; hk.Attributor; hk.HyperINF\n"
    code += "sys.exit(any('integrations' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
    assert importlib.util.find_spec("hyperinf_kernels.integrations.conventions") is not None

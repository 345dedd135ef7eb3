"""The convergence simulation, the calibrated rates, and the two commands that show them."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels import cli
from hyperinf_kernels.experiments import convergence
from hyperinf_kernels.ops import calibration, costs
from tests import oracle

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def hyperinf(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hyperinf", *words])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --- the simulation ------------------------------------------------------------------------------


def test_the_published_floor_is_reached_in_at_most_14_products() -> None:
    cell = convergence.simulate(200, 512)
    found = convergence.summary(cell)
    assert found["products_released"] == 50
    assert found["products_ours"] <= 14
    assert found["floor"] == pytest.approx(found["published_floor"], rel=0.5)
    assert found["relative_chain"] <= 2 * found["relative_cholesky"]
    assert found["relative_certified"] <= 2 * found["relative_cholesky"]
    assert found["relative_refined"] <= 1e-6
    # the curves of the others stay where the paper shows them
    assert found["lissa"] == pytest.approx(found["published_lissa"], rel=0.02)
    assert 0.5 < found["relative_datainf"] < 1.2


def test_every_curve_is_what_its_formula_gives() -> None:
    """On a cell small enough for explicit fp64 algebra, before rounding matters."""
    samples, d = 30, 40
    cell = convergence.simulate(samples, d, seed=3, iterations=20)
    generator = torch.Generator().manual_seed(3)
    T = oracle.f64(torch.randn(samples, d, generator=generator))
    v = oracle.f64(torch.randn(1, d, generator=generator))
    A = T.T @ T / samples + 0.01 * np.eye(d)
    truth = np.linalg.solve(A, v.T).T
    assert cell.norm == pytest.approx(np.linalg.norm(truth), rel=1e-4)
    mu = np.linalg.eigvalsh(A)
    assert mu[-1] / mu[0] <= cell.condition_bound * 1.01

    released = cell.curve(convergence.RELEASED)
    assert released.products == tuple(range(2, 42, 2))
    for step in (1, 10, 18):
        X = oracle.paper_inverse_by_filter(A, step, 5e-5)
        expected = np.linalg.norm(v @ X - truth)
        assert released.errors[step - 1] == pytest.approx(expected, rel=1e-3)
    lissa, r = cell.curve(convergence.LISSA), v
    scale = np.linalg.norm(A) + 1
    for k in range(20):
        r = v + r - r @ A / scale
        assert lissa.errors[k] == pytest.approx(np.linalg.norm(r / scale - truth), rel=1e-3)
    datainf = oracle.datainf(v, T, 0.01)
    error = cell.curve(convergence.DATAINF).errors[0]
    assert error == pytest.approx(np.linalg.norm(datainf - truth), rel=1e-3)
    plain = cell.curve(convergence.PLAIN)
    assert plain.products[:3] == (0, 2, 4)
    chain = cell.curve(convergence.OURS)
    assert list(chain.products) == sorted(chain.products)
    assert chain.errors[-1] < 1e-3 * chain.errors[0]


@pytest.mark.parametrize("kappa", [1e2, 1e4, 1e6], ids="kappa={:g}".format)
def test_refinement_reaches_1e_6_up_to_condition_1e6(kappa: float) -> None:
    A = torch.from_numpy(oracle.spd(np.geomspace(1 / kappa, 1, 256), 0)).float()
    v = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    W, info = hk.schulz_solve(A, v, return_info=True)
    truth = oracle.solve(A, v)
    assert np.linalg.norm(oracle.f64(W) - truth) <= 1e-6 * np.linalg.norm(truth)
    assert info.fallback is None


def test_reaching_is_the_first_point_at_the_level() -> None:
    curve = convergence.Curve("x", (2, 4, 6), (3.0, 0.5, 0.7))
    assert [curve.reaching(level) for level in (5.0, 0.5, 0.6, 0.1)] == [2, 4, 4, None]


# --- hyperinf converge ---------------------------------------------------------------------------


def test_converge_writes_table_figure_and_document(hyperinf: Command, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, out, err = hyperinf(
        "converge", "--cell", "30,24", "--cell", "40,16", "--iterations", "12",
        "--output", str(folder), "--json",
    )  # fmt: skip
    assert code == 0, err
    document = json.loads(out)
    assert [(c["N"], c["d"]) for c in document["cells"]] == [(30, 24), (40, 16)]
    assert document == json.loads((folder / "convergence.json").read_text())
    assert (folder / "convergence.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((folder / "convergence.csv").open()))
    methods = {row["method"] for row in rows if row["d"] == "24"}
    assert methods == {"released iteration", "plain Schulz", "Chebyshev chain", "schulz_inverse",
                       "schulz_solve", "LiSSA", "DataInf", "Cholesky fp32"}  # fmt: skip
    assert len([r for r in rows if r["method"] == "released iteration"]) == 24
    for word in ("30, 24", "40, 16", "released", "Cholesky", "DataInf"):
        assert word in err
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cell", "200"), "--cell 200: give N,d"),
        (("--cell", "0,5"), "--cell 0,5: N must be at least 1"),
        (("--quick", "--all"), "one of --cell, --quick and --all"),
        (("--quick", "--iterations", "0"), "--iterations must be at least 1"),
        (("--quick", "--output", "."), "already holds files"),
    ],
)
def test_converge_refuses_before_any_work(
    hyperinf: Command, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "simulate", lambda *a, **k: pytest.fail("work was begun"))
    code, out, err = hyperinf("converge", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_figure_without_matplotlib_names_the_extra(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "out"
    code, _, err = hyperinf("converge", "--cell", "9,8", "--output", str(folder))
    assert code == 2
    assert "hyperinf_kernels[cli]" in err
    assert not folder.exists()
    # the table needs none
    assert hyperinf("converge", "--cell", "9,8")[0] == 0


# --- rates and hyperinf bench --------------------------------------------------------------------


def test_a_fit_gives_back_the_law_it_was_drawn_from() -> None:
    law = costs.Rate(3e10, 200.0)
    points = [(d, 1.0 / law.seconds(1.0, d)) for d in (32, 100, 900)]
    found = calibration.fit(points)
    assert found.peak == pytest.approx(law.peak)
    assert found.half == pytest.approx(law.half)
    # rates that fall with size have no such law: the largest size decides
    assert calibration.fit([(10, 5e9), (100, 2e9)]) == costs.Rate(2e9, 0.0)


def test_calibration_measures_every_operation() -> None:
    found = calibration.calibrate("cpu", sizes=(8, 48))
    assert set(found.table) == set(costs.OPERATIONS)
    assert found.source.startswith("calibrated on")
    for rate in found.table.values():
        assert 1e6 < rate.peak < 1e15
        assert 0 <= rate.half < 1e6


def test_bench_keeps_what_it_measured_and_choices_use_it(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "rates.json"
    monkeypatch.setenv("HYPERINF_RATES", str(path))
    table = dict(costs.SHIPPED["cpu"].table)
    # a machine whose factorisations crawl
    table["inverse_fp32"] = costs.Rate(1e8, 0.0)
    made = costs.Rates("cpu", "made for a test", table)
    monkeypatch.setattr(calibration, "calibrate", lambda device, progress: made)
    assert costs.cheaper_inverse(1024) == "direct"
    code, out, err = hyperinf("bench", "--calibrate", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["source"] == "made for a test"
    assert {c["cheaper"] for c in document["inverses"] if c["d"] >= 256} == {"schulz"}
    assert str(path) in err
    assert costs.cheaper_inverse(1024) == "schulz"
    # and the inverse itself follows
    A = torch.from_numpy(oracle.spd(np.geomspace(0.1, 1, 300), 0)).float()
    assert hk.spd_inverse(A, return_info=True)[1].method == "schulz"
    # without --calibrate it shows what is in force
    code, out, _ = hyperinf("bench", "--json")
    assert json.loads(out)["source"] == "made for a test"
    # another device's rates are kept beside
    costs_of_gpu = costs.Rates("cuda", "another device", costs.SHIPPED["cuda"].table)
    kept = costs.with_rates(path, costs_of_gpu)
    assert {name: entry["source"] for name, entry in kept["devices"].items()} == {
        "cuda": "another device", "cpu": "made for a test"
    }  # fmt: skip


def test_shipped_rates_take_the_direct_inverse_on_a_processor_at_any_size() -> None:
    """As every measurement on one so far."""
    for d in (2, 16, 64, 256, 1024, 4096):
        for batch in (1, 97):
            for dtype in (torch.float32, torch.float64):
                found = costs.inverse_seconds(d, batch, 1e2, dtype, rates=costs.SHIPPED["cpu"])
                assert found["direct"] < found["schulz"]


def test_damaged_rates_are_named_and_nothing_is_left_behind(
    hyperinf: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rates.json"
    monkeypatch.setenv("HYPERINF_RATES", str(path))
    for text in ("{", "{}", '{"format": 2}', '{"format": 1, "devices": {"cpu": {}}}'):
        path.write_text(text)
        costs._read.cache_clear()
        code, _, err = hyperinf("bench")
        assert code == 2
        assert "rates.json" in err
        assert "--calibrate" in err
    code, _, err = hyperinf("bench", "--output", str(tmp_path / "x.json"))
    assert (code, "--calibrate" in err) == (2, True)


def test_the_new_commands_import_no_figure_library_by_themselves() -> None:
    assert importlib.util.find_spec("matplotlib") is not None
    probe = (
        "import sys, hyperinf_kernels.cli.app, hyperinf_kernels.experiments.convergence_figure; "
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0

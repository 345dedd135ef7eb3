"""IFEngine and IFEngineGeneration against the released procedure, restated, and the fp64 oracle."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperinf_kernels import InputError
from hyperinf_kernels.integrations import datainf, hyperinf, hyperinf_optimized
from hyperinf_kernels.integrations.released import released_inverse
from tests import oracle
from tests.integrations import cases

LAMBDA = oracle.Damping(datainf=0.1)


def samples(blocks: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """{block: (n, r, d)} as the repositories keep it: {sample: {weight: (r, d)}}."""
    count = len(next(iter(blocks.values())))
    return {k: {name: grad[k].clone() for name, grad in blocks.items()} for k in range(count)}


def data(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    case = cases.CASES[name]()
    return tuple(
        {n: g.to(dtype) for n, g in case.blocks(part).items()} for part in (case.train, case.query)
    )


def mean(query: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.mean(0, keepdim=True) for name, grad in query.items()}


def released_lissa(train: dict[str, Tensor], query: dict[str, Tensor]) -> np.ndarray:
    """Ten unscaled steps with the damping subtracted, as plain loops."""
    total = np.zeros(len(next(iter(train.values()))))
    for name, grads in train.items():
        rows, v = oracle.flatten(grads), oracle.flatten(query[name])[0]
        lam, r = LAMBDA.of(grads, "flat"), v
        for _ in range(10):
            step = sum(np.dot(g, r) * g - lam * r for g in rows) / len(rows)
            r = v + r - step
        total -= rows @ r
    return total


def close(actual: Any, expected: Any, bound: float = 1e-6) -> None:
    error = np.abs(np.asarray(actual) - np.asarray(expected)).max() / np.abs(expected).max()
    assert error < bound


@pytest.mark.parametrize("name", cases.CASES)
def test_if_engine_gives_the_released_numbers(name: str) -> None:
    train, query = data(name)
    engine = hyperinf.IFEngine()
    engine.preprocess_gradients(samples(train), samples(query), noise_index=[1])
    engine.compute_hvps()
    engine.compute_IF()
    options = {block: {"extra": 1e-3, "steps": 30} for block in train}
    truth = {
        "identity": oracle.influence(train, mean(query), "grad_dot")[0],
        "datainf": oracle.influence(train, mean(query), "datainf")[0],
        "iterative": oracle.influence(train, mean(query), "hyperinf_paper", options=options)[0],
        "accurate": oracle.influence(train, mean(query), "exact")[0],
        "LiSSA": released_lissa(train, mean(query)),
    }
    assert set(engine.IF_dict) == set(engine.hvp_dict) == set(engine.time_dict) == set(truth)
    for method, expected in truth.items():
        close(engine.IF_dict[method], expected)
        assert set(engine.hvp_dict[method]) == set(train)
    assert (engine.n_train, engine.n_val) == (cases.N_TRAIN, cases.N_QUERY)
    close(engine.val_grad_avg_dict[next(iter(train))], next(iter(mean(query).values()))[0])


@pytest.mark.parametrize("name", cases.CASES)
def test_converged_mode_solves_each_method_and_says_so(name: str) -> None:
    train, query = data(name)
    engine = datainf.IFEngine(mode="converged")
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps()
    engine.compute_IF()
    exact = oracle.influence(train, mean(query), "exact")[0]
    close(engine.IF_dict["LiSSA"], exact, 1e-2)
    # ten steps with the damping subtracted, as released, are far from what LiSSA approximates
    assert np.abs(released_lissa(train, mean(query)) - exact).max() > 0.5 * np.abs(exact).max()
    close(engine.IF_dict["accurate"], oracle.influence(train, mean(query), "exact")[0])
    close(engine.IF_dict["proposed"], oracle.influence(train, mean(query), "datainf")[0])
    assert all(entry.converged for entry in engine.reports["accurate"])

    optimised = hyperinf_optimized.IFEngine(mode="converged")
    optimised.preprocess_gradients(samples(train), samples(query))
    optimised.compute_hvps(compute_accurate=False)
    optimised.compute_IF()
    assert list(optimised.IF_dict) == ["Low-Rank_HyperINF", "identity", "Datainf", "LiSSA"]
    expected = oracle.influence(train, mean(query), "hyperinf")[0]
    close(optimised.IF_dict["Low-Rank_HyperINF"], expected)


def test_the_optimised_file_inverts_the_gfim_for_its_accurate_method() -> None:
    train, query = data("mlp")
    engine = hyperinf_optimized.IFEngine()
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps(lambda_const_param=5)
    engine.compute_IF()
    damping = oracle.Damping(datainf=0.2)
    expected = oracle.influence(train, mean(query), "hyperinf", damping)[0]
    close(engine.IF_dict["accurate"], expected)


def test_fp32_gradients_are_as_exact_as_the_released_loops() -> None:
    from benchmarks import published

    train, query = data("lora transformer", torch.float32)
    rows, mean_row = list(samples(train).values()), next(iter(samples(mean(query)).values()))
    engine = hyperinf.IFEngine()
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps()
    engine.compute_IF()
    options = {block: {"extra": 1e-3, "steps": 30} for block in train}
    exact = oracle.influence(train, mean(query), "hyperinf_paper", options=options)[0]
    peer = published.scores(rows, published.hyperinf_products(rows, mean_row))
    oracle.assert_as_exact_as(engine.IF_dict["iterative"], exact, peer, k=1, floor=1e-6)
    peer = published.scores(rows, published.datainf_products(rows, mean_row))
    exact = oracle.influence(train, mean(query), "datainf")[0]
    oracle.assert_as_exact_as(engine.IF_dict["datainf"], exact, peer, k=4, floor=1e-6)


@pytest.mark.parametrize("name", cases.CASES)
def test_generation_engine_keeps_queries_apart(name: str) -> None:
    pytest.importorskip("pandas", reason="run `make test-integrations`")
    train, query = data(name)
    engine = datainf.IFEngineGeneration()
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps()
    engine.compute_IF()
    assert set(engine.IF_dict) == {"identity", "proposed"}
    frame = engine.IF_dict["proposed"]
    assert frame.shape == (cases.N_QUERY, cases.N_TRAIN)
    assert list(frame.columns) == list(range(cases.N_TRAIN))
    close(frame.to_numpy(), oracle.influence(train, query, "datainf"))
    block = next(iter(train))
    rows = oracle.datainf(
        oracle.flatten(query[block]), oracle.flatten(train[block]), LAMBDA.of(train[block], "flat")
    )
    close(engine.hvp_dict["proposed"][2][block].flatten(), rows[2])

    engine = hyperinf.IFEngineGeneration(mode="converged")
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps()
    engine.compute_IF()
    close(engine.IF_dict["iterative"].to_numpy(), oracle.influence(train, query, "hyperinf"))


def test_an_unconverged_filter_is_reproduced_and_a_divergent_one_refused() -> None:
    for scale, smallest in ((1e-4, 1e-6), (3e4, 1.0)):
        mu = np.geomspace(smallest, scale, 12)
        A, V = torch.from_numpy(oracle.spd(mu, seed=3)), torch.randn(4, 12).double()
        expected = V.numpy() @ oracle.paper_inverse_by_filter(A.numpy(), 30, 5e-5)
        close(released_inverse(A, V, smallest), expected, 1e-5)
    with pytest.raises(InputError, match="diverges"):
        released_inverse(torch.eye(3).double() * 5e4, torch.ones(1, 3).double(), 5e4)


def test_results_are_saved_as_the_notebooks_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train, query = data("mlp")
    engine = hyperinf.IFEngine()
    engine.preprocess_gradients(samples(train), samples(query))
    engine.compute_hvps()
    engine.compute_IF()
    engine.save_result([3, 4], run_id=2)
    saved = pickle.loads((tmp_path / "results_2.pkl").read_bytes())
    assert set(saved) == {"runtime", "noise_index", "influence"}
    assert saved["noise_index"] == [3, 4]
    assert (saved["influence"]["datainf"] == engine.IF_dict["datainf"]).all()


def test_bad_dictionaries_are_one_clear_error() -> None:
    train, query = (samples(part) for part in data("mlp"))
    engine = hyperinf.IFEngine()
    with pytest.raises(InputError, match="0 to n - 1"):
        engine.preprocess_gradients({5: train[0]}, query)
    train[3] = {"other": torch.zeros(2, 2)}
    with pytest.raises(InputError, match="sample 3"):
        engine.preprocess_gradients(train, query)
    train[3] = {name: grad.float() for name, grad in train[2].items()}
    with pytest.raises(InputError, match="dtypes"):
        engine.preprocess_gradients(train, query)
    with pytest.raises(ValueError, match="parity"):
        hyperinf.IFEngine(mode="exact")

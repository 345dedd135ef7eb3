"""pyDVL 0.10.0: our influence models in its interface, and its averaging error."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pydvl", reason="run `make test-integrations`")

import zarr
from pydvl.influence import (
    DaskInfluenceCalculator,
    DisableClientSingleThreadCheck,
    InfluenceMode,
    SequentialInfluenceCalculator,
)
from pydvl.influence.torch import InverseHarmonicMeanInfluence
from pydvl.influence.torch.base import TorchGradientProvider
from pydvl.influence.torch.util import NestedTorchCatAggregator, TorchNumpyConverter

from hyperinf_kernels import AbsoluteDamping, InputError
from hyperinf_kernels.integrations import pydvl as hkp
from tests import oracle
from tests.integrations.cases import CASES, Case, relative_error

LOSS = nn.functional.cross_entropy


def blocks(case: Case) -> OrderedDict[str, list[str]]:
    return OrderedDict((name, [name]) for name in case.names)


def flat(case: Case, method: str, lam: float) -> Tensor:
    """All chosen parameters as one block, (query, train)."""
    train, query = (
        {"all": torch.cat([g.flatten(1) for g in case.raw(part).values()], 1)[:, None]}
        for part in (case.train, case.query)
    )
    return -torch.from_numpy(oracle.influence(train, query, method, oracle.Damping(absolute=lam)))


def whole(model: Any, case: Case) -> Tensor:
    return model.influences(*case.query.tensors, *case.train.tensors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["hyperinf", "datainf", "exact"])
def test_models_give_the_oracles_scores(name: str, method: str) -> None:
    case = CASES[name]()
    model = hkp.SolverInfluence(case.model, LOSS, method, block_structure=blocks(case))
    model = model.fit(case.loaders()[0])
    expected = -case.influence(method)
    assert relative_error(whole(model, case), expected) < 1e-6
    factors = model.influence_factors(*case.query.tensors)
    scores = model.influences_from_factors(factors, *case.train.tensors)
    assert relative_error(scores, expected) < 1e-6
    assert len(model.report()) == len(case.names)


def test_pydvls_own_datainf_is_wrong_over_several_batches_and_ours_is_not() -> None:
    case = CASES["mlp"]()
    train, _ = case.loaders()
    expected = flat(case, "datainf", 0.1)
    stock = InverseHarmonicMeanInfluence(case.model, LOSS, regularization=0.1).fit(train)
    assert relative_error(whole(stock, case), expected) > 0.01
    ours = hkp.DataInfInfluence(case.model, LOSS, regularization=0.1).fit(train)
    assert relative_error(whole(ours, case), expected) < 1e-6
    # a single batch is off by its own size: its mean is divided by the samples once more
    single = torch.utils.data.DataLoader(case.train, len(case.train))
    stock = InverseHarmonicMeanInfluence(case.model, LOSS, regularization=0.1).fit(single)
    assert relative_error(whole(stock, case) * len(case.train), expected) < 1e-6


def test_another_damping_needs_no_data_and_blocks_may_differ() -> None:
    case = CASES["mlp"]()
    train, _ = case.loaders()
    model = hkp.ExactInfluence(case.model, LOSS, regularization=0.5).fit(train)
    assert relative_error(whole(model, case), flat(case, "exact", 0.5)) < 1e-6
    model.with_regularization(0.01)
    assert relative_error(whole(model, case), flat(case, "exact", 0.01)) < 1e-6
    first = case.names[0]
    mixed = hkp.HyperInfInfluence(case.model, LOSS, {first: AbsoluteDamping(0.3)}).fit(train)
    dampings = {entry.block: entry.damping for entry in _applied(mixed, case)}
    assert dampings[first] == 0.3
    assert dampings[case.names[1]] != 0.3
    with pytest.raises(InputError, match="no such block"):
        hkp.HyperInfInfluence(case.model, LOSS, {"head": 0.1})


def _applied(model: Any, case: Case) -> Any:
    whole(model, case)
    return model.report()


@pytest.mark.parametrize(("name", "method"), [("lora transformer", "hyperinf"), ("mlp", "datainf")])
def test_lazy_results_are_written_to_zarr(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]()
    train, test = case.loaders()
    model = hkp.SolverInfluence(case.model, LOSS, method, block_structure=blocks(case)).fit(train)
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    values = lazy.compute(aggregator=NestedTorchCatAggregator())
    expected = -case.influence(method)
    assert relative_error(values, expected) < 1e-6
    lazy = SequentialInfluenceCalculator(model).influences(test, train)
    path = tmp_path / "scores.zarr"
    lazy.to_zarr(str(path), TorchNumpyConverter())
    stored = torch.from_numpy(np.asarray(zarr.open(str(path), mode="r")[:]))
    assert relative_error(stored, expected) < 1e-6


@pytest.mark.parametrize(("name", "method"), [("lora transformer", "exact"), ("mlp", "hyperinf")])
def test_dask_computes_the_same_scores(name: str, method: str) -> None:
    import dask.array as da

    case = CASES[name]()
    train, _ = case.loaders()
    model = hkp.SolverInfluence(case.model, LOSS, method, block_structure=blocks(case)).fit(train)
    calculator = DaskInfluenceCalculator(
        model, TorchNumpyConverter(), DisableClientSingleThreadCheck
    )
    arrays = [
        da.from_array(t.numpy(), chunks=(size, *t.shape[1:]))
        for data, size in ((case.query, 4), (case.train, 5)) for t in data.tensors
    ]  # fmt: skip
    values = calculator.influences(*arrays).compute(scheduler="synchronous")
    assert relative_error(torch.from_numpy(values), -case.influence(method)) < 1e-6


def test_perturbation_mode_runs_through_our_factors() -> None:
    case = CASES["mlp"]()
    train, _ = case.loaders()
    model = hkp.HyperInfInfluence(case.model, LOSS).fit(train)
    x_test, y_test = case.query.tensors
    x, y = case.train.tensors
    values = model.influences(x_test, y_test, x, y, mode=InfluenceMode.Perturbation)
    factors = model.influence_factors(x_test, y_test)
    step, shifted = 1e-5, x.clone()
    shifted[3, 2] += step
    up = model.influences_from_factors(factors, shifted, y)
    slope = (up - model.influences_from_factors(factors, x, y)) / step
    assert relative_error(values[:, 3, 2], slope[:, 3]) < 1e-3


def test_a_batchs_gradients_are_formed_once_but_never_for_another_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp"]()
    train, test = case.loaders()
    formed: list[int] = []
    own = TorchGradientProvider._grads

    def counted(self: Any, batch: Any) -> Any:
        formed.append(len(batch.x))
        return own(self, batch)

    monkeypatch.setattr(TorchGradientProvider, "_grads", counted)
    for model in (
        hkp.ExactInfluence(case.model, LOSS, regularization=0.1),
        hkp.HyperInfInfluence(case.model, LOSS, regularization=0.1),
    ):
        formed.clear()
        model.fit(train)
        for _ in range(2):
            lazy = SequentialInfluenceCalculator(model).influences(test, train)
            values = lazy.compute(aggregator=NestedTorchCatAggregator())
        assert sorted(formed) == [3, 3, 4, 5, 5], "13 training samples and 7 queries"
        assert relative_error(values, whole(model, case)) < 1e-12
        sent = pickle.loads(pickle.dumps(model))
        assert relative_error(whole(sent, case), values) < 1e-12
        before = model.influence_factors(*case.query.tensors)
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.mul_(1.1)
        changed = model.influences_from_factors(before, *case.train.tensors)
        rows = torch.cat([g.flatten(1) for g in case.raw(case.train).values()], 1)
        assert relative_error(changed, before @ rows.mT) < 1e-12

"""dattri 0.3.0: our attributors, the accelerated DataInf, LoGra's inverse, dattri's own errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("dattri", reason="run `make test-integrations`")

from dattri.algorithm.influence_function import IFAttributorDataInf
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask

from hyperinf_kernels import AbsoluteDamping, InputError
from hyperinf_kernels.integrations import dattri as hkd
from hyperinf_kernels.integrations import dattri_blocks
from tests import oracle
from tests.integrations.cases import CASES, Case, relative_error


def task(case: Case) -> AttributionTask:
    def loss(params: Any, data: Any) -> torch.Tensor:
        x, y = data
        logits = torch.func.functional_call(case.model, params, (x,))
        return nn.functional.cross_entropy(logits, y)

    for name, parameter in case.model.named_parameters():
        parameter.requires_grad_(name in case.names)
    return AttributionTask(loss, case.model, case.model.state_dict())


def layers(case: Case) -> dict[str, list[str]]:
    """dattri's layers: a weight and its bias are one."""
    found: dict[str, list[str]] = {}
    for name in case.names:
        found.setdefault(name.rpartition(".")[0], []).append(name)
    return found


def datainf_by_layer(case: Case, lam: float) -> torch.Tensor:
    train, query = case.raw(case.train), case.raw(case.query)
    total = 0.0
    for names in layers(case).values():
        P, V = (np.concatenate([g[n].flatten(1).numpy() for n in names], 1) for g in (train, query))
        total = total + P @ oracle.datainf(V, P, lam).T
    return torch.from_numpy(np.asarray(total))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["hyperinf", "datainf", "exact"])
def test_attributors_give_the_oracles_scores(name: str, method: str) -> None:
    case = CASES[name]()
    train, test = case.loaders()
    attributor = hkd.IFAttributor(task(case), method, layer_name=case.names)
    attributor.cache(train)
    expected = -case.influence(method).T
    scores = attributor.attribute(train, test)
    assert scores.dtype == torch.float64
    assert relative_error(scores, expected) < 1e-6
    # any subset, in other batches than the cached ones
    part = torch.utils.data.DataLoader(torch.utils.data.Subset(case.train, range(4, 11)), 2)
    assert relative_error(attributor.attribute(part, test), expected[4:11]) < 1e-6
    assert len(attributor.report()) == len(case.names)
    assert all(entry.converged for entry in attributor.report())


def test_checkpoints_are_averaged() -> None:
    case = CASES["mlp"]()
    train, test = case.loaders()
    states, expected = [], []
    for scale in (1.0, 1.5):
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.mul_(scale)
        states.append({name: p.detach().clone() for name, p in case.model.named_parameters()})
        expected.append((-case.influence("hyperinf").T, datainf_by_layer(case, 0.1)))
    several = task(case)
    several = AttributionTask(several.original_loss_func, case.model, states)
    ours = hkd.IFAttributorHyperINF(several, case.names)
    ours.cache(train)
    truth = [(first + second) / 2 for first, second in zip(*expected, strict=True)]
    assert relative_error(ours.attribute(train, test), truth[0]) < 1e-6
    with hkd.accelerate():
        fast = IFAttributorDataInf(several, regularization=0.1)
        fast.cache(train)
        assert relative_error(fast.attribute(train, test), truth[1]) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_self_attribute_is_the_diagonal_for_any_batch_size(name: str) -> None:
    case = CASES[name]()
    train = case.blocks(case.train)
    expected = -torch.from_numpy(np.diag(oracle.influence(train, train, "hyperinf")).copy())
    for size in (1, 5, 13):
        loader = torch.utils.data.DataLoader(case.train, size)
        attributor = hkd.IFAttributorHyperINF(task(case), case.names)
        assert relative_error(attributor.self_attribute(loader), expected) < 1e-6


def test_dattris_own_self_attribute_is_constant_for_batches_of_one() -> None:
    case = CASES["mlp"]().float()
    loader = torch.utils.data.DataLoader(case.train, 1)
    stock = IFAttributorDataInf(task(case), regularization=0.1)
    stock.cache(loader)
    own = stock.self_attribute(loader).detach()
    assert float(own.std()) < 1e-6 * float(own.mean())
    with hkd.accelerate():
        ours = stock.self_attribute(loader)
    assert float(ours.std()) > 0.1 * float(ours.mean())


@pytest.mark.parametrize("name", CASES)
def test_accelerated_datainf_agrees_where_dattri_is_right(name: str) -> None:
    double = CASES[name]()
    expected = datainf_by_layer(double, 0.1)
    with hkd.accelerate():
        # dattri itself knows fp32 only
        attributor = IFAttributorDataInf(task(double), regularization=0.1)
        attributor.cache(double.loaders()[0])
        assert relative_error(attributor.attribute(*double.loaders()), expected) < 1e-6
    case = CASES[name]().float()
    train, test = case.loaders()

    def script() -> torch.Tensor:
        attributor = IFAttributorDataInf(task(case), regularization=0.1)
        attributor.cache(train)
        return attributor.attribute(train, test)

    stock = script()
    with hkd.accelerate():
        fast = script()
    # the gradients that it hands over are fp32
    assert relative_error(stock, expected) < 1e-5
    assert relative_error(fast, expected) < 1e-5
    assert torch.equal(script(), stock), "accelerate() must leave nothing behind"


def test_dattri_splits_a_layer_subset_by_the_wrong_sizes_and_ours_does_not() -> None:
    case = CASES["mlp"]().float()
    train, test = case.loaders()
    names = ["2.weight", "4.weight"]
    chosen = Case(case.model, names, case.train, case.query)
    expected = datainf_by_layer(chosen, 0.1)
    attributor = IFAttributorDataInf(task(case), names, regularization=0.1)
    attributor.cache(train)
    assert relative_error(attributor.attribute(train, test), expected) > 1e-3
    with hkd.accelerate():
        assert relative_error(attributor.attribute(train, test), expected) < 1e-5


def test_dattris_default_regularisation_is_not_a_number_and_ours_refuses_it() -> None:
    case = CASES["mlp"]().float()
    train, test = case.loaders()
    attributor = IFAttributorDataInf(task(case))
    attributor.cache(train)
    assert not torch.isfinite(attributor.attribute(train, test)).any()
    with hkd.accelerate(), pytest.raises(InputError, match="regularization=0.1"):
        attributor.attribute(train, test)


def test_stable_inverse_is_batched_and_keeps_dattris_damping() -> None:
    rng = np.random.default_rng(0)
    P = rng.standard_normal((3, 40, 16))
    H = np.einsum("lni,lnj->lij", P, P) / 40
    for damping in (None, 0.1):
        c = 1e-5 if damping is None else damping
        expected = np.stack([
            np.linalg.inv(h + c * np.trace(h) / 16 * np.eye(16)) for h in H
        ])  # fmt: skip
        whole = hkd.stable_inverse(torch.from_numpy(H), damping)
        assert relative_error(whole, torch.from_numpy(expected)) < 1e-9
        single = hkd.stable_inverse(torch.from_numpy(H[1]).float(), damping)
        assert single.dtype == torch.float32
        assert relative_error(single, torch.from_numpy(expected[1])) < 1e-4
    with pytest.raises(InputError, match="NaN"):
        hkd.stable_inverse(torch.full((2, 2), math.nan))


class MeanOverTokens(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def test_logra_runs_on_our_inverse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # LoGra leaves batch_metadata.json where it runs
    torch.manual_seed(0)
    # LoGra applies cross-entropy to the model's output itself, and needs a token axis inside
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False), MeanOverTokens()
    )
    data = torch.utils.data.TensorDataset(torch.randn(20, 4, 6), torch.randint(0, 3, (20,)))

    def loss(model: Any, batch: Any, device: str) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def script() -> torch.Tensor:
        torch.manual_seed(1)
        logra = LoGraAttributor(
            AttributionTask(loss, model, model.state_dict()), device="cpu", damping=0.1,
            proj_dim=16, offload="none",
        )  # fmt: skip
        train, test = (torch.utils.data.DataLoader(data, size) for size in (5, 4))
        logra.cache(train)
        return logra.attribute(train, test)

    stock = script()
    inverted: list[tuple[int, ...]] = []

    def recorded(matrix: torch.Tensor, damping: float | None = None) -> torch.Tensor:
        inverted.append(tuple(matrix.shape))
        return hkd.stable_inverse(matrix, damping)

    monkeypatch.setattr(dattri_blocks, "stable_inverse", recorded)
    with hkd.accelerate():
        fast = script()
    assert inverted == [(2, 16, 16)], "blocks of one size are inverted together"
    assert relative_error(fast, stock) < 1e-4
    assert torch.equal(script(), stock), "accelerate() must leave nothing behind"


def test_an_attributor_names_what_is_wrong() -> None:
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match="unknown method"):
        hkd.IFAttributor(task(case), "hyper")
    attributor = hkd.IFAttributorHyperINF(task(case), ["0.weigth"], damping=AbsoluteDamping(1.0))
    with pytest.raises(InputError, match=r"0\.weigth"):
        attributor.cache(case.loaders()[0])
    with pytest.raises(InputError, match="cache"):
        attributor.transform_test_rep(0, torch.zeros(1, 3))

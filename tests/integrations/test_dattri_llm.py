"""dattri-llm 0.1.0: its stores and its live passes with our methods, and the K-FAC file route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("dattri_llm", reason="run `make test-integrations`")

from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig, KFACAttributor

from hyperinf_kernels import HyperINF, InputError
from hyperinf_kernels.integrations import dattri_llm as hkd
from tests import oracle
from tests.integrations.cases import CASES, QUERY_BATCH, TRAIN_BATCH, Case, relative_error


class Rows(Dataset):
    """dattri-llm collates dictionaries."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = self.data[index]
        return {"x": x, "y": y}


def task(case: Case, reduction: str = "sum") -> AttributionTask:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction=reduction)

    return AttributionTask(loss, case.model)


def arguments(folder: Path) -> AttributionArguments:
    return AttributionArguments(
        output_dir=str(folder), per_device_train_batch_size=TRAIN_BATCH,
        per_device_eval_batch_size=QUERY_BATCH, use_cpu=True,
    )  # fmt: skip


def layers(case: Case, data: Any) -> dict[str, Tensor]:
    """{layer: (n, r, d)}: a bias is a column of its weight, LoRA B is transposed."""
    raw = case.raw(data)
    found = {}
    for name, grad in raw.items():
        layer, _, short = name.rpartition(".")
        if short != "weight":
            continue
        if f"{layer}.bias" in raw:
            grad = torch.cat([grad, raw[f"{layer}.bias"][:, :, None]], 2)
        found[layer] = grad.mT if "lora_B" in name else grad
    return found


def expected(case: Case, method: str) -> Tensor:
    values = oracle.influence(layers(case, case.train), layers(case, case.query), method)
    return -torch.from_numpy(values).T


def config(case: Case) -> HookManagerConfig:
    return HookManagerConfig(hook_types=dict.fromkeys(layers(case, case.query), "linear_io"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["hyperinf", "datainf", "exact"])
def test_stored_gradients_give_the_oracles_scores(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]()
    attributor = hkd.InfluenceAttributor(arguments(tmp_path), method, task=task(case))
    [(train, test)] = attributor.cache(Rows(case.train), Rows(case.query), hook_config=config(case))
    fresh = hkd.InfluenceAttributor(arguments(tmp_path / "scores"), method)
    score = fresh.attribute_from_cache(train, test)
    assert relative_error(score.scores, expected(case, method)) < 1e-6
    assert {entry.block for entry in fresh.report()} == set(layers(case, case.query))


def test_a_mean_loss_is_rescaled_when_said(tmp_path: Path) -> None:
    case = CASES["mlp"]()
    attributor = hkd.HyperINFAttributor(
        arguments(tmp_path), task=task(case, "mean"), loss_reduction="mean"
    )
    stores = attributor.cache(Rows(case.train), Rows(case.query), hook_config=config(case))
    score = attributor.attribute_from_cache(*stores[0])
    assert relative_error(score.scores, expected(case, "hyperinf")) < 1e-6
    unsaid = hkd.HyperINFAttributor(arguments(tmp_path / "unsaid")).attribute_from_cache(*stores[0])
    assert relative_error(unsaid.scores, expected(case, "hyperinf")) > 0.1


def test_live_passes_need_gradients_that_can_be_read_twice(tmp_path: Path) -> None:
    case = CASES["lora transformer"]()
    attributor = hkd.HyperINFAttributor(arguments(tmp_path), task=task(case))
    data = Rows(case.train), Rows(case.query)
    score = attributor.attribute(*data, hook_config=config(case), gradient_cache_residency="memory")
    assert relative_error(score.scores, expected(case, "hyperinf")) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_their_kfac_attributor_scores_with_our_factors(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    args = arguments(tmp_path)
    [(train, test)] = hkd.HyperINFAttributor(args, task=task(case)).cache(
        Rows(case.train), Rows(case.query), hook_config=config(case)
    )
    solver = HyperINF()
    for _, grads in hkd.gradient_batches(train, args):
        solver.update(grads)
    kfac = KFACAttributor(args)
    fisher = kfac.fit(train, covariances=hkd.fisher_factors(solver.fit()))
    score = kfac.attribute_from_cache(train, test, fisher_dir=fisher, damping=0.0)
    # its eigenvectors are fp32
    assert relative_error(score.scores, expected(case, "hyperinf")) < 1e-4
    with pytest.raises(InputError, match="cols"):
        hkd.fisher_factors(HyperINF(side="rows"))

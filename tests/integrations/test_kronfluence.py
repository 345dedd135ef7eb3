"""kronfluence 1.0.1: its own pairwise scoring on our factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("kronfluence", reason="run `make test-integrations`")

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task

from hyperinf_kernels import DataInf, HyperINF, InputError
from hyperinf_kernels.integrations import kronfluence as hkk
from tests import oracle
from tests.integrations.cases import CASES, QUERY_BATCH, TRAIN_BATCH, Case, relative_error


class Classify(Task):
    def __init__(self, modules: list[str]) -> None:
        super().__init__()
        self.modules = modules

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        return self.modules


def layers(case: Case, data: Any) -> dict[str, Tensor]:
    """{weight: (n, r, d)}: a bias is the last column, LoRA B is transposed."""
    raw = case.raw(data)
    found = {}
    for name, grad in raw.items():
        if not name.endswith("weight"):
            continue
        bias = raw.get(name.removesuffix("weight") + "bias")
        grad = grad if bias is None else torch.cat([grad, bias[:, :, None]], 2)
        found[name] = grad.mT if "lora_B" in name else grad
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("mode", "dtype", "bound"),
    # fp32 is what kronfluence scores in unless told otherwise
    [("converged", torch.float64, 1e-6), ("converged", torch.float32, 1e-5),
     ("paper", torch.float32, 1e-4)],
)  # fmt: skip
def test_pairwise_scores_are_hyperinfs(
    name: str, mode: Any, dtype: torch.dtype, bound: float, tmp_path: Path
) -> None:
    case = CASES[name]()
    case = case if dtype == torch.float64 else case.float()
    train, query = layers(case, case.train), layers(case, case.query)
    solver = HyperINF(mode=mode)
    for part in (slice(0, 6), slice(6, 13)):
        solver.update({block: grad[part] for block, grad in train.items()})
    task = Classify([block.removesuffix(".weight") for block in train])
    model = prepare_model(case.model, task)
    analyzer = Analyzer("test", model, task, cpu=True, output_dir=str(tmp_path))
    hkk.write_factors(analyzer, "hyperinf", solver.fit())
    analyzer.compute_pairwise_scores(
        "scores", factors_name="hyperinf", query_dataset=case.query, train_dataset=case.train,
        per_device_query_batch_size=QUERY_BATCH, per_device_train_batch_size=TRAIN_BATCH,
        score_args=hkk.score_arguments(
            score_dtype=dtype, per_sample_gradient_dtype=dtype, precondition_dtype=dtype
        ),
    )  # fmt: skip
    scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    options = {block: {"extra": 1e-3, "steps": 30} for block in train}
    expected = (
        oracle.influence(train, query, "hyperinf")
        if mode == "converged"
        else oracle.influence(train, query, "hyperinf_paper", options=options)
    )
    assert relative_error(scores, -torch.from_numpy(expected)) < bound
    part = HyperINF()
    part.update(dict(list(train.items())[1:]))
    with pytest.raises(InputError, match="has no block of module"):
        hkk.write_factors(analyzer, "part", part.fit())
    with pytest.raises(InputError, match="exist already"):
        hkk.write_factors(analyzer, "hyperinf", solver)


def test_only_hyperinf_is_a_pair_of_factors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="DataInf"):
        hkk.eigen_factors(DataInf())
    with pytest.raises(InputError, match="not fitted"):
        hkk.eigen_factors(HyperINF())

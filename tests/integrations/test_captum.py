"""captum 0.8 and 0.9: its influence() on our embeddings, and its forgotten test loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("captum", reason="run `make test-integrations`")

from captum.influence._core.influence_function import NaiveInfluenceFunction

from hyperinf_kernels.integrations.captum import ExactInfluenceFunction, HyperInfInfluenceFunction
from tests import oracle
from tests.integrations.cases import CASES, Case, relative_error

MEAN = nn.CrossEntropyLoss(reduction="mean")
EACH = nn.CrossEntropyLoss(reduction="none")


def layers(case: Case) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in case.names))


def build(case: Case, folder: Path, kind: Any = HyperInfInfluenceFunction, **options: Any) -> Any:
    path = folder / "checkpoint.pt"
    torch.save(case.model.state_dict(), path)
    # captum's one-pass gradients hook frozen layers too, which it cannot: one by one for LoRA
    frozen = any(not parameter.requires_grad for parameter in case.model.parameters())
    return kind(
        case.model, case.train, str(path), layers=layers(case), loss_fn=EACH if frozen else MEAN,
        batch_size=5, sample_wise_grads_per_batch=not frozen,
        checkpoints_load_func=lambda m, p: m.load_state_dict(torch.load(p)) and 1.0, **options,
    )  # fmt: skip


def expected(case: Case, lam: float | None = None) -> Tensor:
    """captum's curvature is a sum: a number is added to n times the mean."""
    n = len(case.train)
    damping = None if lam is None else oracle.Damping(absolute=lam / n)
    return -case.influence("hyperinf", damping) / n


@pytest.mark.parametrize("name", CASES)
def test_influence_is_the_oracles_in_captums_convention(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    x, y = case.query.tensors
    truth = expected(case)
    function = build(case, tmp_path)
    assert relative_error(function.influence((x, y)), truth) < 1e-6
    absolute = build(case, tmp_path, damping=0.5)
    assert relative_error(absolute.influence((x, y)), expected(case, 0.5)) < 1e-6
    for proponents in (True, False):
        found = function.influence((x, y), k=4, proponents=proponents)
        values, rows = truth.topk(4, 1, largest=proponents)
        assert torch.equal(found.indices, rows)
        assert relative_error(found.influence_scores, values) < 1e-6
    assert len(function.report()) == len(case.names)
    assert all(entry.residual < 1e-9 for entry in function.report())
    own = function.self_influence(tuple(case.train.tensors))
    train = case.blocks(case.train)
    diagonal = -torch.from_numpy(oracle.influence(train, train, "hyperinf")).diagonal() / 13
    assert relative_error(own, diagonal) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_exact_influence_has_embeddings_too(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    function = build(case, tmp_path, ExactInfluenceFunction)
    found = function.influence(tuple(case.query.tensors))
    assert relative_error(found, -case.influence("exact") / len(case.train)) < 1e-6


def test_an_option_of_the_solver_is_judged_before_any_data(tmp_path: Path) -> None:
    case = CASES["lora transformer"]()
    rows = build(case, tmp_path, solver_options={"side": "rows"})
    train, query = (
        {n: g.mT for n, g in case.blocks(part).items()} for part in (case.train, case.query)
    )
    truth = -torch.from_numpy(oracle.influence(train, query, "hyperinf")) / len(case.train)
    assert relative_error(rows.influence(tuple(case.query.tensors)), truth) < 1e-6
    with pytest.raises((ValueError, TypeError), match="sides"):
        build(case, tmp_path, solver_options={"sides": "rows"})


def test_captums_k_most_forgets_the_test_loss_and_ours_does_not(tmp_path: Path) -> None:
    case = CASES["mlp"]()
    smooth = nn.CrossEntropyLoss(reduction="mean", label_smoothing=0.9)
    x, y = case.query.tensors
    stock = build(case, tmp_path, NaiveInfluenceFunction, test_loss_fn=smooth, projection_dim=5)
    whole = stock.influence((x, y)).topk(3, 1).values
    assert relative_error(stock.influence((x, y), k=3).influence_scores, whole) > 0.01
    ours = build(case, tmp_path, test_loss_fn=smooth)
    whole = ours.influence((x, y)).topk(3, 1).values
    assert relative_error(ours.influence((x, y), k=3).influence_scores, whole) < 1e-9

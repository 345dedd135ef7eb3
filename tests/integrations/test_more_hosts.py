"""quanda, opacus, TRAK, LESS and transformers: our solvers in their interfaces."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hyperinf_kernels import DataInfDamping, HyperINF, InputError
from hyperinf_kernels.integrations import less
from hyperinf_kernels.store.arrays import read_less, read_trak
from tests import oracle
from tests.integrations.cases import CASES, N_TRAIN, Case, relative_error

REASON = "run `make test-integrations`"


def weights(case: Case) -> Case:
    """Weight matrices only."""
    return Case(case.model, [n for n in case.names if "bias" not in n], case.train, case.query)


@pytest.mark.parametrize("name", CASES)
def test_quanda_explainers_and_their_self_influence(name: str) -> None:
    pytest.importorskip("quanda", reason=REASON)
    from hyperinf_kernels.integrations import quanda as hkq

    case = weights(CASES[name]())
    x, y = case.query.tensors
    for kind, method in (
        (hkq.HyperINFExplainer, "hyperinf"), (hkq.DataInfExplainer, "datainf"),
        (hkq.ExactExplainer, "exact"),
    ):  # fmt: skip
        explainer = kind(case.model, case.train, blocks=case.names, batch_size=5)
        parts = [explainer.explain(x[part], y[part]) for part in (slice(0, 4), slice(4, 7))]
        assert relative_error(torch.cat(parts), -case.influence(method)) < 1e-6
    explainer = hkq.HyperINFExplainer(case.model, case.train, blocks=case.names, batch_size=5)
    slow = super(hkq.InfluenceExplainer, explainer).self_influence(batch_size=4)
    assert relative_error(explainer.self_influence(), slow) < 1e-6


def test_quandas_mislabelling_metric_takes_our_explainer() -> None:
    pytest.importorskip("quanda", reason=REASON)
    from quanda.metrics.downstream_eval import MislabelingDetectionMetric

    from hyperinf_kernels.integrations.quanda import HyperINFExplainer

    case = weights(CASES["mlp"]())
    metric = MislabelingDetectionMetric(
        model=case.model, train_dataset=case.train, mislabeling_indices=[1, 4],
        explainer_cls=HyperINFExplainer,
        expl_kwargs={"blocks": case.names},
    )  # fmt: skip
    train = case.blocks(case.train)
    own = -np.diag(oracle.influence(train, train, "hyperinf"))
    ranks = np.argsort(-own).tolist()
    found = np.cumsum([index in (1, 4) for index in ranks]) / 2
    # quanda's score is the area under the share of mislabelled samples found so far
    assert abs(float(metric.compute()["score"]) - np.mean(found)) < 0.1


@pytest.mark.parametrize("name", CASES)
def test_opacus_gradients_feed_a_solver(name: str) -> None:
    pytest.importorskip("opacus", reason=REASON)
    from opacus import GradSampleModule

    from hyperinf_kernels.integrations.opacus import grad_samples

    case = CASES[name]()
    for parameter_name, parameter in case.model.named_parameters():
        parameter.requires_grad_(parameter_name in case.names)
    wrapped = GradSampleModule(case.model.train(), loss_reduction="mean", strict=False)

    def batches(loader: Any) -> Any:
        for x, y in loader:
            nn.functional.cross_entropy(wrapped(x), y).backward()
            yield grad_samples(wrapped)

    train, test = case.loaders()
    solver, rows = HyperINF(), []
    for grads in batches(train):
        solver.update(grads)
        rows.append(grads)
    queries = list(batches(test))
    applied = solver.fit().apply({n: torch.cat([q[n] for q in queries]) for n in case.names})
    scores = sum(
        applied[n].flatten(1) @ torch.cat([r[n] for r in rows]).flatten(1).mT for n in case.names
    )
    assert relative_error(scores, -case.influence("hyperinf")) < 1e-6
    with pytest.raises(InputError, match="backward"):
        grad_samples(wrapped)


@pytest.mark.parametrize("name", CASES)
def test_traker_scores_with_our_inverse(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trak", reason=REASON)
    from trak import TRAKer

    from hyperinf_kernels.integrations.trak import ScoreComputer

    case = CASES[name]().float()
    rule = DataInfDamping(0.1)
    for method in ("exact", "datainf"):
        folder = tmp_path / method
        computer = functools.partial(ScoreComputer, method=method, damping=rule, rescale=False)
        build = functools.partial(
            TRAKer, model=case.model, task="image_classification", train_set_size=N_TRAIN,
            save_dir=str(folder), device="cpu", proj_dim=16, use_half_precision=False,
            logging_level=50, score_computer=computer, grad_wrt=case.names,
        )  # fmt: skip
        traker = build()
        traker.load_checkpoint(case.model.state_dict(), model_id=0)
        train, test = case.loaders()
        for batch in train:
            traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker = build()  # TRAK frees its projection matrix with the features
        traker.start_scoring_checkpoint("s", case.model.state_dict(), 0, num_targets=7)
        for batch in test:
            traker.score(batch=batch, num_samples=len(batch[0]))
        scores = torch.from_numpy(np.array(traker.finalize_scores("s"))).float()
        rows = torch.cat([grads["all"] for _, grads in read_trak(folder)])
        assert scores.shape == (N_TRAIN, 7)
        # TRAK weighs rows by one minus the label's probability; the features are what we own
        H = {"exact": oracle.exact, "datainf": oracle.datainf}[method]
        lam = oracle.Damping(datainf=0.1).of(rows, "flat")
        features = H(oracle.flatten(rows), oracle.flatten(rows), lam) / N_TRAIN
        stored = np.lib.format.open_memmap(str(folder / "0" / "features.mmap"), mode="r")
        assert relative_error(torch.from_numpy(np.array(stored)), torch.from_numpy(features)) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_less_selection_scores(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    train, query = (
        nn.functional.normalize(torch.cat([g.flatten(1) for g in case.raw(part).values()], 1))
        for part in (case.train, case.query)
    )
    torch.save(train, tmp_path / "all_orig.pt")
    batches = list(read_less(tmp_path / "all_orig.pt", batch_size=4))
    assert [ids for ids, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    rows = torch.cat([grads["all"][:, 0] for _, grads in batches])
    plain = less.calculate_influence_score(rows, query.float())
    assert relative_error(plain, train @ query.mT) < 1e-6
    exact = less.calculate_influence_score(train, query, "exact")
    truth = -oracle.influence({"all": train[:, None]}, {"all": query[:, None]}, "exact").T
    assert relative_error(exact, torch.from_numpy(truth)) < 1e-6
    chosen = less.selection_scores(exact, [0, 0, 1, 1, 1, 2, 2])
    parts = (slice(2), slice(2, 5), slice(5, 7))
    slow = [max(np.mean(truth[k, part]) for part in parts) for k in range(N_TRAIN)]
    assert relative_error(chosen, torch.tensor(slow)) < 1e-6
    whole = (tmp_path / "all_orig.pt").read_bytes()
    for part in (whole[: len(whole) // 2], b""):
        (tmp_path / "cut.pt").write_bytes(part)
        with pytest.raises(InputError, match="no complete tensor file"):
            next(read_less(tmp_path / "cut.pt"))
    with pytest.raises(InputError, match="7"):
        less.calculate_influence_score(torch.zeros(2, 7), torch.zeros(2, 6))

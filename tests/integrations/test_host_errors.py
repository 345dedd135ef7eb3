"""What the pinned hosts get wrong, each shown against an fp64 oracle, and our value beside it.

The other host errors are shown where their adapters are tested: pyDVL's averaged DataInf, dattri's
layer split, default damping and constant self-influence, captum's forgotten test loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hyperinf_kernels import KFAC, AbsoluteDamping, Attributor, InputError
from tests import oracle
from tests.integrations.cases import CLASSES, Case, mlp, relative_error

REASON = "run `make test-integrations`"
LAMBDA = 0.1


def bias_free() -> Case:
    """Two linear layers without bias, 13 and 7 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES, bias=False))
    x, y = torch.randn(20, 6).double(), torch.randint(0, CLASSES, (20,))
    train, query = (TensorDataset(x[part], y[part]) for part in (slice(13), slice(13, 20)))
    return Case(model.double(), ["0.weight", "2.weight"], train, query)


def rows(case: Case, data: TensorDataset) -> Tensor:
    return torch.cat([g.flatten(1) for g in case.raw(data).values()], 1)


def exact(case: Case) -> Tensor:
    """All parameters as one block, (query, train), positive helps."""
    train, query = ({"all": rows(case, part)[:, None]} for part in (case.train, case.query))
    damping = oracle.Damping(absolute=LAMBDA)
    return -torch.from_numpy(oracle.influence(train, query, "exact", damping))


def sides(case: Case, loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """{weight: (gradient of the training loss at its output (n, O), its input (n, I))}."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        case.model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, args, out, name=name: kept.__setitem__(name, (out, args[0]))
        )
        for name in case.names
    ]
    x, y = case.train.tensors
    total = loss(case.model(x), y)
    found = torch.autograd.grad(total, [out for out, _ in kept.values()])
    for handle in handles:
        handle.remove()
    return {
        name: (delta, act.detach())
        for (name, (_, act)), delta in zip(kept.items(), found, strict=True)
    }


@pytest.mark.parametrize("kind", ["DirectInfluence", "CgInfluence"])
def test_pydvls_gauss_newton_is_not_a_mean_over_samples(kind: str) -> None:
    pytest.importorskip("pydvl", reason=REASON)
    from pydvl.influence import torch as theirs
    from pydvl.influence.torch.influence_function_model import SecondOrderMode

    from hyperinf_kernels.integrations.pydvl import SolverInfluence

    case = mlp()
    train, _ = case.loaders()
    data = (*case.query.tensors, *case.train.tensors)
    options = {"rtol": 1e-9, "atol": 1e-12} if kind == "CgInfluence" else {}
    stock = getattr(theirs, kind)(
        case.model, nn.functional.cross_entropy, regularization=LAMBDA,
        second_order_mode=SecondOrderMode.GAUSS_NEWTON, **options,
    )  # fmt: skip
    assert relative_error(stock.fit(train).influences(*data), exact(case)) > 0.01
    method = {"DirectInfluence": "exact", "CgInfluence": "cg"}[kind]
    blocks = {"all": case.names}
    ours = SolverInfluence(case.model, nn.functional.cross_entropy, method, LAMBDA, blocks)
    assert relative_error(ours.fit(train).influences(*data), exact(case)) < 1e-6


def test_pydvl_refuses_a_damping_per_block_and_ours_takes_it() -> None:
    pytest.importorskip("pydvl", reason=REASON)
    from pydvl.influence.torch import InverseHarmonicMeanInfluence

    from hyperinf_kernels.integrations.pydvl import DataInfInfluence

    case = bias_free()
    damping = {"0": 0.1, "2": 0.4}
    structure = {name: [f"{name}.weight"] for name in damping}
    arguments = (case.model, nn.functional.cross_entropy, damping, structure)
    with pytest.raises(ValueError, match="Found not in block names"):
        InverseHarmonicMeanInfluence(*arguments)
    ours = DataInfInfluence(*arguments).fit(case.loaders()[0])
    train, query = case.raw(case.train), case.raw(case.query)
    expected = sum(
        oracle.datainf(oracle.flatten(query[f"{name}.weight"]),
                       oracle.flatten(train[f"{name}.weight"]), lam)
        @ oracle.flatten(train[f"{name}.weight"]).T
        for name, lam in damping.items()
    )  # fmt: skip
    found = ours.influences(*case.query.tensors, *case.train.tensors)
    assert relative_error(found, torch.from_numpy(np.asarray(expected))) < 1e-6


def test_pydvls_ekfac_mistakes_weights_for_a_bias() -> None:
    pytest.importorskip("pydvl", reason=REASON)
    from pydvl.influence.torch import EkfacInfluence
    from pydvl.influence.torch.util import empirical_cross_entropy_loss_fn

    case = bias_free().float()  # it knows nothing else
    lam = 1e-3
    stock = EkfacInfluence(case.model, hessian_regularization=lam).fit(case.loaders()[0])
    found = stock.influences(*case.query.tensors, *case.train.tensors)
    # its Fisher is that of this loss, which has no labels
    factors = sides(case, lambda out, y: empirical_cross_entropy_loss_fn(out))
    train, query = case.raw(case.train), case.raw(case.query)
    expected = 0.0
    solver = KFAC(AbsoluteDamping(lam))
    for name, (delta, act) in factors.items():
        F = oracle.kfac_matrix(oracle.fisher(delta), oracle.fisher(act))
        expected = expected - oracle.scores_with(F, lam, train[name], query[name])
    assert relative_error(found, torch.from_numpy(np.asarray(expected))) > 0.1
    double = {name: (d.double(), a.double()) for name, (d, a) in factors.items()}
    solver.update(
        {name: d[:, :, None] * a[:, None] for name, (d, a) in double.items()},
        tokens={name: [(d[k : k + 1], a[k : k + 1]) for k in range(len(d))]
                for name, (d, a) in double.items()},
    )  # fmt: skip
    applied = solver.fit().apply({name: query[name].double() for name in query})
    ours = sum(applied[n].flatten(1) @ train[n].double().flatten(1).mT for n in applied)
    assert relative_error(ours, torch.from_numpy(np.asarray(expected))) < 1e-6


def dattri_task(case: Case) -> Any:
    from dattri.task import AttributionTask

    def loss(params: Any, data: Any) -> Tensor:
        x, y = data
        logits = torch.func.functional_call(case.model, params, (x,))
        return nn.functional.cross_entropy(logits, y)

    return AttributionTask(loss, case.model, case.model.state_dict())


def test_dattris_ekfac_rotates_by_the_wrong_side() -> None:
    pytest.importorskip("dattri", reason=REASON)
    from dattri.algorithm.influence_function import IFAttributorEKFAC

    case = bias_free().float()
    train, test = case.loaders()
    stock = IFAttributorEKFAC(dattri_task(case), damping=1e-3)
    stock.cache(train)
    found = stock.attribute(train, test)
    double = bias_free()
    factors = sides(double, lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"))
    grads = [double.raw(part) for part in (double.train, double.query)]
    expected = 0.0
    for name, (delta, act) in factors.items():
        F = oracle.ekfac_matrix(grads[0][name], oracle.fisher(delta), oracle.fisher(act))
        expected = expected + oracle.scores_with(F, 1e-3, grads[0][name], grads[1][name])
    truth = -torch.from_numpy(np.asarray(expected))
    assert relative_error(found.T, truth) > 0.1

    def each(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    train, test = double.loaders()
    ours = Attributor(double.model, loss=each, blocks=double.names, method="ekfac", damping=1e-3)
    assert relative_error(-ours.fit(train).score(test).values, truth) < 1e-6


@pytest.mark.parametrize("kind", ["IFAttributorExplicit", "IFAttributorCG"])
def test_dattris_inverses_depend_on_the_cached_batch_size(kind: str) -> None:
    pytest.importorskip("dattri", reason=REASON)
    from dattri.algorithm import influence_function

    from hyperinf_kernels.integrations.dattri import IFAttributor

    case = bias_free()
    _, test = case.loaders()

    def cached(attributor: Any, batch: int) -> Tensor:
        loader = DataLoader(case.train, batch)
        attributor.cache(loader)
        return attributor.attribute(DataLoader(case.train, 13), test).double()

    def stock() -> Any:
        # a large damping, so that the Hessian is positive definite
        return getattr(influence_function, kind)(dattri_task(case), regularization=1.0)

    # one inverse per cached batch, added up: three batches give about three times the scores
    assert relative_error(cached(stock(), 5), cached(stock(), 13)) > 1
    method = {"IFAttributorExplicit": "exact", "IFAttributorCG": "cg"}[kind]
    damping = oracle.Damping(absolute=1.0)
    for batch in (5, 13):
        ours = IFAttributor(dattri_task(case), method, case.names, damping=1.0)
        expected = -case.influence("exact", damping).T
        assert relative_error(cached(ours, batch), expected) < 1e-6


def test_dattris_self_attribute_needs_one_batch_and_ours_any() -> None:
    pytest.importorskip("dattri", reason=REASON)
    from dattri.algorithm.influence_function import IFAttributorDataInf

    from hyperinf_kernels.integrations.dattri import IFAttributor

    case = bias_free().float()
    loader = DataLoader(case.train, 5)
    stock = IFAttributorDataInf(dattri_task(case), regularization=LAMBDA)
    stock.cache(loader)
    with pytest.raises(RuntimeError, match="size"):
        stock.self_attribute(loader)
    case = bias_free()
    loader = DataLoader(case.train, 5)
    ours = IFAttributor(dattri_task(case), "datainf", case.names, damping=LAMBDA)
    train = case.blocks(case.train)
    damping = oracle.Damping(absolute=LAMBDA)
    own = -np.diagonal(oracle.influence(train, train, "datainf", damping))
    assert relative_error(ours.self_attribute(loader), torch.from_numpy(own.copy())) < 1e-6


@pytest.mark.parametrize("relatif", ["l", "theta"])
def test_dattris_datainf_ignores_relatif_and_ours_divides(relatif: str) -> None:
    pytest.importorskip("dattri", reason=REASON)
    from dattri.algorithm.influence_function import IFAttributorDataInf

    from hyperinf_kernels.integrations import dattri as hkd

    case = bias_free().float()
    train, test = case.loaders()
    attributor = IFAttributorDataInf(dattri_task(case), regularization=LAMBDA)
    attributor.cache(train)
    plain = attributor.attribute(train, test)
    assert torch.equal(attributor.attribute(train, test, relatif_method=relatif), plain)
    double = bias_free()
    P, V = (double.raw(part) for part in (double.train, double.query))
    scores, norms = 0.0, 0.0
    for name in double.names:
        G, Q = oracle.flatten(P[name]), oracle.flatten(V[name])
        applied = oracle.datainf(G, G, LAMBDA)
        norms = norms + ((G * applied).sum(1) if relatif == "l" else (applied**2).sum(1))
        scores = scores + G @ oracle.datainf(Q, G, LAMBDA).T
    expected = torch.from_numpy(np.asarray(scores) / np.sqrt(norms)[:, None])
    with hkd.accelerate():
        # gradients are fp32 there
        assert relative_error(attributor.attribute(train, test, relatif), expected) < 1e-5
    train, test = double.loaders()
    ours = hkd.IFAttributor(dattri_task(double), "datainf", double.names, damping=LAMBDA)
    assert relative_error(ours.attribute(train, test, relatif), expected) < 1e-6
    with pytest.raises(InputError, match="relatif_method"):
        ours.attribute(train, test, "L")


def test_dattris_block_inverse_loses_digits() -> None:
    pytest.importorskip("dattri", reason=REASON)
    from dattri.algorithm.block_projected_if.core.utils import stable_inverse as stock

    from hyperinf_kernels.integrations.dattri import stable_inverse

    H = torch.from_numpy(oracle.spd(np.geomspace(1e-7, 1.0, 64), seed=1))
    damping = 1e-6
    shift = damping * float(H.trace()) / 64
    expected = torch.from_numpy(oracle.inverse(H.numpy() + shift * np.eye(64)))
    assert relative_error(stock(H, damping), expected) > 1e-3
    assert relative_error(stable_inverse(H, damping), expected) < 1e-6


def test_traks_singular_inverse_is_a_number_and_ours_refuses_it() -> None:
    pytest.importorskip("trak", reason=REASON)
    from trak.score_computers import BasicScoreComputer

    from hyperinf_kernels.integrations.trak import ScoreComputer

    def features(kind: Any, X: Tensor, lam: float = 0.0, **options: Any) -> Tensor:
        computer = kind(torch.float32, torch.device("cpu"), lambda_reg=lam, **options)
        return computer.get_x_xtx_inv(X, computer.get_xtx(X))

    torch.manual_seed(0)
    few, many = torch.randn(6, 16), torch.randn(40, 8)
    # lambda_reg is 0 unless said: rounding errors, inverted and rescaled to look like features
    assert torch.isfinite(features(BasicScoreComputer, few)).all()
    with pytest.raises(InputError, match="lambda_reg"):
        features(ScoreComputer, few)
    for lam in (0.0, 3.0):
        X = many.double().numpy()
        inverse = oracle.inverse(X.T @ X + lam * np.eye(8))
        expected = torch.from_numpy(X @ inverse)
        scaled = expected / np.abs(inverse).mean()
        assert relative_error(features(BasicScoreComputer, many, lam), scaled) < 1e-5
        assert relative_error(features(ScoreComputer, many, lam), scaled) < 1e-6
        assert relative_error(features(ScoreComputer, many, lam, rescale=False), expected) < 1e-6


def test_quandas_dattri_wrapper_gives_one_self_influence_to_all() -> None:
    pytest.importorskip("quanda", reason=REASON)
    from quanda.explainers.wrappers import DattriIFDataInf

    from hyperinf_kernels.integrations.quanda import DataInfExplainer

    def build(model: nn.Module) -> Callable[[Any, Any], Tensor]:
        def loss(params: Any, batch: Any) -> Tensor:
            logits = torch.func.functional_call(model, params, (batch[0],))
            return nn.functional.cross_entropy(logits, batch[1])

        return loss

    case = bias_free().float()
    stock = DattriIFDataInf(
        case.model, case.train, build, regularization=LAMBDA, batch_size=5, device="cpu"
    )
    found = stock.self_influence()
    assert float(found.std()) < 1e-6 * float(found.mean())
    case = bias_free()
    ours = DataInfExplainer(case.model, case.train, blocks=case.names, damping=LAMBDA)
    train = case.blocks(case.train)
    damping = oracle.Damping(absolute=LAMBDA)
    own = -np.diagonal(oracle.influence(train, train, "datainf", damping))
    assert relative_error(ours.self_influence(), torch.from_numpy(own.copy())) < 1e-6

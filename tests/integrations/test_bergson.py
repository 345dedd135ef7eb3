"""bergson 2.5.1: its attributor on stores we write, preconditioned by files and in process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("bergson", reason="run `make test-integrations`")

from bergson.data import create_index, load_gradients
from bergson.gradients import GradientProcessor
from bergson.hessians.preconditioner import load_preconditioner
from bergson.query.attributor import Attributor

from hyperinf_kernels import DataInf, Exact, HyperINF, InputError
from hyperinf_kernels.integrations import bergson as hkb
from hyperinf_kernels.store import bergson as store
from tests import oracle
from tests.integrations.cases import CASES, Case, relative_error


def layers(case: Case, data: object) -> dict[str, Tensor]:
    """{module: (n, O, I)} in the parameter's own layout, weights alone."""
    return {
        store.module_of(name): grad
        for name, grad in case.raw(data).items()
        if name.endswith("weight")
    }


def blocks(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: g.mT if "lora_B" in name else g for name, g in grads.items()}


def expected(case: Case, method: str) -> Tensor:
    train, query = (blocks(layers(case, data)) for data in (case.train, case.query))
    return -torch.from_numpy(oracle.influence(train, query, method)).T


def index(folder: Path, case: Case) -> dict[str, Tensor]:
    """The training gradients as a bergson store in unequal batches; the queries as bergson asks."""
    train = layers(case, case.train)
    parts = (slice(0, 5), slice(5, 10), slice(10, None))
    store.write(folder, [blocks({n: g[part] for n, g in train.items()}) for part in parts])
    GradientProcessor(projection_dim=None).save(folder)
    return {n: g.flatten(1).float() for n, g in layers(case, case.query).items()}


def scores(attributor: Attributor, queries: dict[str, Tensor], n: int) -> Tensor:
    """(train, query) from bergson's search over all rows."""
    values, rows = attributor.search(dict(queries), n)
    return torch.zeros_like(values).scatter(1, rows, values).T


def fitted(folder: Path, solver: object, shapes: dict[str, tuple[int, int]]) -> object:
    for _, grads in store.read(folder, shapes, batch_size=4):
        solver.update(grads)
    return solver.fit()


def open_attributor(
    folder: Path, hessian: Path | str | None = None, **options: object
) -> Attributor:
    return Attributor(
        folder, device="cpu", dtype=torch.float32, hessian_path=hessian,
        inversion_cfg=hkb.inversion_config(), **options,
    )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scores_by_files_and_in_process_are_hyperinfs(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    queries = index(tmp_path / "index", case)
    shapes = {n: tuple(g.shape[1:]) for n, g in layers(case, case.query).items()}
    solver = fitted(tmp_path / "index", HyperINF(), shapes)
    hessian = hkb.write_hessian(tmp_path / "hessian", solver)
    by_files = scores(open_attributor(tmp_path / "index", hessian), queries, 13)
    # gradients, factors and scores are fp32 in bergson
    assert relative_error(by_files, expected(case, "hyperinf")) < 1e-5
    with hkb.preconditioning(solver):
        in_process = scores(open_attributor(tmp_path / "index", "unused"), queries, 13)
    assert relative_error(in_process, expected(case, "hyperinf")) < 1e-5
    with pytest.raises(InputError, match="already"):
        hkb.write_hessian(tmp_path / "hessian", solver)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["datainf", "exact"])
def test_any_solver_preconditions_in_process(name: str, method: str, tmp_path: Path) -> None:
    case = CASES[name]()
    queries = index(tmp_path / "index", case)
    shapes = {n: tuple(g.shape[1:]) for n, g in layers(case, case.query).items()}
    solver = fitted(tmp_path / "index", {"datainf": DataInf, "exact": Exact}[method](), shapes)
    with hkb.preconditioning(solver, shapes):
        found = scores(open_attributor(tmp_path / "index", "unused"), queries, 13)
    assert relative_error(found, expected(case, method)) < 1e-5


def test_unit_normalised_scores_take_the_inverse_root(tmp_path: Path) -> None:
    case = CASES["mlp"]()
    queries = index(tmp_path / "index", case)
    shapes = {n: tuple(g.shape[1:]) for n, g in layers(case, case.query).items()}
    solver = fitted(tmp_path / "index", HyperINF(), shapes)
    hessian = hkb.write_hessian(tmp_path / "hessian", solver)
    found = scores(open_attributor(tmp_path / "index", hessian, unit_norm=True), queries, 13)
    sides = []
    for grads in (layers(case, case.train), layers(case, case.query)):
        rooted = []
        for name, lam in solver.lambdas.items():
            C = oracle.damped(oracle.gfim(layers(case, case.train)[name]), lam)
            root = oracle.spectral(C, lambda mu: mu**-0.5)
            rooted.append(oracle.flatten(oracle.f64(grads[name]) @ root))
        rows = np.concatenate(rooted, 1)
        sides.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert relative_error(found, torch.from_numpy(sides[0] @ sides[1].T)) < 1e-5


def test_a_projected_store_is_preconditioned_by_its_own_dense_route(tmp_path: Path) -> None:
    torch.manual_seed(0)
    p, n = 4, 23
    train = {m: torch.randn(n, p * p).double() for m in ("a", "b")}
    query = {m: torch.randn(3, p * p) for m in ("a", "b")}
    store.write(tmp_path / "index", [{m: g[:9] for m, g in train.items()},
                                     {m: g[9:] for m, g in train.items()}])  # fmt: skip
    processor = GradientProcessor(projection_dim=p, projection_seed=3)
    processor.save(tmp_path / "index")
    solver = fitted(tmp_path / "index", HyperINF(), dict.fromkeys(train, (p, p)))
    hessian = hkb.write_dense_hessian(tmp_path / "hessian", solver, processor)
    found = scores(open_attributor(tmp_path / "index", hessian), query, n)
    square = [{m: g.reshape(-1, p, p).float() for m, g in part.items()} for part in (train, query)]
    exact = -torch.from_numpy(oracle.influence(*square, "hyperinf")).T
    assert relative_error(found, exact) < 1e-5


def test_a_released_filter_is_written_as_its_spectrum(tmp_path: Path) -> None:
    case = CASES["lora transformer"]()
    train = blocks(layers(case, case.train))
    solver = HyperINF(mode="paper", iterations=15, extra_damping=0.0)
    solver.update(train)
    hkb.write_hessian(tmp_path, solver.fit())
    loaded = load_preconditioner(tmp_path, inversion_cfg=hkb.inversion_config())
    query = layers(case, case.query)
    applied = loaded.apply({n: g.flatten(1).float() for n, g in query.items()})
    for name, grads in train.items():
        lam = solver.lambdas[name]
        W = oracle.hyperinf_paper(blocks(query)[name], grads, lam, 15)
        W = W.swapaxes(1, 2) if "lora_B" in name else W
        assert relative_error(applied[name], torch.from_numpy(oracle.flatten(W))) < 1e-5


def test_both_libraries_read_each_others_stores(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((7, 10)).astype(np.float32)
    memory = create_index(tmp_path / "theirs", 7, {"a": 6, "b": 4}, "float32")
    memory[:] = rows
    memory.flush()
    batches = list(store.read(tmp_path / "theirs", {"a": (2, 3), "b": (4, 1)}, batch_size=3))
    assert [ids for ids, _ in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    joined = torch.cat([torch.cat([g.flatten(1) for g in b.values()], 1) for _, b in batches])
    assert torch.equal(joined, torch.from_numpy(rows))
    store.write(tmp_path / "ours", (grads for _, grads in batches))
    assert np.array_equal(load_gradients(tmp_path / "ours"), rows)
    with pytest.raises(InputError, match="already"):
        store.write(tmp_path / "ours", [])


def test_bergson_ranks_by_nan_and_our_solvers_name_the_row(tmp_path: Path) -> None:
    case = CASES["mlp"]()
    train = layers(case, case.train)
    queries = {n: g.flatten(1).float() for n, g in layers(case, case.query).items()}
    name = next(iter(train))
    train[name][6, 1, 2] = torch.nan
    store.write(tmp_path / "index", [blocks(train)])
    GradientProcessor(projection_dim=None).save(tmp_path / "index")
    attributor = Attributor(tmp_path / "index", device="cpu", dtype=torch.float32)
    values, rows = attributor.search(queries, 3)
    assert torch.isnan(values[:, 0]).all(), "bergson puts the broken row first"
    assert (rows[:, 0] == 6).all()
    shapes = {n: tuple(g.shape[1:]) for n, g in train.items()}
    with pytest.raises(InputError, match=rf"(?s){name}.*6"):
        fitted(tmp_path / "index", HyperINF(), shapes)


def test_a_damaged_store_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bergson gradient store"):
        next(store.read(tmp_path))
    store.write(tmp_path / "s", [{"a": torch.ones(3, 4)}])
    with pytest.raises(InputError, match="does not fit"):
        next(store.read(tmp_path / "s", {"a": (3, 3)}))
    (tmp_path / "s" / "gradients.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="5 bytes"):
        next(store.read(tmp_path / "s"))
    info = json.loads((tmp_path / "s" / "info.json").read_text())
    (tmp_path / "s" / "info.json").write_text(json.dumps(info | {"attribute_tokens": True}))
    with pytest.raises(InputError, match="per token"):
        next(store.read(tmp_path / "s"))
    with pytest.raises(InputError, match="no gradients"):
        store.write(tmp_path / "empty", [])
    assert not (tmp_path / "empty" / "gradients.bin").exists()

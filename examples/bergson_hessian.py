"""HyperINF in bergson by files: a gradient store, a Hessian beside it, bergson's own search."""

import tempfile
from pathlib import Path

import torch
from bergson.gradients import GradientProcessor
from bergson.query.attributor import Attributor
from data import trained

import hyperinf_kernels as hk
from hyperinf_kernels.integrations.bergson import inversion_config, write_hessian
from hyperinf_kernels.store import bergson as store


def loss(module, batch):
    return torch.nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")


def gradients(data):
    found = hk.per_sample_gradients(model, data.tensors, loss=loss, blocks="weight$")
    return {name.removesuffix(".weight"): grad for name, grad in found.items()}


model, train, query = trained()
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    store.write(folder / "index", [gradients(train)])
    GradientProcessor(projection_dim=None).save(folder / "index")
    solver = hk.HyperINF()
    shapes = {"0": (16, 8), "2": (2, 16)}
    for _, grads in store.read(folder / "index", shapes):
        solver.update(grads)
    attributor = Attributor(
        folder / "index", device="cpu", dtype=torch.float32,
        hessian_path=write_hessian(folder / "hessian", solver.fit()),
        inversion_cfg=inversion_config(),
    )  # fmt: skip
    values, rows = attributor.search({n: g.flatten(1) for n, g in gradients(query).items()}, 1)
    print("most helpful:", rows[:, 0].tolist())

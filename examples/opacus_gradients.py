"""opacus' per-sample gradients in, influence out: any source of gradients will do."""

import torch
from data import trained
from opacus import GradSampleModule
from torch.utils.data import DataLoader

import hyperinf_kernels as hk
from hyperinf_kernels.integrations.opacus import grad_samples

model, train, query = trained()
wrapped = GradSampleModule(model.train())


def gradients(data):
    parts = []
    for x, y in DataLoader(data, 16):
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        parts.append(grad_samples(wrapped))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


scores = hk.influence(gradients(train), gradients(query), method="hyperinf")
print("most helpful:", [ids[0] for ids in scores.proponents(1).ids])

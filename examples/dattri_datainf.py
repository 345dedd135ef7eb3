"""A dattri script, made fast by one line, and HyperINF beside it."""

import torch
from data import trained
from dattri.algorithm.influence_function import IFAttributorDataInf
from dattri.task import AttributionTask
from torch.utils.data import DataLoader

from hyperinf_kernels.integrations import dattri as hkd

hkd.accelerate()

model, train, query = trained()


def loss(params, data):
    x, y = data
    return torch.nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)


task = AttributionTask(loss, model, model.state_dict())
train_loader, query_loader = DataLoader(train, 16), DataLoader(query, 2)
for attributor in (IFAttributorDataInf(task, regularization=0.1), hkd.IFAttributorHyperINF(task)):
    attributor.cache(train_loader)
    scores = attributor.attribute(train_loader, query_loader)
    print(type(attributor).__name__, "most helpful:", scores.argmax(0).tolist())

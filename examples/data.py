"""A small labelled data set and a classifier trained on it, for the scripts beside this file."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def trained() -> tuple[nn.Module, TensorDataset, TensorDataset]:
    """A model, 60 training samples of which the first three have a wrong label, 5 queries."""
    torch.manual_seed(0)
    x = torch.randn(65, 8)
    y = (x[:, 0] > 0).long()
    y[:3] = 1 - y[:3]
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:60]), y[:60]).backward()
        optimizer.step()
    return model.eval(), TensorDataset(x[:60], y[:60]), TensorDataset(x[60:], y[60:])

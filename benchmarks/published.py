"""The published procedure, restated plainly: one sample at a time, Python loops over everything.

What the released scripts of DataInf and HyperINF do, in our own words and without their slips:
gradients by a backward pass per sample, stored as dictionaries of CPU tensors; DataInf as a loop
over queries, blocks and training samples, with the damping computed anew for every query; HyperINF
as a loop over blocks with the averaged query, 30 steps of Schulz from 5e-5 I.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Sample = dict[str, Tensor]


def gradients(
    model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> list[Sample]:
    """A dictionary {parameter: gradient} per sample, LoRA B transposed."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    model.eval()
    out = []
    for batch in batches:
        model.zero_grad()
        loss(model, batch).sum().backward()
        sample = {}
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert parameter.grad is not None
                grad = parameter.grad.cpu()
                sample[name] = grad.T.clone() if "lora_B" in name else grad.clone()
        out.append(sample)
    model.zero_grad()
    return out


def damping(train: list[Sample], name: str) -> float:
    """0.1 x the mean squared gradient entry, as a mean over a loop of samples."""
    squares = torch.zeros(len(train))
    for i, sample in enumerate(train):
        squares[i] = torch.mean(sample[name] ** 2)
    return float(torch.mean(squares)) / 10


def datainf_products(train: list[Sample], query: Sample) -> Sample:
    """H^-1 v of one query by DataInf, block by block and sample by sample."""
    products = {}
    for name, v in query.items():
        lam = damping(train, name)
        total = torch.zeros_like(v)
        for sample in train:
            g = sample[name]
            weight = torch.sum(v * g) / (lam + torch.sum(g**2))
            total += (v - weight * g) / (len(train) * lam)
        products[name] = total
    return products


def hyperinf_products(
    train: list[Sample], query: Sample, iterations: int = 30, start: float = 5e-5,
    extra: float = 1e-3,
) -> Sample:  # fmt: skip
    """V (C + lambda I)^-1 of one query by the released Schulz iteration."""
    products = {}
    for name, v in query.items():
        size = v.shape[1]
        C = torch.zeros(size, size)
        for sample in train:
            C += sample[name].T @ sample[name] / len(train)
        A = C + (damping(train, name) + extra) * torch.eye(size)
        X = start * torch.eye(size)
        for _ in range(iterations):
            X = X @ (2 * torch.eye(size) - A @ X)
        products[name] = v @ X
    return products


def hyperinf_products_numpy(
    train: list[Sample], query: Sample, iterations: int = 30, start: float = 5e-5,
    extra: float = 1e-3,
) -> Sample:  # fmt: skip
    """The same as the repository's first file has it: fp64 steps, and a third product to stop.

    The norm it looks at leaves out the 0.001, so it never stops; C is still summed in fp32.
    """
    products = {}
    for name, v in query.items():
        size = v.shape[1]
        C = torch.zeros(size, size)
        for sample in train:
            C += sample[name].T @ sample[name] / len(train)
        undamped = C.numpy() + damping(train, name) * np.eye(size)
        A = undamped + extra * np.eye(size)
        X = start * np.eye(size)
        for _ in range(iterations):
            X = X @ (2 * np.eye(size) - A @ X)
            if np.linalg.norm(np.eye(size) - undamped @ X) < 1e-6:
                break
        products[name] = v @ torch.from_numpy(X).float()
    return products


def scores(train: list[Sample], products: Sample) -> Tensor:
    """Minus the sum over blocks of dot products, sample by sample."""
    values = torch.zeros(len(train))
    for k, sample in enumerate(train):
        for name, product in products.items():
            values[k] -= torch.sum(product * sample[name])
    return values


def mean_sample(samples: list[Sample]) -> Sample:
    """The averaged query of both papers."""
    return {name: torch.stack([s[name] for s in samples]).mean(0) for name in samples[0]}

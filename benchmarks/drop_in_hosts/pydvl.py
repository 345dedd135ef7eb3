"""pyDVL's DataInf, `InverseHarmonicMeanInfluence`, against ours in pyDVL's own script."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from hyperinf_kernels.integrations.pydvl import DataInfInfluence

from ..registry import Measurement, interleaved, measurements

from pydvl.influence import SequentialInfluenceCalculator  # isort: skip
from pydvl.influence.torch import InverseHarmonicMeanInfluence  # isort: skip
from pydvl.influence.torch.util import NestedTorchCatAggregator  # isort: skip


def measure(quick: bool) -> Iterator[Measurement]:
    """Fit on 256 samples, score 32 queries in batches of 8 against them, three blocks."""
    n, m, width, hidden = (64, 16, 12, 8) if quick else (256, 32, 60, 64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 32), nn.Tanh(),
                          nn.Linear(32, 4))  # fmt: skip
    data = TensorDataset(torch.randn(n + m, width), torch.randint(0, 4, (n + m,)))
    train = DataLoader(Subset(data, range(n)), 32)
    test = DataLoader(Subset(data, range(n, n + m)), 8)
    blocks = OrderedDict((f"layer {k}", [f"{k}.weight", f"{k}.bias"]) for k in (0, 2, 4))

    def script(kind: Any) -> Tensor:
        fitted = kind(
            model, nn.functional.cross_entropy, regularization=0.1, block_structure=blocks
        ).fit(train)
        lazy = SequentialInfluenceCalculator(fitted).influences(test, train)
        return lazy.compute(aggregator=NestedTorchCatAggregator())

    times = interleaved(
        {
            "stock": lambda: script(InverseHarmonicMeanInfluence),
            "drop-in": lambda: script(DataInfInfluence),
        },
        1 if quick else 3,
    )
    size = sum(p.numel() for p in model.parameters())
    case = f"DataInf, D={size}, N={n}, M={m} in batches of 8, 3 blocks"
    yield from measurements(case, times, "stock")

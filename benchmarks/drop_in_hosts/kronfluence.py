"""kronfluence's pairwise scoring on its own EK-FAC factors and on ours."""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from hyperinf_kernels import HyperINF, per_sample_gradients
from hyperinf_kernels.integrations import kronfluence as hkk

from ..registry import Measurement, measurements

from kronfluence.analyzer import Analyzer, prepare_model  # isort: skip
from kronfluence.task import Task  # isort: skip


class Classify(Task):
    """Summed cross-entropy."""

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def measure(quick: bool) -> Iterator[Measurement]:
    """Factors and pairwise scores of a bias-free MLP."""
    n, m, width = (64, 8, 32) if quick else (2000, 100, 256)
    torch.manual_seed(0)
    sizes = (width, width, width, 10)
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layers += [nn.Linear(i, o, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    names = [name for name, _ in model.named_parameters()]
    data = TensorDataset(torch.randn(n + m, width), torch.randint(0, 10, (n + m,)))
    train, query = Subset(data, range(n)), Subset(data, range(n, n + m))
    found: dict[str, dict[str, list[float]]] = {
        stage: {"stock": [], "drop-in": []} for stage in ("factors", "pairwise scores", "both")
    }

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1], reduction="none")

    def script(provider: str, folder: str) -> None:
        task = Classify()
        prepared = prepare_model(copy.deepcopy(model), task)
        analyzer = Analyzer("bench", prepared, task, cpu=True, output_dir=folder)
        start = time.perf_counter()
        if provider == "stock":
            analyzer.fit_all_factors("f", train, per_device_batch_size=256)
        else:
            solver = HyperINF()
            for batch in torch.utils.data.DataLoader(train, 256):
                solver.update(per_sample_gradients(model, batch, loss=loss, blocks=names))
            hkk.write_factors(analyzer, "f", solver.fit())
        middle = time.perf_counter()
        analyzer.compute_pairwise_scores(
            "s", "f", query, train, per_device_query_batch_size=50,
            per_device_train_batch_size=256,
            score_args=None if provider == "stock" else hkk.score_arguments(),
        )  # fmt: skip
        end = time.perf_counter()
        for stage, seconds in (("factors", middle - start), ("pairwise scores", end - middle),
                               ("both", end - start)):  # fmt: skip
            found[stage][provider].append(seconds)

    for _ in range(1 if quick else 3):
        for provider in ("stock", "drop-in"):
            with tempfile.TemporaryDirectory() as folder:
                script(provider, folder)
    case = f"EK-FAC against HyperINF in its files, 3 x {width}, N={n}, M={m}"
    for stage, times in found.items():
        yield from measurements(f"{case}: {stage}", times, "stock")

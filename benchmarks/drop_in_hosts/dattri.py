"""dattri's DataInf and its block inverse, stock and accelerated, in dattri's own script."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hyperinf_kernels.integrations import dattri as hkd

from ..registry import Measurement, interleaved, measurements

from dattri.algorithm.block_projected_if.core.utils import stable_inverse  # isort: skip
from dattri.algorithm.influence_function import IFAttributorDataInf  # isort: skip
from dattri.task import AttributionTask  # isort: skip


def measure(quick: bool) -> Iterator[Measurement]:
    """`attribute` at D = 13,098, N = 512, M = 64, then single and batched inverses."""
    n, m = (64, 8) if quick else (512, 64)
    width, hidden = (20, 16) if quick else (100, 98)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 32), nn.Tanh(),
                          nn.Linear(32, 4))  # fmt: skip

    def loss(params: Any, data: Any) -> Tensor:
        x, y = data
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    data = TensorDataset(torch.randn(n + m, width), torch.randint(0, 4, (n + m,)))
    parts = (
        torch.utils.data.Subset(data, range(n)),
        torch.utils.data.Subset(data, range(n, n + m)),
    )
    train, test = (DataLoader(part, 32) for part in parts)
    found: dict[str, tuple[float, float, Tensor]] = {}

    def script(fast: bool) -> None:
        with hkd.accelerate() if fast else contextlib.nullcontext():
            start = time.perf_counter()
            task = AttributionTask(loss, model, model.state_dict())
            attributor = IFAttributorDataInf(task, regularization=0.1)
            attributor.cache(train)
            middle = time.perf_counter()
            scores = attributor.attribute(train, test).detach()
        end = time.perf_counter()
        found["drop-in" if fast else "stock"] = (end - middle, end - start, scores)

    size = sum(p.numel() for p in model.parameters())
    case = f"DataInf, D={size}, N={n}, M={m}, batches of 32"
    seconds: dict[str, dict[str, list[float]]] = {
        stage: {"stock": [], "drop-in": []} for stage in ("attribute", "cache and attribute")
    }
    for _ in range(2 if quick else 7):
        for fast in (False, True):
            script(fast)
            name = "drop-in" if fast else "stock"
            seconds["attribute"][name].append(found[name][0])
            seconds["cache and attribute"][name].append(found[name][1])
    gap = float(
        (found["drop-in"][2] - found["stock"][2]).abs().max() / found["stock"][2].abs().max()
    )
    for stage, times in seconds.items():
        yield from measurements(f"{case}: {stage}", times, "stock", {"drop-in": gap})

    for count, d in ((4, 32),) if quick else ((96, 64), (24, 256), (1, 1024)):
        P = torch.randn(count, 2 * d, d)
        H = P.mT @ P / (2 * d)
        times = interleaved(
            {
                "stock": lambda H=H: [stable_inverse(h, 1e-3) for h in H],
                "drop-in": lambda H=H: hkd.stable_inverse(H, 1e-3),
                "drop-in, one by one": lambda H=H: [hkd.stable_inverse(h, 1e-3) for h in H],
            },
            3 if quick else 7,
        )
        exact = torch.linalg.inv(_damped(H.double(), 1e-3))
        errors = {
            "stock": _error(torch.stack([stable_inverse(h, 1e-3) for h in H]), exact),
            "drop-in": _error(hkd.stable_inverse(H, 1e-3), exact),
        }
        yield from measurements(f"LoGra inverse, {count} x {d}", times, "stock", errors)


def _damped(H: Tensor, c: float) -> Tensor:
    d = H.shape[-1]
    shift = c * H.diagonal(dim1=-2, dim2=-1).sum(-1) / d
    return H + shift[:, None, None] * torch.eye(d, dtype=H.dtype)


def _error(X: Tensor, exact: Tensor) -> float:
    return float((X.double() - exact).norm() / exact.norm())

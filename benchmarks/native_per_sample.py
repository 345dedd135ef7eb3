"""Per-sample gradients and what is reduced from them, against both forms in torch.

The note of a row is how far the memory of the process rose during one call, the result included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.ops import reference

from .memory import peak_memory
from .native import OURS, error_of, need_kernels, times_of
from .registry import Measurement, benchmark, measurements


@benchmark("native-per-sample")
def per_sample(quick: bool) -> Iterator[Measurement]:
    """LoRA of rank 8 on both sides, and a full layer, 128 tokens."""
    need_kernels()
    for name, samples, rows, cols in (
        ("LoRA A r=8", 64, 8, 1024), ("LoRA B r=8", 64, 1024, 8), ("full", 8, 1024, 1024),
    ):  # fmt: skip
        yield from _per_sample(name, samples // 4 if quick else samples, 128, rows, cols)


def _per_sample(
    name: str, samples: int, tokens: int, rows: int, cols: int
) -> Iterator[Measurement]:
    delta, act = torch.randn(samples, tokens, rows), torch.randn(samples, tokens, cols)
    V = torch.randn(8, rows, cols)
    g = (delta.double().mT @ act.double()).flatten(1)
    pair = delta, act
    ops: dict[str, tuple[Callable[[bool], Tensor], Callable[[], Tensor], Tensor]] = {
        "per_sample_grad": (
            lambda ghost: reference.per_sample_grad(*pair).flatten(1),
            lambda: hk.per_sample_grad(*pair).flatten(1), g,
        ),
        "per_sample_norm_sq": (
            lambda ghost: reference.per_sample_norm_sq(*pair, ghost),
            lambda: hk.per_sample_norm_sq(*pair), g.square().sum(1),
        ),
        "per_sample_dot, m=1": (
            lambda ghost: reference.per_sample_dot(*pair, V[:1], ghost),
            lambda: hk.per_sample_dot(*pair, V[:1]), g @ V[:1].double().flatten(1).mT,
        ),
        "per_sample_dot, m=8": (
            lambda ghost: reference.per_sample_dot(*pair, V, ghost),
            lambda: hk.per_sample_dot(*pair, V), g @ V.double().flatten(1).mT,
        ),
        "pairwise_dot": (
            lambda ghost: reference.pairwise_dot(*pair, *pair, ghost),
            lambda: hk.pairwise_dot(*pair, *pair), g @ g.mT,
        ),
    }  # fmt: skip
    for op, (torchs, ours, truth) in ops.items():
        materialise, ghost = "torch, materialised", "torch, ghost"
        providers: dict[str, Callable[[], Tensor]] = {
            materialise: lambda run=torchs: run(False),
            ghost: lambda run=torchs: run(True),
            OURS: ours,
        }
        if op == "per_sample_grad" or (op == "pairwise_dot" and min(rows, cols) == 8):
            del providers[ghost]  # no such form, or minutes of it
        errors = {provider: error_of(call(), truth) for provider, call in providers.items()}
        times = times_of(providers)
        case = f"{op}, {name}: {samples} x {tokens} x ({rows}, {cols})"
        gigaflop = 2 * samples * tokens * rows * cols / 1e9
        for row in measurements(case, times, materialise, errors, gigaflop, "GFLOP"):
            megabytes = peak_memory(providers[row.provider]) / 1e6
            yield replace(row, note=f"{megabytes:.3g} MB at the peak")

"""Measures the rates of `costs` on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .accumulate import gfim_accumulate_, gram_accumulate_
from .costs import OPERATIONS, SMALLEST, Rate, Rates
from .spd_inverse import spd_inverse

SIZES = (int(SMALLEST), 64, 256, 1024, 2048)
REPEATS = 5
BATCH_NUMBERS = 1 << 20  # smaller matrices are timed in batches of about so many numbers
THIN_ROWS = 16


def calibrate(
    device: str = "cpu", sizes: tuple[int, ...] = SIZES,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Rates:  # fmt: skip
    """Time every operation at each size, median of `REPEATS`, and fit peak and half-peak size.

    About a minute on two cores.
    """
    table = {}
    for i, name in enumerate(OPERATIONS):
        if progress is not None:
            progress("operations", i, len(OPERATIONS))
        table[name] = fit([(d, _rate(name, d, device)) for d in sizes])
    if progress is not None:
        progress("operations", len(OPERATIONS), len(OPERATIONS))
    where = platform.processor() or platform.machine()
    if device != "cpu":
        where = torch.cuda.get_device_name(device)
    source = f"calibrated on {where}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return Rates(torch.device(device).type, source, table)


def fit(points: list[tuple[int, float]]) -> Rate:
    """Peak and half of rate = peak d / (d + half) through (d, flop per second) points.

    1 / rate = 1 / peak + (half / peak) / d is a line in 1 / d, fitted for equal relative errors; a
    slope below zero (small matrices faster than large ones) becomes the rate of the largest size.
    """
    x = [1 / d for d, _ in points]
    y = [1 / rate for _, rate in points]
    weights = [rate**2 for _, rate in points]
    mean_x, mean_y = statistics.fmean(x, weights), statistics.fmean(y, weights)
    spread = sum(w * (a - mean_x) ** 2 for w, a in zip(weights, x, strict=True))
    slope = sum(w * (a - mean_x) * (b - mean_y) for w, a, b in zip(weights, x, y, strict=True)) / (
        spread or 1
    )
    level = mean_y - slope * mean_x
    if slope < 0 or level <= 0:
        return Rate(points[-1][1], 0.0)
    return Rate(1 / level, slope / level)


def _rate(name: str, d: int, device: str) -> float:
    """Flop per second of one operation on matrices of d on a side."""
    operation, _, word = name.partition("_")
    dtype = torch.float32 if word == "fp32" else torch.float64
    batch = max(1, BATCH_NUMBERS // d**2)
    generator = torch.Generator().manual_seed(d)
    rows = torch.randn(batch, d, d, generator=generator, dtype=torch.float32, device="cpu").to(
        device
    )
    A = (rows @ rows.mT / d + torch.eye(d, dtype=torch.float32, device=device)).to(dtype)
    if operation == "gemm":
        return 2 * d**3 * batch / _seconds(lambda: A @ A, device)
    if operation == "factor":
        return d**3 / 3 * batch / _seconds(lambda: torch.linalg.cholesky(A), device)
    if operation == "inverse":
        return d**3 * batch / _seconds(lambda: spd_inverse(A, method="direct"), device)
    if operation == "thin":
        V = A[:, :THIN_ROWS].clone()
        return 2 * THIN_ROWS * d**2 * batch / _seconds(lambda: V @ A, device)
    if operation == "gram":
        K = torch.zeros(batch, d, d, dtype=torch.float32, device=device)
        return 2 * d**3 * batch / _seconds(lambda: gram_accumulate_(K, rows), device)
    total = torch.zeros(d, d, dtype=torch.float64, device=device)
    samples = rows.reshape(-1, 8, d)
    return 2 * batch * d**3 / _seconds(lambda: gfim_accumulate_(total, samples), device)


def _seconds(call: Callable[[], object | Tensor], device: str) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    # the first call warms up
    return max(1e-9, statistics.median(times[1:]))

"""Batches of small inverses: Cholesky in SIMD lanes, Schulz steps in cache, and torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.ops.schedule import Step

from .native import OURS, error_of, need_kernels, times_of
from .registry import Measurement, benchmark, measurements


@benchmark("native-inverses")
def inverses(quick: bool) -> Iterator[Measurement]:
    """spd_inverse and Schulz steps of condition 1e3, four sizes."""
    need_kernels()
    for side, batch in ((16, 4096), (32, 2048), (64, 512), (128, 128)):
        yield from _spd_inverse(side, batch // 8 if quick else batch)
        yield from _schulz(side, batch // 8 if quick else batch)


def _spd_inverse(side: int, batch: int) -> Iterator[Measurement]:
    basis = torch.linalg.qr(torch.randn(batch, side, side, dtype=torch.float64))[0]
    A = ((basis * torch.logspace(0, -3, side, dtype=torch.float64)) @ basis.mT).float()
    A = (A + A.mT) / 2
    truth = torch.linalg.inv(A.double())
    direct = native_inverse(A)
    baseline = "torch.cholesky_inverse"
    providers: dict[str, Callable[[], Tensor]] = {
        baseline: lambda: torch.cholesky_inverse(torch.linalg.cholesky(A)),
        "torch.linalg.inv": lambda: torch.linalg.inv(A),
        OURS: direct,
        f"{OURS}, with its checks": lambda: hk.spd_inverse(A),
    }
    errors = {name: error_of(call(), truth) for name, call in providers.items()}
    case = f"spd_inverse, {batch} of {side} x {side}"
    gigaflop = batch * side**3 / 1e9
    yield from measurements(case, times_of(providers), baseline, errors, gigaflop, "GFLOP")


def _schulz(side: int, batch: int) -> Iterator[Measurement]:
    """20 plain steps, as published, and the Chebyshev steps that leave the same residual."""
    basis = torch.linalg.qr(torch.randn(batch, side, side, dtype=torch.float64))[0]
    A = ((basis * torch.logspace(0, -3, side, dtype=torch.float64)) @ basis.mT).float()
    A = (A + A.mT) / 2
    truth = torch.linalg.inv(A.double())
    eye, count = torch.eye(side), 20
    ones = torch.ones(batch)
    plain = [Step(2, {"b0": ones, "b1": ones})] * count

    def loop() -> Tensor:
        X = eye.expand(batch, side, side)
        for _ in range(count):
            X = torch.bmm(X, torch.baddbmm(2 * eye, A, X, alpha=-1))
        return X

    baseline = "torch, baddbmm loop of 20 steps"
    providers: dict[str, Callable[[], Tensor]] = {
        baseline: loop,
        f"{OURS}, 20 steps": lambda: hk.ops.cpu.schulz(A, ones, plain)[0],
        f"{OURS}, schulz_inverse with its certificate": lambda: hk.schulz_inverse(
            A, bounds=(1e-3, 1.001)
        ),
        "torch.linalg.inv": lambda: torch.linalg.inv(A),
    }
    errors = {name: error_of(call(), truth) for name, call in providers.items()}
    case = f"schulz, {batch} of {side} x {side}"
    gigaflop = 4 * count * batch * side**3 / 1e9
    yield from measurements(case, times_of(providers), baseline, errors, gigaflop, "GFLOP")


def native_inverse(A: Tensor) -> Callable[[], Tensor]:
    """The kernel without the face's test of symmetry and finiteness, which the rivals lack too."""

    def run() -> Tensor:
        inverse, info = torch.ops.hyperinf.spd_inverse(A)
        if info.any():
            raise ValueError("a matrix is not positive definite")
        return inverse

    return run

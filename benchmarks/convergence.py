"""Seconds to A^-1 v on the matrices of the published convergence simulation, Cholesky included.

Products tell how far the iterations are apart; only seconds tell when a factorisation wins, which
on a processor is always. The released iteration runs the 25 steps that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hyperinf_kernels as hk

from .registry import Measurement, benchmark, interleaved, measurements

SAMPLES, DAMPING, START, STEPS = 200, 0.01, 5e-5, 25
RELEASED = "released iteration, 25 steps"


@benchmark("convergence")
def convergence(quick: bool) -> Iterator[Measurement]:
    """One query against A = (1/N) sum t t^T + 0.01 I, N = 200, in fp32."""
    for d, repeats in ((256, 7),) if quick else ((512, 7), (1024, 7), (2048, 3)):
        generator = torch.Generator().manual_seed(0)
        T = torch.randn(SAMPLES, d, generator=generator)
        v = torch.randn(1, d, generator=generator)
        A = T.mT @ T / SAMPLES + DAMPING * torch.eye(d)
        truth = torch.linalg.solve(A.double(), v.double(), left=False)
        providers = _providers(A, v)
        errors = {
            name: float((call().double() - truth).norm() / truth.norm())
            for name, call in providers.items()
        }
        times = interleaved(providers, repeats)
        yield from measurements(f"A^-1 v, N={SAMPLES}, d={d}", times, RELEASED, errors)


def _providers(A: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    eye = torch.eye(len(A))
    # the trace, as known when a GFIM has been summed; Lanczos steps tighten it where none is given
    bounds = (DAMPING * (1 - 1e-3), float(A.diagonal().sum()))

    def released() -> Tensor:
        X = START * eye
        for _ in range(STEPS):
            X = X @ (2 * eye - A @ X)
        return v @ X

    def cholesky() -> Tensor:
        return torch.cholesky_solve(v.mT, torch.linalg.cholesky(A)).mT

    return {
        RELEASED: released,
        "schulz_inverse": lambda: v @ hk.schulz_inverse(A),
        "schulz_inverse, trace bound": lambda: v @ hk.schulz_inverse(A, bounds=bounds),
        "schulz_solve": lambda: hk.schulz_solve(A, v),
        "schulz_solve, trace bound": lambda: hk.schulz_solve(A, v, bounds=bounds),
        "spd_inverse": lambda: v @ hk.spd_inverse(A),
        "Cholesky solve in torch": cholesky,
    }

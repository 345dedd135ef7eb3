"""The published convergence simulation: how fast each method nears A^-1 v, and where it stops.

A = (1/N) sum t t^T + 0.01 I in fp32 with t, v ~ N(0, I); errors are ||A^-1 v - X v||_2 against fp64
(arXiv 2410.05090, figure 1 as redone for its rebuttal). `PUBLISHED` was read from that figure's
vector graphics.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..ops.bounds import lanczos, lower_estimate, upper_bound
from ..ops.dispatch import call
from ..ops.schedule import FREE_FIRST_STEP, PRODUCTS, Step, plan_steps

DAMPING = 0.01
START = 5e-5
ITERATIONS = 40
PLAIN_STEPS = 20
NEAR = 1.1  # an error this close to the floor has reached it

ZERO = 5e-4  # what the figure shows as 0 to three decimals is at most this
# (N, d): released iteration after 1, 15, 20, 25, 40 steps; LiSSA after 1, 20, 40
PUBLISHED: dict[tuple[int, int], tuple[tuple[float, ...], tuple[float, ...]]] = {
    (200, 512): ((1747.2, 1718.8, 1034.3, 0.074, 0.072), (1746.4, 1738.8, 1730.9)),
    (200, 1024): ((2891.9, 2844.9, 1711.9, 0.222, 0.212), (2891.2, 2884.3, 2877.2)),
    (200, 2048): ((4301.8, 4231.9, 2546.6, 0.821, 0.832), (4301.3, 4295.9, 4290.3)),
    (200, 4096): ((6156.4, 6056.4, 3644.6, 2.230, 2.207), (6156.0, 6152.1, 6148.0)),
    (800, 512): ((86.0, 69.3, 1.82, 0.001, 0.001), (85.1, 77.8, 71.6)),
    (800, 1024): ((1567.9, 1540.5, 921.2, 0.034, 0.034), (1567.2, 1560.6, 1553.8)),
    (800, 2048): ((3644.8, 3585.5, 2157.6, 0.297, 0.278), (3643.9, 3635.9, 3627.5)),
    (800, 4096): ((5747.9, 5654.5, 3402.7, 0.932, 0.951), (5747.2, 5740.3, 5733.1)),
    (6400, 512): ((25.6, 7.0, ZERO, ZERO, ZERO), (23.8, 12.6, 6.8)),
    (6400, 1024): ((41.7, 15.5, ZERO, ZERO, ZERO), (40.1, 28.2, 20.2)),
    (6400, 2048): ((79.2, 42.0, ZERO, ZERO, ZERO), (77.8, 66.4, 57.1)),
    (6400, 4096): ((275.6, 225.9, 7.1, 0.001, 0.002), (274.7, 266.0, 257.8)),
    (12800, 512): ((24.0, 5.6, ZERO, ZERO, ZERO), (22.2, 10.8, 5.3)),
    (12800, 1024): ((36.1, 10.3, ZERO, ZERO, ZERO), (34.4, 22.0, 14.1)),
    (12800, 2048): ((57.8, 21.3, ZERO, ZERO, ZERO), (56.2, 43.5, 33.9)),
    (12800, 4096): ((105.2, 54.3, ZERO, ZERO, ZERO), (103.8, 92.1, 82.0)),
}
DEFAULT_CELLS = ((200, 512), (200, 1024), (200, 2048))
QUICK_CELLS = ((200, 512),)


@dataclass(frozen=True)
class Curve:
    """One method: `errors[i]` after `products[i]` dense d x d products (or steps, for LiSSA)."""

    method: str
    products: tuple[int, ...]
    errors: tuple[float, ...]

    def reaching(self, level: float) -> int | None:
        """Products after which the error is first at most `level`."""
        return next(
            (p for p, e in zip(self.products, self.errors, strict=True) if e <= level), None
        )


@dataclass(frozen=True)
class Cell:
    """One (N, d) of the table.

    Attributes:
        norm: ||A^-1 v||, by which errors become relative; condition_bound: of A, rigorous.
        curves: released iteration, plain Schulz, ours, LiSSA; and the single results of ours with
            its certificate, ours with thin refinement, DataInf and fp32 Cholesky.
    """

    samples: int
    d: int
    norm: float
    condition_bound: float
    curves: tuple[Curve, ...]

    def curve(self, method: str) -> Curve:
        return next(curve for curve in self.curves if curve.method == method)

    @property
    def floor(self) -> float:
        """Where the released iteration ends: its own last error, or the published one if larger."""
        published = PUBLISHED.get((self.samples, self.d))
        own = self.curve(RELEASED).errors[-1]
        return max(own, published[0][-1]) if published else own


RELEASED, PLAIN, OURS = "released iteration", "plain Schulz", "Chebyshev chain"
CERTIFIED, REFINED = "schulz_inverse", "schulz_solve"
LISSA, DATAINF, CHOLESKY = "LiSSA", "DataInf", "Cholesky fp32"


def simulate(
    samples: int, d: int, seed: int = 0, iterations: int = ITERATIONS,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Cell:  # fmt: skip
    """Run one cell. The released iteration takes 2 `iterations` dense products, by far the most.

    Raises:
        InputError: sizes or iterations that are not positive.
    """
    if samples < 1 or d < 2 or iterations < 1:
        raise InputError(f"a cell needs N >= 1, d >= 2 and iterations >= 1, got {samples}, {d}")
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(samples, d, generator=generator, dtype=torch.float32, device="cpu")
    v = torch.randn(1, d, generator=generator, dtype=torch.float32, device="cpu")
    A = T.mT @ T / samples
    A.diagonal().add_(DAMPING)
    A64, v64 = A.double(), v.double()
    truth = torch.cholesky_solve(v64.mT, torch.linalg.cholesky(A64)).mT
    # rounding to fp32 may move the smallest eigenvalue below the damping
    damping = torch.tensor(DAMPING * (1 - 1e-3), dtype=torch.float64)
    ritz = lanczos(A64)
    upper = upper_bound(A64, damping, ritz)
    # above the damping only where N > d and Lanczos steps resolve the bottom of the spectrum
    lower = torch.maximum(damping, lower_estimate(A64, ritz))

    def error(x: Tensor) -> float:
        return float((x.double() - truth).norm())

    def tell(done: int) -> None:
        if progress is not None:
            progress(f"N={samples}, d={d}", done, 5)

    tell(0)
    curves = [_loop(RELEASED, A, v, START, iterations, 0, error)]
    tell(1)
    # the first step from a I needs no product
    start = float(2 / (lower + upper))
    curves.append(_loop(PLAIN, A, v, start, min(PLAIN_STEPS, iterations), FREE_FIRST_STEP, error))
    tell(2)
    curves.append(_chain(A, v, lower, upper, error))
    tell(3)
    X, info = ops.schulz_inverse(A, bounds=(lower, upper), return_info=True)
    curves.append(Curve(CERTIFIED, (info.products,), (error(v @ X),)))
    W, info = ops.schulz_solve(A, v, bounds=(lower, upper), return_info=True)
    curves.append(Curve(REFINED, (info.products,), (error(W),)))
    tell(4)
    curves.append(_lissa(A, v, iterations, error))
    curves.append(Curve(DATAINF, (0,), (error(ops.sherman_morrison(v, T, DAMPING)),)))
    solved = torch.cholesky_solve(v.mT, torch.linalg.cholesky(A)).mT
    curves.append(Curve(CHOLESKY, (0,), (error(solved),)))
    tell(5)
    return Cell(samples, d, float(truth.norm()), float(upper / damping), tuple(curves))


def _loop(
    method: str, A: Tensor, v: Tensor, start: float, steps: int, free: int,
    error: Callable[[Tensor], float],
) -> Curve:  # fmt: skip
    """X = start I, then X <- X (2 I - A X)."""
    X = start * torch.eye(len(A), dtype=A.dtype)
    errors = []
    for _ in range(steps):
        factor = (A @ X).neg_()
        factor.diagonal().add_(2)
        X = X @ factor
        errors.append(error(v @ X))
    return Curve(method, tuple(2 * (k + 1) - free for k in range(steps)), tuple(errors))


def _chain(
    A: Tensor, v: Tensor, lower: Tensor, upper: Tensor, error: Callable[[Tensor], float]
) -> Curve:
    """The scheduled steps, each prefix of the chain from the start."""
    start, steps = plan_steps(lower, upper, torch.finfo(A.dtype).eps)
    cast = [Step(s.degree, {k: c.to(A.dtype) for k, c in s.coefficients.items()}) for s in steps]
    products, errors, spent = [], [], -FREE_FIRST_STEP
    for k, step in enumerate(steps):
        X, _ = call("schulz", (A,), start.to(A.dtype), cast[: k + 1])
        spent += PRODUCTS[step.degree]
        products.append(spent)
        errors.append(error(v @ X))
    return Curve(OURS, tuple(products), tuple(errors))


def _lissa(A: Tensor, v: Tensor, steps: int, error: Callable[[Tensor], float]) -> Curve:
    """r <- v + (I - B) r with B = A / (||A||_F + 1), as published; a product is a vector's here."""
    scale = float(A.norm()) + 1
    r, errors = v, []
    for _ in range(steps):
        r = v + r - (r @ A) / scale
        errors.append(error(r / scale))
    return Curve(LISSA, tuple(range(1, steps + 1)), tuple(errors))


def summary(cell: Cell) -> dict[str, Any]:
    """The figures of one cell that the targets speak of, beside the published ones."""
    level = NEAR * cell.floor
    published = PUBLISHED.get((cell.samples, cell.d))
    best = {curve.method: min(curve.errors) for curve in cell.curves}
    certified = cell.curve(CERTIFIED).errors[0]
    return {
        "N": cell.samples,
        "d": cell.d,
        "condition_bound": cell.condition_bound,
        "norm": cell.norm,
        "published_floor": published[0][-1] if published else None,
        "published_lissa": published[1][-1] if published else None,
        "floor": cell.curve(RELEASED).errors[-1],
        "products_released": cell.curve(RELEASED).reaching(level),
        "products_plain": cell.curve(PLAIN).reaching(level),
        "products_ours": cell.curve(OURS).reaching(level),
        "products_certified": cell.curve(CERTIFIED).products[0],
        "products_refined": cell.curve(REFINED).products[0],
        "lissa": cell.curve(LISSA).errors[-1],
        "relative_chain": cell.curve(OURS).errors[-1] / cell.norm,
        "relative_certified": certified / cell.norm,
        "relative_refined": best[REFINED] / cell.norm,
        "relative_cholesky": best[CHOLESKY] / cell.norm,
        "relative_lissa": best[LISSA] / cell.norm,
        "relative_datainf": best[DATAINF] / cell.norm,
    }


def document(cells: Sequence[Cell], seed: int) -> dict[str, Any]:
    """All of a run as plain values."""
    return {
        "format": 1,
        "title": "Convergence of inverse-vector products",
        "seed": seed,
        "cells": [{**summary(c), "curves": [asdict(curve) for curve in c.curves]} for c in cells],
    }


def as_csv(cells: Sequence[Cell]) -> str:
    """One line per cell, method and point of its curve."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["N", "d", "method", "products", "error", "relative"])
    writer.writerows(_points(cells))
    return text.getvalue()


def _points(cells: Sequence[Cell]) -> Iterator[list[Any]]:
    for cell in cells:
        for curve in cell.curves:
            for products, error in zip(curve.products, curve.errors, strict=True):
                relative = f"{error / cell.norm:.4g}"
                yield [cell.samples, cell.d, curve.method, products, f"{error:.6g}", relative]

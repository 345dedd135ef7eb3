"""Chebyshev-scaled Schulz steps: the cheapest chain of degrees for given spectral bounds.

For A with spectrum in [l, u], X0 = 2/(l+u) I leaves |eig(I - A X0)| <= e = (u-l)/(u+l). One step of
degree q replaces the residual R by T_q(R/e)/T_q(1/e), so e becomes 1/T_q(1/e). Because
T_a(T_b) = T_ab, any chain is the optimal polynomial of degree prod(q): only the cost of a chain
matters. Degree 2 is Pan and Schreiber (1991); degrees 3, 5 and 9 expand X (I - p(R)) (I - R)^-1 and
evaluate it in 3, 4 and 5 products. All scalars are computed in fp64, one per matrix of the batch.

Without bounds a chain chooses step by step from the same polynomials, for some radii (`MENU`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PRODUCTS = {2: 2, 3: 3, 5: 4, 9: 5}
FREE_FIRST_STEP = 2  # from X0 = a I neither A X0 nor X0 Z is a product


@dataclass(frozen=True)
class Step:
    """One step: its degree and its scalars, one tensor of the batch's shape each."""

    degree: int
    coefficients: dict[str, Tensor]


@functools.lru_cache(maxsize=256)
def cheapest_chain(total_degree: int) -> tuple[int, ...]:
    """Degrees, ascending, of the chain of least products whose degree reaches `total_degree`."""
    # at most one step below 9: (2, 2) costs as much as 5, (3, 3) and (5, 5) more than 9 and (3, 9)
    most = dict.fromkeys(PRODUCTS, 1) | {9: math.ceil(math.log(max(2, total_degree), 9))}
    best: tuple[int, int, tuple[int, ...]] | None = None
    for counts in itertools.product(*(range(most[q] + 1) for q in PRODUCTS)):
        chain = tuple(q for q, count in zip(PRODUCTS, counts, strict=True) for _ in range(count))
        if not chain or math.prod(chain) < total_degree:
            continue
        key = (sum(PRODUCTS[q] for q in chain), -math.prod(chain), chain)
        best = key if best is None else min(best, key)
    assert best is not None
    return best[2]


def chain_products(condition: float, target: float) -> int:
    """Dense products of the cheapest chain to `target`, the free first step taken off."""
    chain = cheapest_chain(degree_for(condition, target))
    return sum(PRODUCTS[q] for q in chain) - FREE_FIRST_STEP


def degree_for(condition: float, target: float) -> int:
    """Least degree whose Chebyshev residual on condition number `condition` is below `target`."""
    if condition <= 1:
        return 2
    # acosh((k+1)/(k-1)), written so that it survives k near 1 and k near 1e16
    growth = math.log1p(2 / (math.sqrt(condition) - 1))
    return max(2, math.ceil(math.acosh(1 / target) / growth))


def plan_steps(lower: Tensor, upper: Tensor, target: float) -> tuple[Tensor, list[Step]]:
    """The start a (X0 = a I) and the steps that bring every matrix's residual below `target`.

    Args:
        lower, upper: fp64 bounds of the spectra, 0 < lower <= upper, of the batch's shape.
        target: spectral norm of I - A X to reach, in (0, 1).
    """
    condition = float((upper / lower).max()) if upper.numel() else 1.0
    e = (upper - lower) / (upper + lower)
    steps = []
    for degree in cheapest_chain(degree_for(condition, target)):
        coefficients, e = _STEPS[degree](e)
        steps.append(Step(degree, coefficients))
    return 2 / (lower + upper), steps


def _degree2(e: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    c = 2 / (2 - e**2)
    return {"b0": c, "b1": c}, e**2 / (2 - e**2)


def _degree3(e: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n = 4 - 3 * e**2
    return {"b1": 4 / n}, e**3 / n


def _degree5(e: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    n = 16 - 20 * e**2 + 5 * e**4
    return {"b1": (16 - 20 * e**2) / n, "b3": 16 / n}, e**5 / n


def _degree9(e: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    e2 = e**2
    n = 256 - 576 * e2 + 432 * e2**2 - 120 * e2**3 + 9 * e2**4
    b2 = (n - 9 * e2**4) / n
    b4 = (256 - 576 * e2 + 432 * e2**2) / n
    b6 = (256 - 576 * e2) / n
    b8 = 256 / n
    # sum_j b_j R^j = (Y + d2 R2 + d1 R)(Y + e2 R2) + e0 Y + b2 R2 + b1 R + I, Y = R2 (c1 R2 + c2 R)
    c1 = b8.sqrt()
    c2 = b8 / (2 * c1)
    s = (b6 - c2**2) / c1
    d1 = (b6 - s * c2) / c1
    t = c2 / c1
    half = (d1 - t * s) / (2 * t)
    f2 = -half + (half**2 - (t * (b4 - d1 * c2) - b4) / t).sqrt()
    d2 = s - f2
    e0 = (b4 - d1 * c2 - d2 * f2) / c1
    scalars = {"c1": c1, "c2": c2, "d1": d1, "d2": d2, "e2": f2, "e0": e0, "b1": b2, "b2": b2}
    return scalars, e**9 / n


_STEPS = {2: _degree2, 3: _degree3, 5: _degree5, 9: _degree9}


@dataclass(frozen=True)
class Polynomial:
    """A step for spectra of I - A X within [-radius, radius], of which it leaves `reach`."""

    degree: int
    radius: float
    reach: float
    coefficients: dict[str, float]

    @property
    def cost(self) -> int:
        """Products once I - A X is there."""
        return PRODUCTS[self.degree] - 1


# what a widening step leaves of the eigenvalues that it brings near 1; at 1/2 those from 1/188 of
# the top up are brought there, and smaller ones grow 63 times nearer
WIDENED = 0.5
# radii of the steps that contract, a factor of sqrt(2) apart: from what a Frobenius norm can still
# bound down to where the square is fp32 rounding
RADII = tuple(0.95 * 2 ** (-k / 2) for k in range(22, -1, -1))


def _polynomial(degree: int, radius: float) -> Polynomial:
    coefficients, left = _STEPS[degree](torch.tensor(radius, dtype=torch.float64, device="cpu"))
    return Polynomial(degree, radius, float(left), {k: float(c) for k, c in coefficients.items()})


def _widening() -> Polynomial:
    """Degree 9 with 1 / T_9(1 / radius) = WIDENED."""
    return _polynomial(9, 1 / math.cosh(math.acosh(1 / WIDENED) / 9))


WIDENING = _widening()
MENU = tuple(_polynomial(degree, radius) for radius in RADII for degree in PRODUCTS)


@functools.cache
def packed_menu() -> Tensor:
    """WIDENING and MENU as the compiled kernel reads them: (polynomials, 12) in fp32."""
    rows = []
    for p in (WIDENING, *MENU):
        given = list(p.coefficients.values())
        rows.append(
            [p.degree, p.radius, p.reach, math.log(p.reach), *given, *[0.0] * (8 - len(given))]
        )
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def cheapest_step(radius: float, after: Callable[[float], float]) -> Polynomial:
    """The polynomial for `radius` with the least products, `after(reach)` more counted in."""
    made_for = next((r for r in RADII if r >= radius), RADII[-1])
    fitting = [p for p in MENU if p.radius == made_for]
    return min(fitting, key=lambda p: p.cost + after(p.reach))

"""Schulz inverses that need no bounds of the spectrum, in plain torch, for what is not fused.

X0 = I / min(||A||_inf, ||A||_F, trace). While eigenvalues of A X are small, `schedule.WIDENING`
steps bring those from 1/188 of the top up to within 1/2 of 1; the Frobenius norm of R = I - A X,
once below 1, or a few power steps on R say when none is left; then the cheapest step of
`schedule.MENU` contracts. The last one is X + X R, whose residual follows from that of R without
another product:

    ||I - A X'||_F <= ||R||_F^2 + (1 + ||R||_F) gamma ||A|| ||X||_F
                      + ||A||_F (u ||X'||_F + gamma ||X||_F ||R||_F),        gamma = (d + 4) u

A batch takes its steps together, those of the matrix that needs most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .norms import Norms, norms_of
from .schedule import WIDENING, Polynomial, cheapest_step
from .solve import BOUND, COARSE, ESTIMATE

KNOWN_BELOW = 0.95  # a Frobenius norm below it bounds the spectral one
RESOLVED = 0.75  # spectral radius of R below which nothing small is left
MARGIN = 1.1  # of a radius from power steps
POWER_STEPS = 6
PROBES = 4
# 63 times nearer each: beyond these no eigenvalue is left that rounding would not swallow
MOST_WIDENING = {torch.float32: 5, torch.float64: 9}
LARGE = 1e15  # entries beyond it, or below its inverse, are scaled first


class Facts(NamedTuple):
    """What is known of a batch of inverses or solutions, one entry per matrix, fp64 where a figure.

    Attributes:
        fit: finite, symmetric to 1e-3 of the largest entry, a positive diagonal.
        residual: as in `SolveInfo`; infinite where the chain did not get there.
        known: how, as in `SolveInfo`.
        floor: the residual that rounding leaves at this condition number.
        products, steps: spent.
    """

    fit: Tensor
    residual: Tensor
    known: Tensor
    floor: Tensor
    products: Tensor
    steps: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Facts:
        """From the (B, 6) numbers of the compiled kernel."""
        fit, residual, known, floor, products, steps = table.unbind(-1)
        return cls(fit > 0, residual, known.to(torch.int8), floor, products.long(), steps.long())


@dataclass
class _Chain:
    """A (B, d, d) and X under way, with R = I - A X and its Frobenius norms."""

    A: Tensor
    norms: Norms
    X: Tensor
    R: Tensor
    residual: Tensor
    products: int = 0
    steps: int = 0
    start: Tensor | None = None

    def form_residual(self) -> None:
        eye = torch.eye(self.A.shape[-1], dtype=self.A.dtype, device=self.A.device)
        self.R = torch.baddbmm(eye, self.A, self.X, alpha=-1)
        self.residual = _frobenius(self.R)
        self.products += 1

    def first(self, start: Tensor) -> None:
        """X = start I."""
        self.start = start
        scale = start.to(self.A.dtype)[:, None, None]
        self.X = scale * torch.eye(self.A.shape[-1], dtype=self.A.dtype, device=self.A.device)
        self.R = self.A * -scale
        self.R.diagonal(dim1=-2, dim2=-1).add_(1)
        self.residual = _frobenius(self.R)

    def widen_first(self) -> None:
        """From X = start I the last product is none."""
        assert self.start is not None
        self.X = _factor(self.R, WIDENING).mul_(self.start.to(self.A.dtype)[:, None, None])
        self.products += WIDENING.cost - 1
        self.steps += 1

    def apply(self, p: Polynomial) -> None:
        """X p(R)."""
        self.X = _times(self.X, self.R, p)
        self.products += p.cost
        self.steps += 1


def complete(
    A: Tensor, X: Tensor | None, products: int, steps: int, goal: float, budget: int, certify: bool
) -> tuple[Tensor, Facts]:
    """`schulz_adaptive` from an X that another kernel has brought so far, or from the start."""
    norms = norms_of(A)
    extreme = (norms.largest > LARGE) | ((norms.largest < 1 / LARGE) & (norms.largest > 0))
    if not bool(extreme.any()):
        chain = _Chain(A, norms, A if X is None else X, A, norms.largest, products, steps)
        reached = _contract(chain, X is None, goal, budget)
        return _delivered(chain, reached, goal, budget, certify)
    # squares would leave the range of the dtype
    scale = torch.where(extreme, norms.largest, 1.0)
    scale = torch.exp2(torch.floor(torch.log2(scale)).clamp(-1000, 1000))[:, None, None]
    if X is not None:
        X = (X * scale).to(A.dtype)
    X, facts = complete((A / scale).to(A.dtype), X, products, steps, goal, budget, certify)
    X = (X / scale).to(A.dtype)
    whole = torch.isfinite(X).flatten(1).all(1)
    return X, facts._replace(residual=torch.where(whole, facts.residual, torch.inf))


def _contract(chain: _Chain, fresh: bool, goal: float, budget: int) -> Tensor:
    """Run until R of every matrix that gets there is small enough; True where it is."""
    norms, size = chain.norms, math.sqrt(chain.A.shape[-1])
    roundoff = torch.finfo(chain.A.dtype).eps / 2
    fit = norms.fit()
    widened, left = 0, MOST_WIDENING[chain.A.dtype]
    if fresh:
        start = 1 / (norms.top() * (1 + 4 * chain.A.shape[-1] * roundoff))
        start = torch.where(fit, start, 0.0)
        chain.first(start)
        if bool((chain.residual[fit] >= KNOWN_BELOW).any()) and budget >= 4:
            chain.widen_first()
            chain.form_residual()
            widened = 1
    elif chain.products < budget:
        chain.form_residual()
    last = torch.full_like(chain.residual, torch.inf)
    while True:
        rest = roundoff * norms.frobenius * _frobenius(chain.X)
        goals = (rest if not goal else rest.clamp_min(goal * size / 2)).clamp_max(0.25)
        F = chain.residual
        small = F.square() <= goals
        if goal:
            small |= F + _gamma(chain) * norms.product(chain.X) <= goal * size
        if not goal or goal < COARSE:
            small &= F < KNOWN_BELOW
        # at rest, or grown out of all bounds: no step of the others helps these
        resting = (last / 2 < F) & (F < KNOWN_BELOW)
        reached = fit & (small | (resting & (F < 0.5)))
        open_ = fit & ~reached & ~resting & (F < 1e6)
        # the one host read of a step
        worst = float(torch.where(open_, F, -1.0).amax())
        if worst < 0 or chain.products >= budget:
            return reached
        radius = worst
        if worst >= KNOWN_BELOW:
            radius = float(torch.where(open_, MARGIN * _radius(chain.R), -1.0).amax())
            if not radius < RESOLVED:
                widened += 1
                if widened > left or chain.products + 5 > budget:
                    return reached
                chain.apply(WIDENING)
                chain.form_residual()
                continue
        last = torch.where(F < KNOWN_BELOW, F, torch.inf)
        needed = float(torch.where(open_, goals, torch.inf).amin())
        step = cheapest_step(radius, partial(_after, 0.7 * size, needed))
        if chain.products + step.cost + 2 > budget:
            return reached
        chain.apply(step)
        chain.form_residual()


def coarse(A: Tensor, thin: float, budget: int) -> tuple[Tensor, Tensor, int, int]:
    """X (B, d, d) close enough for thin steps that multiply residuals by I - A X.

    Args:
        A: fp32 or fp64, scaled to a largest entry near 1. thin: products that a thin step costs.

    Returns:
        X, where it is close enough, products, steps.
    """
    norms = norms_of(A)
    chain = _Chain(A, norms, A, A, norms.largest)
    roundoff = torch.finfo(A.dtype).eps / 2
    chain.first(1 / (norms.top() * (1 + 4 * A.shape[-1] * roundoff)))
    chain.widen_first()
    for _ in range(MOST_WIDENING[A.dtype] + 1):
        chain.form_residual()
        F = chain.residual
        radius = torch.where(F < KNOWN_BELOW, F, MARGIN * _radius(chain.R))
        near = (radius < RESOLVED) & (F < 1e6)
        if bool(near.all()) or chain.products + 5 > budget:
            break
        chain.apply(WIDENING)
    worst = float(torch.where(near, radius, 0.0).amax())

    def after(reach: float) -> float:
        return thin * max(1.0, math.ceil(math.log(1e-9) / math.log(max(reach, 1e-9))))

    step = cheapest_step(worst, after)
    if (
        worst > 0
        and step.cost + after(step.reach) < after(worst)
        and chain.products + step.cost <= budget
    ):
        chain.apply(step)
    return chain.X, near, chain.products, chain.steps


def _after(size: float, needed: float, reach: float) -> float:
    """Products of plain steps that are left before the last one."""
    left, total = size * reach, 0.0
    while left * left > needed and total < 12:
        left, total = (left * left if left < 1 else left), total + 2
    return total


def _delivered(
    chain: _Chain, reached: Tensor, goal: float, budget: int, certify: bool
) -> tuple[Tensor, Facts]:
    """X + X R where that is wanted, and what is known of it."""
    A, norms, E = chain.A, chain.norms, chain.residual
    root, gamma = math.sqrt(A.shape[-1]), _gamma(chain)
    roundoff = torch.finfo(A.dtype).eps / 2
    before, X = _frobenius(chain.X), chain.X
    both = norms.product(chain.X)
    bound = E + gamma * both
    if not (goal and bool((bound[reached] <= goal * root).all())) and chain.products < budget:
        X = torch.baddbmm(chain.X, chain.X, chain.R)
        chain.products += 1
        chain.steps += 1
        bound = E * E + (1 + E) * gamma * both
        bound = bound + norms.frobenius * (roundoff * _frobenius(X) + gamma * before * E)
    residual = (bound * (1 + 4 * gamma) / root).nan_to_num(torch.inf)
    residual = torch.where(reached, residual, torch.inf)
    floor = (16 * roundoff * norms.rows * _rows(X)).nan_to_num(COARSE).clamp_max(COARSE)
    known = torch.full_like(chain.residual, BOUND)
    missed = reached & ~(residual <= (goal or floor))
    if certify and bool(missed.any()):
        residual = torch.where(missed, probed(A, X), residual)
        known = torch.where(missed, float(ESTIMATE), known)
    return X, _facts(chain, norms.fit(), residual, known, floor)


def _facts(chain: _Chain, fit: Tensor, residual: Tensor, known: Tensor, floor: Tensor) -> Facts:
    spent, steps = (torch.full_like(residual, n).long() for n in (chain.products, chain.steps))
    return Facts(fit, residual, known.to(torch.int8), floor, spent, steps)


def probed(A: Tensor, X: Tensor) -> Tensor:
    """||I - A X||_F / sqrt(d) per matrix, estimated by four vectors of signs in fp64."""
    d = A.shape[-1]
    generator = torch.Generator(device="cpu").manual_seed(3)
    signs = torch.randint(0, 2, (d, PROBES), generator=generator, dtype=torch.int64, device="cpu")
    z = (2 * signs - 1).to(A.device, torch.float64)
    gap = z - A.double() @ (X.double() @ z)
    return (gap.square().sum((-2, -1)) / (PROBES * d)).sqrt().nan_to_num(torch.inf)


def _radius(R: Tensor) -> Tensor:
    """||R||_2 per matrix by power steps: from below, close enough to tell 1 from 1/2."""
    generator = torch.Generator(device="cpu").manual_seed(1)
    size = (R.shape[-1], 1)
    v = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu") + 0.5
    signs = torch.randint(0, 2, size, generator=generator, dtype=torch.int64, device="cpu")
    v = (v * (2 * signs - 1)).to(R.device, R.dtype).expand(len(R), -1, 1)
    for _ in range(POWER_STEPS - 1):
        v = R @ v
    last = v.double().square().sum((-2, -1))
    now = (R @ v).double().square().sum((-2, -1))
    return (now / last).sqrt().nan_to_num(0.0)


def _gamma(chain: _Chain) -> float:
    return (chain.A.shape[-1] + 4) * torch.finfo(chain.A.dtype).eps / 2


def _frobenius(M: Tensor) -> Tensor:
    return torch.linalg.vector_norm(M, dim=(-2, -1)).double()


def _rows(M: Tensor) -> Tensor:
    """The largest absolute row sum per matrix."""
    return torch.linalg.vector_norm(M, 1, dim=-1).amax(-1).double()


def _times(X: Tensor, R: Tensor, p: Polynomial) -> Tensor:
    """X p(R) in `p.cost` products."""
    c = p.coefficients
    if p.degree == 2:
        return torch.baddbmm(X, X, R, beta=c["b0"], alpha=c["b1"])
    if p.degree == 3:
        return torch.baddbmm(X, X, torch.baddbmm(R, R, R), alpha=c["b1"])
    return X @ _factor(R, p)


def _factor(R: Tensor, p: Polynomial) -> Tensor:
    """p(R) of degree 5 or 9, with as few readings as products allow."""
    c = p.coefficients
    if p.degree == 5:
        S = torch.baddbmm(R, R, R)
        left = torch.sub(S, R).mul_(c["b3"])
        left.diagonal(dim1=-2, dim2=-1).add_(c["b1"])
        Z = left @ S
    else:
        R2 = R @ R
        U = torch.add(R, R2, alpha=c["c1"] / c["c2"])
        Y = torch.baddbmm(R2, R2, U, beta=0, alpha=c["c2"])
        right = torch.add(Y, R2, alpha=c["e2"])
        left = torch.add(Y, R2, alpha=c["d2"]).add_(R, alpha=c["d1"])
        # the sums that the product joins, in the memory of Y
        Z = Y.mul_(c["e0"]).add_(R2, alpha=c["b2"]).add_(R, alpha=c["b1"])
        Z = torch.baddbmm(Z, left, right)
    Z.diagonal(dim1=-2, dim2=-1).add_(1)
    return Z

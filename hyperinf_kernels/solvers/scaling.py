"""Powers of two that bring gradients to where fp32 holds the sums of their squares.

A relative damping makes influence independent of the gradients' scale, and a power of two changes
no digit, so a block far from the ordinary is worked on as gradients x 2^exponent. Ordinary ones
have exponent 0 and are never copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

SAFE = 1e25  # squared norms between its inverse and it leave fp32 room for their sums
LEAST, MOST = 2.0**-104, 2.0**76  # norms between which the largest gradient of a block must lie
FURTHEST = 120  # exponents beyond would not be numbers of fp32
TINY = 2.0**-110  # results below lose digits in fp32
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number


@dataclass(frozen=True)
class Scaled:
    """Gradients (m, ...) in range: `values` are those given x 2^exponents, row by row.

    `exponents` (m,) fp64 is None where all are 0; `lost` (m,) marks rows of numbers so small that
    they count as zeros here, None where there is none.
    """

    values: Tensor
    exponents: Tensor | None = None
    lost: Tensor | None = None

    def flat(self) -> Scaled:
        """The same as rows (m, D)."""
        return Scaled(self.values.flatten(1), self.exponents, self.lost)

    def some(self, rows: Tensor) -> Scaled:
        """Some of its rows, by their numbers."""
        exponents, lost = (None if t is None else t[rows] for t in (self.exponents, self.lost))
        return Scaled(self.values[rows], exponents, lost)

    def powers(self, block: int, times: int = 1) -> Tensor | None:
        """2^(block - times exponents) (m, ) in fp64, which undoes both scalings; None for 1.

        Args:
            block: the exponent of what the result came from. times: rows of these in a product.
        """
        if self.exponents is not None:
            return torch.pow(2.0, block - times * self.exponents)
        whole = torch.full(self.values.shape[:1], 2.0**block, dtype=torch.float64, device="cpu")
        return whole.to(self.values.device) if block else None


def exponent_for(top: float, now: int = 0) -> int:
    """Of a block whose largest squared norm is `top`; `now` stays while it serves."""
    if top == 0 or 1 / SAFE <= top * 4.0**now <= SAFE:
        return now
    if 1 / SAFE <= top <= SAFE:
        return 0
    return max(-FURTHEST, min(FURTHEST, -round(math.log2(top) / 2)))


def scaled_rows(batch: Tensor, sizes: Tensor, dtype: torch.dtype) -> Scaled:
    """Query gradients (m, r, d) in `dtype`, each row in range by itself.

    Args:
        sizes: their squared norms (m,) in fp64.
    """
    values = batch.to(dtype)
    low, high = (sizes < 1 / SAFE), (sizes > SAFE)
    if not bool((low | high).any()):
        return Scaled(values)
    lost = None
    zero = sizes == 0
    if bool(zero.any()):
        lost = torch.zeros_like(zero)
        lost[zero] = hidden(batch[zero])
        lost = lost if bool(lost.any()) else None
    halves = torch.where(zero, 1.0, sizes).log2().div(-2).round().clamp(-FURTHEST, FURTHEST)
    exponents = torch.where((low & ~zero) | high, halves, 0.0)
    if not bool(exponents.any()):
        return Scaled(values, lost=lost)
    powers = torch.pow(2.0, exponents).to(dtype)
    return Scaled(values * powers.view(-1, *[1] * (batch.ndim - 1)), exponents, lost)


def hidden(given: Tensor, seen: Tensor | None = None) -> Tensor:
    """(B,): whether a row given holds numbers that are not zero where those `seen` are.

    Read from the bits: where the processor flushes subnormal numbers, comparisons see zeros too.
    `seen`: None: zeros only.
    """
    bits = given.detach().view(INTEGERS[given.element_size()])
    there = bits + bits != 0  # twice drops the sign
    return (there if seen is None else there & (seen == 0)).flatten(1).any(1)


def deliver(X: Tensor, powers: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """X (m, ...) times `powers` (m,), and two flags (m,): not finite in X's dtype, lost in it.

    A row is lost if it is not zero, but so small that X's dtype holds too few of its digits.
    """
    if not X.numel():
        none = torch.zeros(len(X), dtype=torch.bool, device=X.device)
        return X, none, none
    rows, limits = X.flatten(1), torch.finfo(X.dtype)
    peaks = torch.maximum(rows.amax(1), -rows.amin(1)).double()  # NaN and inf stay
    ends = peaks if powers is None else peaks * powers
    lost = (peaks > 0) & (ends < (TINY if X.dtype == torch.float32 else limits.tiny))
    if powers is not None:
        X = (X.double() * powers.view(-1, *[1] * (X.ndim - 1))).to(X.dtype)
    return X, ~(ends <= limits.max), lost


def check_range(name: str, top: float) -> None:
    """Refuse a block whose largest squared gradient norm is `top`, where that is out of range."""
    norm = math.sqrt(top)
    if top > 0 and not LEAST <= norm <= MOST:
        raise InputError(
            f"block {name}: the largest norm of a training gradient is {norm:.1e}, and influence "
            f"is computed for {LEAST:.0e} to {MOST:.0e}; rescale the loss"
        )

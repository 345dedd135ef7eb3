"""Schulz inverses and solves that choose their own steps, in plain torch: batched products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .adaptive import Facts, complete
from .dispatch import implements
from .reference import schulz
from .schedule import Step
from .thin import composed


@implements("schulz_adaptive")
def schulz_adaptive(
    A: Tensor, V: Tensor | None, start: Tensor | None, steps: Sequence[Step], goal: float,
    budget: int, certify: bool,
) -> tuple[Tensor, Facts]:  # fmt: skip
    """Inverses of A (B, d, d), or V A^-1 for V (B, m, d), and what is known of them.

    Args:
        A: fp32 or fp64. V: none for an inverse; a solve starts without `steps`.
        start, steps: a chain for given bounds of A's spectrum, run first.
        goal: the residual to reach; 0: as small as rounding allows.
        budget: products that the batch may cost.
        certify: a bound that misses the goal or the floor is followed by probes.
    """
    if V is not None:
        run = composed(A, V, None, goal or None, budget, "ieee")
        return run.X, run.facts
    if start is None:
        return complete(A, None, 0, 0, goal, budget, certify)
    X, products = schulz(A, start, steps)
    return complete(A, X, products, len(steps), goal, budget, certify)

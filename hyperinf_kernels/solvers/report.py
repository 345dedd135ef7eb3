"""What a solver says about each block: the certificate beside every score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Check = Literal["off", "bound", "full"]
"""How much a solver spends on its certificate: nothing and claims nothing; what the method knows by
itself, with a few probes where that is not enough; or a residual of everything against fp64."""
CHECKS: tuple[Check, ...] = ("off", "bound", "full")

COLLAPSE_DEGREES = 5.0
RESIDUAL_LIMIT = 1e-3  # what counts as solved where no tolerance is asked for

Known = Literal["bound", "estimate", "measured"]
"""How a figure is known: a rigorous bound, an estimate from random probes, or measured in fp64."""


@dataclass(frozen=True)
class BlockReport:
    """How one block was solved, for W = V A^-1.

    Attributes:
        block: its name; `shape` is (r, d) and `n` the number of training samples behind A.
        method: the influence method; `backend` ran its dense work, in `precision`: fp32, fp64, or
            "fp32 and fp64" where some rows of a closed form were done again.
        damping: lambda, resolved for this block.
        condition_bound: rigorous upper bound of A's condition number, None where nothing is solved.
        products: dense products or factorisations spent; `iterations`: steps or refinements.
        residual: ||V - W A||_F / ||V||_F of the delivered W, measured in fp64; the worst query's,
            as all that follow. For a closed form (DataInf, K-FAC, EK-FAC) the relative error
            against its fp64 evaluation, at least that of rounding W.
            For scores S = -W P^T from Gram space, where no W exists:
            of DataInf and the exact method the relative error of S, of CG and LiSSA
            ||(V - W A) P^T|| / ||V P^T||, which says less about S the larger the condition is.
        converged: the figure that a person reads is within `tolerance`: `score_error` where scores
            were formed, else `residual`. None with `check="off"`, which claims nothing.
        fallback: None, or why another route than the planned one gave the result.
        collapse_angle: degrees between V and W, in Gram space between the scores and those of
            gradient dot; near 0 the method has become gradient dot.
        residual_by: how `residual` is known: "bound", "estimate" or "measured".
        score_error: relative error of the worst query's scores against the method's formula in
            exact arithmetic; None where no scores were formed or nothing is known of them. An
            estimate is certified where ten times it is within `tolerance`, since four probes show
            less than a tenth of an error twice in 10,000.
        score_error_by: how `score_error` is known, as `residual_by`.
        tolerance: what `converged` was judged by.
    """

    block: str
    method: str
    backend: str
    precision: str
    n: int
    shape: tuple[int, int]
    damping: float
    condition_bound: float | None
    products: int
    iterations: int
    residual: float | None
    converged: bool | None
    fallback: str | None
    collapse_angle: float | None
    residual_by: Known | None = None
    score_error: float | None = None
    score_error_by: Known | None = None
    tolerance: float = RESIDUAL_LIMIT


def worse(one: BlockReport, other: BlockReport) -> BlockReport:
    """Two entries of one block as one: the larger figures, both efforts, any failure."""
    worst = other if (other.residual or 0) >= (one.residual or 0) else one
    off = other if (other.score_error or 0) >= (one.score_error or 0) else one
    claims = (one.converged, other.converged)
    return replace(
        worst,
        score_error=off.score_error,
        score_error_by=off.score_error_by,
        tolerance=max(one.tolerance, other.tolerance),
        products=one.products + other.products,
        iterations=max(one.iterations, other.iterations),
        converged=False if False in claims else None if None in claims else True,
        fallback=one.fallback or other.fallback,
    )


@dataclass(frozen=True)
class Outcome:
    """What solving one block yields besides W; becomes its `BlockReport`."""

    backend: str = "torch"
    precision: str = "fp32"
    condition_bound: float | None = None
    products: int = 0
    iterations: int = 0
    residual: float | None = None
    converged: bool | None = True
    fallback: str | None = None
    residual_by: Known | None = None
    score_error: float | None = None
    score_error_by: Known | None = None
    tolerance: float = RESIDUAL_LIMIT


def with_rounding(outcome: Outcome, before: float, limit: float, dtype: torch.dtype) -> Outcome:
    """Say so where only the rounding of W, whose residual was `before`, misses the limit."""
    if not before <= limit:
        return outcome
    note = f"W rounded to {precision_of(dtype)}; its residual was {before:.1e} before"
    return replace(outcome, fallback=note)


def precision_of(dtype: torch.dtype) -> str:
    """fp64 or fp32, the word of `BlockReport.precision`."""
    return "fp64" if dtype == torch.float64 else "fp32"


def angle(V: Tensor, W: Tensor) -> float | None:
    """Degrees between V and W seen as long vectors; None when either vanishes."""
    if V is W:
        return 0.0 if bool(V.any()) else None
    # an arc cosine in fp32 cannot tell 0.02 degrees from 0
    v, w = V.reshape(-1).double(), W.reshape(-1).double()
    lengths = float(v.norm()) * float(w.norm())
    if lengths == 0:
        return None
    cosine = float(torch.dot(v, w)) / lengths
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine))))


_WAYS: dict[Known | None, str] = {
    "estimate": "estimated by random probes, certified only if ten times that would do",
    "bound": "a rigorous bound",
    "measured": "measured in fp64",
    None: "measured in fp64",
}


def _how(ways: Sequence[Known | None]) -> str:
    """How the least certain of some figures is known."""
    return next(text for way, text in _WAYS.items() if way in ways)


def summarise(reports: Sequence[BlockReport]) -> dict[str, object]:
    """One certificate over all blocks: `certified`, `worst_residual`, `summary` in words."""
    residuals = [r.residual for r in reports if r.residual is not None]
    errors = [r.score_error for r in reports if r.score_error is not None]
    missed = [r for r in reports if r.converged is False]
    unchecked = [r for r in reports if r.converged is None]
    fallbacks = [r for r in reports if r.fallback]
    collapsed = [
        r for r in reports
        if r.method != "grad_dot"
        and r.collapse_angle is not None
        and r.collapse_angle < COLLAPSE_DEGREES
    ]  # fmt: skip
    worst, worst_error = max(residuals, default=None), max(errors, default=None)
    parts = [
        f"{len(reports) - len(missed) - len(unchecked)} of {len(reports)} blocks solved to "
        "tolerance"
    ]
    if unchecked:
        parts.append(f"{len(unchecked)} not checked (check='off')")
    if worst_error is not None:
        how = _how([r.score_error_by for r in reports if r.score_error is not None])
        parts.append(
            f"the worst query's scores are {worst_error:.1e} off the method's formula, relative to "
            f"their size ({how})"
        )
    if worst is not None:
        how = _how([r.residual_by for r in reports if r.residual is not None])
        parts.append(f"largest relative residual of a solved direction {worst:.1e} ({how})")
    if missed:
        parts.append(f"{len(missed)} did not converge, first {missed[0].block}")
    if fallbacks:
        parts.append(f"{len(fallbacks)} took a fallback ({fallbacks[0].fallback})")
    if collapsed:
        parts.append(
            f"in {len(collapsed)} blocks the result is within {COLLAPSE_DEGREES:g} degrees of "
            "plain gradient dot"
        )
    solves_nothing = all(r.method == "grad_dot" for r in reports)
    if solves_nothing:
        parts, worst = ["plain dot products: nothing is solved, so nothing to certify"], None
    return {
        "certified": None if solves_nothing or (unchecked and not missed) else not missed,
        "worst_residual": worst,
        "worst_score_error": worst_error,
        "collapsed_blocks": len(collapsed),
        "summary": "; ".join(parts),
    }

"""The influence methods: update(batch) -> fit() -> apply(V) -> report()."""

from __future__ import annotations

from typing import Any

from .base import Solver
from .cg import CG
from .damping import (
    DEFAULT_DAMPING,
    AbsoluteDamping,
    Damping,
    DataInfDamping,
    TraceDamping,
    as_damping,
)
from .datainf import DataInf
from .ekfac import EKFAC
from .engine import GramEngine, GramScores
from .exact import Exact
from .flat import FlatSolver
from .grad_dot import GradDot
from .hyperinf import HyperINF
from .inputs import Gradients, check_finite
from .kfac import KFAC, Tokens
from .lissa import LiSSA
from .report import BlockReport, summarise
from .rows import GradientRows

METHODS: dict[str, type[Solver]] = {
    cls.method: cls for cls in (HyperINF, DataInf, LiSSA, CG, Exact, KFAC, EKFAC, GradDot)
}


def make_solver(
    method: str | Solver, damping: Damping | float | None = None, **options: Any
) -> Solver:
    """The solver called `method`, or `method` itself when it already is one.

    Raises:
        ValueError: unknown method, unknown option, or options given beside a solver object.
    """
    if isinstance(method, Solver):
        if options or damping is not None:
            raise ValueError("options and damping belong to the solver object; give them there")
        return method
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    try:
        return METHODS[method](DEFAULT_DAMPING if damping is None else damping, **options)
    except TypeError as error:
        raise ValueError(f"method {method!r}: {error}") from None


__all__ = [
    "CG",
    "DEFAULT_DAMPING",
    "EKFAC",
    "KFAC",
    "METHODS",
    "AbsoluteDamping",
    "BlockReport",
    "Damping",
    "DataInf",
    "DataInfDamping",
    "Exact",
    "FlatSolver",
    "GradDot",
    "GradientRows",
    "Gradients",
    "GramEngine",
    "GramScores",
    "HyperINF",
    "LiSSA",
    "Solver",
    "Tokens",
    "TraceDamping",
    "as_damping",
    "check_finite",
    "make_solver",
    "summarise",
]

"""Methods and dampings as a person writes them: `hyperinf:mode=paper`, `0.1+abs:1e-3`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..solvers import (
    METHODS,
    AbsoluteDamping,
    Damping,
    DataInfDamping,
    Solver,
    TraceDamping,
    make_solver,
)

LABELS = {
    "hyperinf": "HyperINF",
    "datainf": "DataInf",
    "lissa": "LiSSA",
    "cg": "CG",
    "exact": "Exact",
    "kfac": "K-FAC",
    "ekfac": "EK-FAC",
    "grad_dot": "Gradient dot",
}


@dataclass(frozen=True)
class Method:
    """One method with its options and damping; `label` names it in tables and files."""

    name: str
    damping: Damping
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @property
    def label(self) -> str:
        parts = [LABELS[self.name]]
        if self.name == "hyperinf":
            parts[0] += " as released" if self.options.get("mode") == "paper" else " converged"
        parts += [f"{k}={v}" for k, v in self.options.items() if k != "mode"]
        parts += [self.note] if self.note else []
        return ", ".join(parts)

    def solver(self) -> Solver:
        return make_solver(self.name, self.damping, **self.options)


def parse_method(text: str, damping: Damping, note: str = "") -> Method:
    """Read `name` or `name:key=value,key=value`, and check the options.

    Raises:
        InputError: an unknown method or option, or a value that it does not take.
    """
    name, _, rest = text.partition(":")
    name = name.strip()
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, separator, value = part.partition("=")
        if not separator:
            raise InputError(f"method {text!r}: {part!r} is not key=value")
        options[key.strip()] = _value(value.strip())
    method = Method(name, damping, options, note)
    try:
        _check_options(METHODS[name], options)
        method.solver()
    except ValueError as error:
        raise InputError(f"method {text!r}: {error}") from None
    return method


def parse_damping(text: str) -> Damping:
    """Read `0.1` (times the mean squared gradient), `abs:1e-3`, `trace:0.1`, or a sum by `+`."""
    makers: dict[str, Callable[[float], Damping]] = {
        "datainf": DataInfDamping,
        "abs": AbsoluteDamping,
        "trace": TraceDamping,
    }
    total: Damping | None = None
    for part in text.replace("e+", "e").split("+"):
        kind, separator, number = part.strip().rpartition(":")
        kind = kind if separator else "datainf"
        try:
            term = makers[kind](float(number))
        except (KeyError, ValueError):
            raise InputError(
                f"damping {text!r}: {part.strip()!r} is not NUMBER, abs:NUMBER or trace:NUMBER "
                "with a finite number of at least 0"
            ) from None
        total = term if total is None else total + term
    assert total is not None
    return total


def _check_options(solver: type[Solver], options: dict[str, Any]) -> None:
    """Refuse what the solver would trip over only in the middle of its work."""
    for key, value in options.items():
        if key not in solver.option_names:
            known = ", ".join(solver.option_names) or "none"
            raise ValueError(f"unknown option {key!r}; known: {known}")
        default = inspect.signature(solver).parameters[key].default
        if isinstance(default, str) or value == default:
            continue
        if isinstance(default, int) and type(value) is not int:
            raise ValueError(f"{key} must be a whole number, got {value!r}")
        if type(value) not in (int, float):
            raise ValueError(f"{key} must be a number, got {value!r}")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

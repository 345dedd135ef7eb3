"""Numeric options and sizes, checked before anything runs."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ..errors import InputError


def positive(**options: float) -> None:
    """Raise InputError unless every option is a finite number over 0."""
    for name, value in options.items():
        if not 0 < _number(name, value) < math.inf:
            raise InputError(f"{name} must be positive and finite, got {value}")


def positive_or_none(**options: float | None) -> None:
    """`positive`, of options that may be left unset."""
    positive(**{name: value for name, value in options.items() if value is not None})


def not_negative(**options: float) -> None:
    """Raise InputError unless every option is a finite number of at least 0."""
    for name, value in options.items():
        if not 0 <= _number(name, value) < math.inf:
            raise InputError(f"{name} must be finite and not negative, got {value}")


def at_least_one(**counts: int) -> None:
    """Raise InputError unless every count is a whole number from 1."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise InputError(f"{name} must be a whole number, got {value!r}")
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")


def _number(name: str, value: float) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} must be a number, got {value!r}")
    return float(value)

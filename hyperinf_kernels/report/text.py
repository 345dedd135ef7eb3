"""Plain text of the HTML report: readable numbers, and tolerant access to a JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "\u2013"
MINUS, TIMES = "\u2212", "\u00d7"
_SUPERSCRIPT = str.maketrans(
    "-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079"
)
Metrics = dict[str, tuple[float | None, float | None]]  # name -> (mean, standard deviation)


def mapping(value: object) -> Mapping[str, Any]:
    """`value` where it is a mapping, otherwise an empty one (a missing or null optional key)."""
    return value if isinstance(value, Mapping) else {}


def sequence(value: object) -> Sequence[Any]:
    """`value` where it is a list or tuple, otherwise an empty one (missing or null key)."""
    return value if isinstance(value, (list, tuple)) else ()


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The entries of a list, each as a mapping."""
    return [mapping(v) for v in sequence(value)]


def finite(value: object) -> float | None:
    """`value` as a float where it is a finite number, otherwise None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:  # an integer beyond the range of a double
        return None
    return result if math.isfinite(result) else None


def power_of_ten(exponent: int) -> str:
    """10 with `exponent` in superscript characters, which also work in SVG and in tooltips."""
    return "10" + str(exponent).translate(_SUPERSCRIPT)


def number(value: object, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.982, 12,340 or 3.1 times a power of ten."""
    x = finite(value)
    if x is None:
        return MISSING if value is None else "not finite"
    if x == 0:
        return "0"
    sign, size = (MINUS if x < 0 else ""), abs(x)
    if 10.0**digits <= size < 1e6:
        return f"{sign}{size:,.0f}"
    if 1e-3 <= size < 10.0**digits:
        return f"{sign}{float(f'{size:.{digits}g}'):,}".removesuffix(".0")
    mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    factor = "" if mantissa == "1" else f"{mantissa}{TIMES}"
    return f"{sign}{factor}{power_of_ten(int(exponent))}"


def fixed(value: object, places: int = 3) -> str:
    """A number with a fixed count of decimals, so that a column of them lines up."""
    x = finite(value)
    return number(value) if x is None else f"{x:.{places}f}".replace("-", MINUS)


def seconds(value: object) -> str:
    """A duration given in seconds, in the unit that a person would use."""
    x = finite(value)
    if x is None or x < 0:
        return MISSING
    if x < 1:
        return f"{number(x * 1e3, 2)} ms"
    if x < 120:
        return f"{x:.1f} s"
    minutes, rest = divmod(round(x), 60)
    if minutes < 120:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(n: int | None, noun: str, plural: str | None = None) -> str:
    """'1 query' or '1,200 queries'; without a number just the plural noun."""
    many = plural or f"{noun}s"
    return many if n is None else f"{n:,} {noun if n == 1 else many}"


def read_metrics(group: object) -> Metrics:
    """{'auc_mean': m, 'auc_sd': s, 'recall': r} as {'auc': (m, s), 'recall': (r, None)}."""
    values = mapping(group)
    names = dict.fromkeys(str(k).removesuffix("_mean").removesuffix("_sd") for k in values)
    first = [n for n in ("auc", "recall") if n in names]
    return {
        n: (finite(values.get(f"{n}_mean", values.get(n))), finite(values.get(f"{n}_sd")))
        for n in (*first, *(n for n in names if n not in first))
    }

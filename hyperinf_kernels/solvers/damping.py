"""The damping added to a block's curvature: a rule, resolved per block, always reported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Damping:
    """lambda = data_inf * mean squared gradient + trace * mean eigenvalue + absolute."""

    data_inf: float = 0.0
    trace: float = 0.0
    absolute: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("data_inf", self.data_inf), ("trace", self.trace),
                            ("absolute", self.absolute)):  # fmt: skip
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} damping must be finite and not negative, got {value}")

    def __add__(self, other: Damping) -> Damping:
        return Damping(
            self.data_inf + other.data_inf,
            self.trace + other.trace,
            self.absolute + other.absolute,
        )

    def value(self, mean_square: float, mean_eigenvalue: float) -> float:
        """lambda of one block.

        Args:
            mean_square: mean of the squared gradient entries over samples and entries.
            mean_eigenvalue: trace / dimension of the undamped curvature that the method inverts.
        """
        return self.data_inf * mean_square + self.trace * mean_eigenvalue + self.absolute

    def __str__(self) -> str:
        terms = (
            (self.data_inf, "x mean squared gradient"),
            (self.trace, "x mean eigenvalue"),
            (self.absolute, ""),
        )
        return " + ".join(f"{c:g} {unit}".strip() for c, unit in terms if c) or "0"


def DataInfDamping(c: float = 0.1) -> Damping:  # noqa: N802, a constructor by its public name
    """c times the block's mean squared gradient entry, the rule of DataInf and HyperINF."""
    return Damping(data_inf=c)


DEFAULT_DAMPING = DataInfDamping()


def AbsoluteDamping(x: float) -> Damping:  # noqa: N802
    """The same number for every block."""
    return Damping(absolute=x)


def TraceDamping(c: float) -> Damping:  # noqa: N802
    """c times the mean eigenvalue, trace / dimension, of the block's curvature."""
    return Damping(trace=c)


def as_damping(damping: Damping | float) -> Damping:
    """A plain number means `AbsoluteDamping`."""
    return damping if isinstance(damping, Damping) else AbsoluteDamping(float(damping))

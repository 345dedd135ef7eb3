"""What two solvers must share so that one can take over the other's training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from ..errors import InputError
from .damping import Damping


class Mergeable(Protocol):
    """What is compared of a solver."""

    method: ClassVar[str]
    damping: Damping

    @property
    def blocks(self) -> Mapping[str, Any]: ...
    def options(self) -> dict[str, Any]: ...


def check_mergeable(one: Mergeable, other: Mergeable) -> None:
    """Raise InputError unless `merge` can add the second solver to the first."""
    if type(other) is not type(one) or other is one:
        what = "itself" if other is one else type(other).__name__
        raise InputError(
            f"{one.method} merges with another solver of its own kind, not with {what}"
        )
    for what, mine, theirs in (
        ("options", one.options(), other.options()),
        ("damping", one.damping, other.damping),
    ):
        if mine != theirs:
            raise InputError(f"cannot merge solvers of different {what}: {mine} and {theirs}")
    shapes = [{name: s.shape for name, s in x.blocks.items()} for x in (one, other)]
    if shapes[0] and shapes[1] and shapes[0] != shapes[1]:
        name, shape = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0]
        raise InputError(
            f"cannot merge solvers of different blocks: {name} {shape} is in one of them"
        )

"""Per-sample gradients as solvers take them, and one clear error where they do not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.checks import FLOATING, unusual
from ..ops.metadata import is_transformed
from .rows import squares

Gradients = Mapping[str, Tensor]


def check_shapes(grads: Gradients, expected: Mapping[str, tuple[int, int]], role: str) -> None:
    """Blocks and shapes of a batch of per-sample gradients; `role` is train or query."""
    if not grads:
        raise InputError(f"{role} gradients hold no block")
    if expected and set(grads) != set(expected):
        missing, extra = sorted(set(expected) - set(grads)), sorted(set(grads) - set(expected))
        raise InputError(
            f"{role} gradients have other blocks than the training gradients before them: "
            f"missing {missing[:3]}, unexpected {extra[:3]}"
        )
    counts = {}
    for name, batch in grads.items():
        if isinstance(batch, Tensor):
            _refuse_unusual(name, batch, role)
        if not isinstance(batch, Tensor) or batch.dtype not in FLOATING or batch.ndim != 3:
            what = type(batch).__name__
            if isinstance(batch, Tensor):
                what = f"{batch.dtype} {tuple(batch.shape)}"
            raise InputError(
                f"block {name}: {role} gradients must be a floating-point tensor (samples, r, d), "
                f"got {what}"
            )
        shape = (int(batch.shape[1]), int(batch.shape[2]))
        if 0 in shape:
            raise InputError(f"block {name}: {role} gradients {shape} hold no numbers")
        if name in expected and shape != tuple(expected[name]):
            raise InputError(
                f"block {name}: {role} gradients are {shape}, training gradients {expected[name]}"
            )
        counts[name] = len(batch)
    if len(set(counts.values())) > 1:
        one, other = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        raise InputError(
            f"{role} gradients disagree on the number of samples: "
            f"{one} has {counts[one]}, {other} has {counts[other]}"
        )


def not_finite(name: str, method: str, hint: str | None = None) -> InputError:
    """The error for a result of one block that holds NaN or inf."""
    return InputError(
        f"block {name}: {method} gave NaN or inf "
        f"({hint or 'check damping and the scale of the gradients'})"
    )


def _refuse_unusual(name: str, batch: Tensor, role: str) -> None:
    if (what := unusual(batch)) is not None:
        raise InputError(f"block {name}: {role} gradients must be a plain tensor, got {what}")
    if is_transformed(batch):
        raise InputError(
            f"block {name}: {role} gradients carry a forward-mode derivative or belong to a "
            "torch.func transform; solvers take the numbers alone "
            "(torch.autograd.forward_ad.unpack_dual(...).primal, or call outside the transform)"
        )


def row_squares(
    name: str, batch: Tensor, role: str, first_row: int = 0, known: Tensor | None = None
) -> Tensor:
    """||row||^2 (B,) in fp64 to about 1e-6, whatever the scale; `known`: by `row_dots`.

    Raises:
        InputError: NaN or inf, naming the block and the row.
    """
    sizes = squares(batch.flatten(1), known)
    if not math.isfinite(float(sizes.sum())):
        check_finite(name, batch, role, first_row)
    return sizes


def check_finite(name: str, batch: Tensor, role: str, first_row: int = 0) -> None:
    """Name the block and the first row whose gradient holds NaN or inf."""
    # the extremes keep NaN and inf, and are one pass at the speed of memory; sums in fp64 are not
    extremes = torch.stack(torch.aminmax(batch.detach())) if batch.numel() else batch.new_zeros(1)
    if not bool(torch.isfinite(extremes).all()):
        rows = torch.nonzero(~torch.isfinite(batch).flatten(1).all(1)).flatten()
        raise InputError(
            f"block {name}: the gradient of {role} row {first_row + int(rows[0])} holds NaN or inf "
            f"({len(rows)} of {len(batch)} rows in this batch)"
        )

"""Is a built-in loss the one that the model has of its own? Asked of a stream's first batch.

The loss of each row in its batch is compared with `model(**row, labels=...).loss` times the count
that it averages over. A loss that is shifted where the model's is not, a problem type that says
something else, inputs that are lost, padding that a row can see: all of them change this number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .inputs import accepted, forward_inputs, local, unwrapped
from .losses import IGNORED, Loss, OwnLoss
from .rows import OneRow, row_cutter

# relative to the larger of the loss and a share of what it is summed over; transformers computes
# its losses in fp32, and bf16 keeps 8 bits
LIMITS = {torch.float64: (1e-4, 1e-2), torch.float32: (1e-4, 1e-2)}
LOW_PRECISION = (5e-2, 1.0)


def check_own_loss(
    model: nn.Module, batch: Any, loss: Loss, first_row: int = 0, one_row: OneRow | None = None
) -> bool:
    """Compare a built-in loss with the model's own on one batch of a `prepared` model.

    Args:
        one_row: (batch, row) -> that row alone. None: text is cut by the names of its columns;
            of other batches the whole, the first and the last row are compared, which needs no cut.

    Returns:
        Whether there was something to compare: False for a callable of the user's and for a model
        that returns no loss.

    Raises:
        InputError: they differ (both values, the row and the model's class named).
    """
    model = local(model)
    names = accepted(model)
    if not isinstance(loss, OwnLoss) or (names is not None and "labels" not in names):
        return False
    labels, count = loss.own_labels(model, batch)
    loss_of_rows: Loss = loss  # type: ignore[assignment]
    with torch.no_grad():
        ours = loss_of_rows(model, batch).double()
    if loss.reduction == "mean":
        ours = ours * count
    cut = row_cutter(model, one_row)
    rows = [cut(batch, i) for i in range(len(ours))]
    if rows[0] is not None:
        for i, row in enumerate(rows):
            own = _own(model, row, *loss.own_labels(model, row))
            if own is None:
                return False
            _compare(model, loss, float(ours[i]), own, int(count[i]), f"row {first_row + i}")
        return True
    own = _own(model, batch, labels, count)
    if own is None:
        return False
    _compare(model, loss, float(ours.sum()), own, int(count.sum()), "the first batch")
    if not labels.is_floating_point():
        for i in {0, len(ours) - 1}:
            one = torch.full_like(labels, IGNORED)
            one[i] = labels[i]
            own = _own(model, batch, one, count[i])
            assert own is not None
            _compare(model, loss, float(ours[i]), own, int(count[i]), f"row {first_row + i}")
    return True


def _own(model: nn.Module, batch: Mapping[str, Any], labels: Tensor, count: Tensor) -> float | None:
    """The model's own mean loss times what it averages over; None if it returns none."""
    # peft's own models may add a term of the adapter (AdaLoRA), which no row owns
    if hasattr(model, "get_base_model"):
        model = cast(Any, model).get_base_model()
    with torch.no_grad():
        out = model(**forward_inputs(model, batch), labels=labels)
    own = getattr(out, "loss", None)
    return float(own) * int(count.sum()) if isinstance(own, Tensor) else None


def _compare(
    model: nn.Module, loss: object, ours: float, own: float, count: int, where: str
) -> None:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    limit, share = max(LIMITS.get(dtype, LOW_PRECISION) for dtype in dtypes)
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        limit, share = LOW_PRECISION
    if abs(ours - own) <= limit * max(abs(own), share * count):
        return
    kind = type(unwrapped(model)).__name__
    raise InputError(
        f"{where}: the loss ({loss}) is {ours:.6g}, but {kind}'s own loss on that row alone times "
        f"its count ({count}) is {own:.6g}: the loss is not the model's (see loss=), its "
        "configuration adds to it (router losses, problem_type), or a row's loss depends on "
        "padding or on other rows"
    )

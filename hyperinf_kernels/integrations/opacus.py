"""opacus 1.6.0: its per-sample gradients as our blocks.

`loss.backward(); solver.update(grad_samples(model))`, with opacus' `loss_reduction` the same as the
loss's: it then undoes a mean over the batch itself. opacus needs the model in training mode; set
dropout to zero instead.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import InputError
from .imports import require
from .layout import block_of

require("opacus", "opacus")

__all__ = ["grad_samples"]


def grad_samples(module: nn.Module, *, clear: bool = True) -> dict[str, Tensor]:
    """{parameter: (B, r, d)} from the `grad_sample` that opacus left after a backward pass.

    Args:
        module: the `GradSampleModule`, or the model that was prepared without wrapping.
        clear: forget them afterwards, as the next backward pass would add to them.

    Raises:
        InputError: no parameter has per-sample gradients, or a block has several passes' worth.
    """
    found = {}
    for name, parameter in module.named_parameters():
        grad = getattr(parameter, "grad_sample", None)
        if grad is None or not parameter.requires_grad:
            continue
        if isinstance(grad, list):
            if len(grad) != 1:
                raise InputError(
                    f"{name} holds the gradients of {len(grad)} backward passes; read them after "
                    "each one"
                )
            grad = grad[0]
        name = name.removeprefix("_module.")
        found[name] = block_of(name, grad.detach())
        if clear:
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
    if not found:
        raise InputError(
            "no parameter has a grad_sample: wrap the model with opacus, call backward() first, "
            "and keep it in training mode"
        )
    return found

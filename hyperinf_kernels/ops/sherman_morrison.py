"""The DataInf operator: the mean of rank-1 inverses, each in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .dispatch import checked, run


def sherman_morrison(
    V: Tensor, G: Tensor, damping: float | Tensor, act: Tensor | None = None
) -> Tensor:
    """`V @ mean_i inv(outer(g_i, g_i) + damping * I)`, without forming an inverse.

    By Sherman and Morrison each term is (I - g g^T / (damping + ||g||^2)) / damping, so the mean
    costs one dot product and one weighted sum per row of G (DataInf, arXiv 2310.00902, eq. 5).

    With `act` the rows are the gradients g_i = delta_i^T act_i of a linear layer and W and V keep
    their shape (O, I); only slices of the gradients are ever formed. `explain` knows that form as
    "sherman_morrison_factored" of V, delta and act.

    Args:
        V: (..., m, D) rows to precondition, typically query gradients; (..., m, O, I) with `act`.
        G: (..., n, D) flattened per-sample training gradients, the same batch dimensions, n >= 1;
            or delta (..., n, T, O), the gradient at the layer's output, when `act` is given.
        damping: positive number, or a tensor that broadcasts to the batch dimensions; one on a GPU
            is read by the host to check it.
        act: (..., n, T, I), the layer's input. T = 0 gives zero gradients.

    Returns:
        Of V's shape in fp32, or fp64 if any input is fp64.

    Raises:
        ValueError: shapes or devices do not fit, n = 0, or damping is not positive and finite.
        TypeError: V or the rows are not floating-point tensors.
    """
    rows = (V, G) if act is None else (V, G, act)
    op, fit = _FORMS[act is None]
    if isinstance(damping, Tensor):
        # it takes part in the choice, lest a kernel without a backward drops its gradient
        ready = checked(op, fit, (*rows, damping))
        lam = _read(damping, *ready.options).to(V.device)
    else:
        ready = checked(op, fit, rows)
        batch, dtype = ready.options
        if not _POSITIVE[dtype][0] < damping < _POSITIVE[dtype][1]:
            raise ValueError(f"damping must be positive and finite, got {damping}")
        # filled in without the host waiting for the device
        lam = torch.full(batch, damping, dtype=dtype, device=V.device)
    return run(ready, (*rows, lam))


# numbers between these are positive and finite once rounded to the dtype
_POSITIVE = {torch.float32: (2.0**-150, 2.0**128 - 2.0**103), torch.float64: (0.0, math.inf)}


def _fit(V: Tensor, G: Tensor, damping: Tensor | None = None) -> tuple[torch.Size, torch.dtype]:
    checks.floating(V=V, G=G)
    checks.at_least(2, "(..., rows, D)", V=V, G=G)
    checks.agree(
        V.shape[:-2] == G.shape[:-2] and V.shape[-1] == G.shape[-1],
        "V (..., m, D) and G (..., n, D) must share batch dimensions and D", V=V, G=G,
    )  # fmt: skip
    checks.agree(G.shape[-2] > 0, "G must hold at least one training row", G=G)
    return _fit_damping(damping, V.shape[:-2]), checks.accumulation_dtype(V, G)


def _fit_factored(
    V: Tensor, delta: Tensor, act: Tensor, damping: Tensor | None = None
) -> tuple[torch.Size, torch.dtype]:
    checks.floating(V=V, delta=delta, act=act)
    checks.at_least(3, "(..., m, O, I)", V=V)
    checks.at_least(3, "(..., n, T, features)", delta=delta, act=act)
    checks.agree(
        delta.shape[:-1] == act.shape[:-1]
        and V.shape[:-3] == delta.shape[:-3]
        and V.shape[-2:] == (delta.shape[-1], act.shape[-1]),
        "V (..., m, O, I), delta (..., n, T, O) and act (..., n, T, I) must fit",
        V=V, delta=delta, act=act,
    )  # fmt: skip
    checks.agree(delta.shape[-3] > 0, "delta must hold at least one training row", delta=delta)
    return _fit_damping(damping, V.shape[:-3]), checks.accumulation_dtype(V, delta, act)


_FORMS: dict[bool, tuple[str, Callable[..., tuple[torch.Size, torch.dtype]]]] = {
    True: ("sherman_morrison", _fit),
    False: ("sherman_morrison_factored", _fit_factored),
}


def _fit_damping(damping: Tensor | None, batch: torch.Size) -> torch.Size:
    """The batch's shape, to which the damping must broadcast."""
    if damping is None:
        return batch
    checks.plain("damping", damping)
    shape = damping.shape
    sizes = zip(reversed(shape), reversed(batch), strict=False)
    if len(shape) > len(batch) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(f"damping {tuple(shape)} does not broadcast to the batch {tuple(batch)}")
    return batch


def _read(damping: Tensor, batch: torch.Size, dtype: torch.dtype) -> Tensor:
    """The damping in the dtype of the sums and of the batch's shape, once its values are fit."""
    given = damping.to(dtype)
    if not bool(((given > 0) & torch.isfinite(given)).all()):
        raise ValueError(f"damping must be positive and finite, got {damping}")
    return given.expand(batch)

"""The DataInf operator: the mean of rank-1 inverses, each in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import call


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
    if act is None:
        checks.floating(V=V, G=G)
        checks.at_least(2, "(..., rows, D)", V=V, G=G)
        checks.agree(
            V.shape[:-2] == G.shape[:-2] and V.shape[-1] == G.shape[-1],
            "V (..., m, D) and G (..., n, D) must share batch dimensions and D", V=V, G=G,
        )  # fmt: skip
        checks.agree(G.shape[-2] > 0, "G must hold at least one training row", G=G)
        return call("sherman_morrison", (V, G, _damping(damping, V.shape[:-2], V, G)))
    delta = G
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
    lam = _damping(damping, V.shape[:-3], V, delta, act)
    return call("sherman_morrison_factored", (V, delta, act, lam))


def _damping(damping: float | Tensor, batch: torch.Size, *tensors: Tensor) -> Tensor:
    """Damping as a tensor of the batch's shape, in the dtype of the sums."""
    dtype, device = checks.accumulation_dtype(*tensors), tensors[0].device
    # a number is checked and filled in without the host waiting for the device
    given = torch.as_tensor(damping, dtype=dtype)
    if not bool(((given > 0) & torch.isfinite(given)).all()):
        raise ValueError(f"damping must be positive and finite, got {damping}")
    if isinstance(damping, Tensor):
        lam = given.to(device)
    else:
        lam = torch.full((), damping, dtype=dtype, device=device)
    try:
        return lam.expand(batch)
    except RuntimeError:
        raise ValueError(
            f"damping {tuple(lam.shape)} does not broadcast to the batch {tuple(batch)}"
        ) from None

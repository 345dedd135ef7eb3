"""The DataInf operator: the mean of rank-1 inverses, each in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .dispatch import call


def sherman_morrison(V: Tensor, G: Tensor, damping: float | Tensor) -> Tensor:
    """`V @ mean_i inv(outer(g_i, g_i) + damping * I)`, without forming an inverse.

    By Sherman and Morrison each term is (I - g g^T / (damping + ||g||^2)) / damping, so the mean
    costs one dot product and one weighted sum per row of G (DataInf, arXiv 2310.00902, eq. 5).

    Args:
        V: (..., m, D) rows to precondition, typically query gradients.
        G: (..., n, D) flattened per-sample training gradients, the same batch dimensions, n >= 1.
        damping: positive number, or a tensor that broadcasts to the batch dimensions.

    Returns:
        (..., m, D) in fp32, or fp64 if any input is fp64.

    Raises:
        ValueError: shapes or devices do not fit, n = 0, or damping is not positive and finite.
        TypeError: V or G is not a floating-point tensor.
    """
    checks.floating(V=V, G=G)
    checks.at_least(2, "(..., rows, D)", V=V, G=G)
    checks.agree(
        V.shape[:-2] == G.shape[:-2] and V.shape[-1] == G.shape[-1],
        "V (..., m, D) and G (..., n, D) must share batch dimensions and D", V=V, G=G,
    )  # fmt: skip
    checks.agree(G.shape[-2] > 0, "G must hold at least one training row", G=G)
    dtype = checks.accumulation_dtype(V, G)
    lam = torch.as_tensor(damping, dtype=dtype, device=V.device)
    if not bool(((lam > 0) & torch.isfinite(lam)).all()):
        raise ValueError(f"damping must be positive and finite, got {damping}")
    try:
        lam = lam.expand(V.shape[:-2])
    except RuntimeError:
        raise ValueError(
            f"damping {tuple(lam.shape)} does not broadcast to the batch {tuple(V.shape[:-2])}"
        ) from None
    return call("sherman_morrison", (V, G, lam))

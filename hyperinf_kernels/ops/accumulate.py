"""Second moments of per-sample gradients, added in place: GFIM and Gram matrices."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import checks
from .dispatch import checked, run
from .reference import RUN as RUN

Side = Literal["cols", "rows"]


def gfim_accumulate_(
    C: Tensor,
    grads_or_delta: Tensor,
    act: Tensor | None = None,
    *,
    side: Side = "cols",
    alpha: float = 1.0,
    fine: bool = True,
) -> Tensor:
    """`C += alpha * sum_b g_b^T g_b` (cols) or `g_b g_b^T` (rows), the unnormalised GFIM.

    The generalized Fisher information matrix of HyperINF (arXiv 2410.05090): one symmetric rank-k
    update of the gradients stacked along their other side. With alpha = 1/n over all n samples, C
    is the mean.

    Args:
        C: (..., d, d) for cols, (..., r, r) for rows; fp32 or fp64, updated in place.
        grads_or_delta: gradients (..., B, r, d), the batch dimensions of C first, any sample
            dimensions after them; or delta (..., B, T, r) when `act` is given.
        act: (..., B, T, d); then g_b = delta_b^T act_b, and only slices of it are ever formed.
        side: which side of g the matrix lives on.
        alpha: factor of the added sum.
        fine: for a fp64 C, products in fp64. False: at most `RUN` products in a row are summed in
            fp32 and these sums in fp64, at twice the speed; what that loses does not grow with B.
            A fp32 C is always summed in fp32.

    Returns:
        C itself.

    Raises:
        ValueError: shapes or devices do not fit, unknown side.
        TypeError: C is not fp32 or fp64, or an input is not floating point.
    """
    tensors = (C, grads_or_delta) if act is None else (C, grads_or_delta, act)
    fit = _fit_grads if act is None else _fit_factors
    ready = checked("gfim_accumulate_", fit, tensors, side)
    return run(ready, tensors, side=side, alpha=alpha, fine=fine)


def gram_accumulate_(
    K: Tensor, G1: Tensor, G2: Tensor | None = None, *, fine: bool = True
) -> Tensor:
    """`K += G1 @ G2^T`: all dot products between two sets of flattened gradients.

    Args:
        K: (..., n1, n2), or (..., n, n) without G2; fp32 or fp64, updated in place.
        G1: (..., n1, D). G2: (..., n2, D); None means G1 itself, a symmetric update.
        fine: as for `gfim_accumulate_`.

    Returns:
        K itself.

    Raises:
        ValueError: shapes or devices do not fit.
        TypeError: K is not fp32 or fp64, or an input is not floating point.
    """
    tensors = (K, G1, G1 if G2 is None else G2)
    return run(checked("gram_accumulate_", _fit_gram, tensors), tensors, fine=fine)


# --- what must hold of the tensors --------------------------------------------------------------


def _fit_grads(C: Tensor, grads: Tensor, side: str) -> tuple[()]:
    _fit_sum(C, side, grads=grads)
    size = grads.shape[-1 if side == "cols" else -2] if grads.ndim > 1 else -1
    lead = C.shape[:-2]
    checks.agree(
        grads.ndim >= C.ndim
        and grads.shape[: len(lead)] == lead
        and C.shape[-2:] == (size, size),
        f"grads must be (..., B, r, d) and C the matching square for side={side!r}",
        C=C, grads=grads,
    )  # fmt: skip
    return ()


def _fit_factors(C: Tensor, delta: Tensor, act: Tensor, side: str) -> tuple[()]:
    _fit_sum(C, side, delta=delta, act=act)
    size = act.shape[-1] if side == "cols" else delta.shape[-1]
    lead = C.shape[:-2]
    checks.agree(
        delta.ndim >= C.ndim
        and delta.shape[:-1] == act.shape[:-1]
        and delta.shape[: len(lead)] == lead
        and C.shape[-2:] == (size, size),
        f"delta (..., B, T, r) and act (..., B, T, d) must fit C for side={side!r}",
        C=C, delta=delta, act=act,
    )  # fmt: skip
    return ()


def _fit_sum(C: Tensor, side: str, **terms: Tensor) -> None:
    if side not in ("cols", "rows"):
        raise ValueError(f"side must be cols or rows, got {side!r}")
    checks.floating(C=C, **terms)
    checks.accumulator("C", C)


def _fit_gram(K: Tensor, G1: Tensor, G2: Tensor) -> tuple[()]:
    checks.floating(K=K, G1=G1, G2=G2)
    checks.accumulator("K", K)
    checks.at_least(2, "(..., n, D)", K=K, G1=G1, G2=G2)
    checks.agree(
        G1.shape[-1] == G2.shape[-1]
        and K.shape[:-2] == G1.shape[:-2] == G2.shape[:-2]
        and K.shape[-2:] == (G1.shape[-2], G2.shape[-2]),
        "K (..., n1, n2), G1 (..., n1, D) and G2 (..., n2, D) must fit",
        K=K, G1=G1, G2=G2,
    )  # fmt: skip
    return ()

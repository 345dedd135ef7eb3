"""The block inverse of dattri's LoGra and FactGraSS, all blocks of one size in one checked call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import spd_inverse
from .imports import require

require("dattri", "dattri")

import dattri.algorithm.block_projected_if.block_projected_if as block_projected_if
from dattri.algorithm.block_projected_if.block_projected_if import BlockProjectedIFAttributor

__all__ = ["patches", "stable_inverse"]


def stable_inverse(matrix: Tensor, damping: float | None = None) -> Tensor:
    """(C + c trace/d I)^-1 (d, d) or (..., d, d): dattri's block inverse, batched and checked.

    Args:
        matrix: symmetric positive semi-definite. damping: c, relative; None: 1e-5, as in dattri.

    Raises:
        InputError: NaN or inf, or a residual over 1e-2, which dattri would have passed on.
    """
    c = 1e-5 if damping is None else float(damping)
    A = matrix.double()
    size = A.shape[-1]
    shift = c * A.diagonal(dim1=-2, dim2=-1).sum(-1) / size
    A = A + shift[..., None, None] * torch.eye(size, dtype=A.dtype, device=A.device)
    if not bool(torch.isfinite(A).all()):
        raise InputError("the block's Hessian holds NaN or inf")
    inverse, info = spd_inverse(A, return_info=True)
    worst = float(torch.as_tensor(info.residual).max())
    if not worst <= 1e-2:
        raise InputError(
            f"the inverse of a {size} x {size} block has residual {worst:.1e} at relative damping "
            f"{c:g}; increase the damping"
        )
    return inverse.to(matrix.dtype)


def patches() -> dict[tuple[Any, str], Any]:
    """{(owner, attribute): value} that put this inverse into dattri."""
    stock = BlockProjectedIFAttributor.compute_preconditioners
    return {
        (block_projected_if, "stable_inverse"): stable_inverse,
        (BlockProjectedIFAttributor, "compute_preconditioners"): _batched(stock),
    }


def _batched(stock: Callable[..., None]) -> Callable[..., None]:
    """dattri's own method, with its inverses put off until all blocks are there."""
    if hasattr(stock, "batched"):
        return stock

    def compute_preconditioners(self: Any, damping: float | None = None) -> None:
        store, waiting = self.offload_manager.store_preconditioner, dict[int, Tensor]()
        inverse = block_projected_if.stable_inverse

        def take(layer: int, H: Tensor | None) -> None:
            if H is None:
                store(layer, None)
            else:
                waiting[layer] = H

        self.offload_manager.store_preconditioner = take
        block_projected_if.stable_inverse = lambda matrix, damping=None: matrix
        try:
            stock(self, damping)
        finally:
            block_projected_if.stable_inverse = inverse
            self.offload_manager.store_preconditioner = store
        chosen = self.damping if damping is None else damping
        for size in sorted({len(H) for H in waiting.values()}):
            layers = [layer for layer, H in waiting.items() if len(H) == size]
            stacked = torch.stack([waiting.pop(layer) for layer in layers])
            for layer, X in zip(layers, stable_inverse(stacked, chosen), strict=True):
                store(layer, X)
        self.offload_manager.wait_for_async_operations()

    compute_preconditioners.batched = True  # type: ignore[attr-defined]
    return compute_preconditioners

"""Per-sample gradients of a linear layer, and what is reduced from them.

For one sample with `delta` (T, O), the loss gradient at the layer's output, and `act` (T, I), its
input, the weight's gradient is g = delta^T act (O, I). "materialise" forms g; "ghost" works on
T x T Gram matrices instead. `prefer_ghost_*` are the flop counts that choose between them.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import checks
from .dispatch import checked, run

Method = Literal["auto", "materialise", "ghost"]


def prefer_ghost_norm(tokens: int, rows: int, cols: int) -> bool:
    """2 T^2 (O + I), half of it by symmetry, against 2 T O I."""
    return tokens * (rows + cols) < 2 * rows * cols


def prefer_ghost_pairwise(tokens: int, rows: int, cols: int) -> bool:
    """Per pair 2 T T' (O + I) against 2 O I; g itself is formed once per sample."""
    return tokens * tokens * (rows + cols) < rows * cols


def prefer_ghost_dot(tokens: int, rows: int, cols: int, count: int) -> bool:
    """2 m T O I against 2 T O I + 2 m O I: forming g loses only for a single matrix."""
    return count * tokens < tokens + count


def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    """`torch.einsum("...to,...ti->...oi", delta, act)`: every sample's weight gradient.

    Args:
        delta: (..., T, O), gradient of the sample's loss at the layer's output.
        act: (..., T, I), the layer's input. T = 0 gives zeros.

    Returns:
        (..., O, I) in fp32, or fp64 if any input is fp64. 2 T O I flop per sample.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: not floating-point tensors.
    """
    tensors = (delta, act)
    return run(checked("per_sample_grad", _fit_pair, tensors), tensors)


def per_sample_norm_sq(delta: Tensor, act: Tensor, method: Method = "auto") -> Tensor:
    """`per_sample_grad(delta, act).square().sum((-2, -1))`, holding few gradients at a time.

    Args:
        delta: (..., T, O). act: (..., T, I).
        method: "materialise", "ghost" (sum of (delta delta^T) * (act act^T)), or "auto", the one of
            fewer flop.

    Returns:
        (...) in fp32, or fp64 if any input is fp64; never negative.

    Raises:
        ValueError: shapes or devices do not fit, unknown method. TypeError: not floating point.
    """
    tensors = (delta, act)
    ready = checked("per_sample_norm_sq", _fit_norm, tensors, method)
    return run(ready, tensors, *ready.options)


def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor, method: Method = "auto") -> Tensor:
    """`torch.einsum("...oi,moi->...m", per_sample_grad(delta, act), V)`.

    Args:
        delta: (..., T, O). act: (..., T, I).
        V: (m, O, I), or (O, I) for a single matrix, without the last dimension of the result.
        method: "materialise", "ghost" (sum_t delta_t^T V act_t) or "auto".

    Returns:
        (..., m), or (...) for V (O, I), in fp32, or fp64 if any input is fp64.

    Raises:
        ValueError: shapes or devices do not fit, unknown method. TypeError: not floating point.
    """
    ready = checked("per_sample_dot", _fit_dot, (delta, act, V), method)
    if V.ndim == 3:
        return run(ready, (delta, act, V), *ready.options)
    return run(ready, (delta, act, V.unsqueeze(0)), *ready.options).squeeze(-1)


def pairwise_dot(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor) -> Tensor:
    """Inner products of all pairs of per-sample gradients, (..., B1, B2).

    Args:
        delta1: (..., B1, T1, O). act1: (..., B1, T1, I).
        delta2: (..., B2, T2, O). act2: (..., B2, T2, I), the same batch dimensions.

    Returns:
        (..., B1, B2) in fp32, or fp64 if any input is fp64.

    Raises:
        ValueError: shapes or devices do not fit. TypeError: not floating point.
    """
    tensors = (delta1, act1, delta2, act2)
    ready = checked("pairwise_dot", _fit_pairs, tensors)
    return run(ready, tensors, *ready.options)


# --- what must hold of the tensors, and the form that their shapes ask for ----------------------


def _fit_pair(
    delta: Tensor, act: Tensor, delta_name: str = "delta", act_name: str = "act"
) -> tuple[()]:
    named = {delta_name: delta, act_name: act}
    checks.floating(**named)
    checks.at_least(2, "(..., T, features)", **named)
    checks.agree(
        delta.shape[:-1] == act.shape[:-1],
        f"{delta_name} (..., T, O) and {act_name} (..., T, I) must differ in the last size only",
        **named,
    )
    return ()


def _fit_norm(delta: Tensor, act: Tensor, method: str) -> tuple[bool]:
    _fit_pair(delta, act)
    tokens, rows, cols = delta.shape[-2], delta.shape[-1], act.shape[-1]
    return (_ghost(method, prefer_ghost_norm(tokens, rows, cols)),)


def _fit_dot(delta: Tensor, act: Tensor, V: Tensor, method: str) -> tuple[bool]:
    _fit_pair(delta, act)
    checks.floating(delta=delta, V=V)
    checks.agree(
        V.ndim in (2, 3) and V.shape[-2:] == (delta.shape[-1], act.shape[-1]),
        "V must be (m, O, I) or (O, I) for delta (..., T, O), act (..., T, I)",
        V=V, delta=delta, act=act,
    )  # fmt: skip
    count = len(V) if V.ndim == 3 else 1
    tokens, rows, cols = delta.shape[-2], delta.shape[-1], act.shape[-1]
    return (_ghost(method, prefer_ghost_dot(tokens, rows, cols, count)),)


def _fit_pairs(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor) -> tuple[bool]:
    _fit_pair(delta1, act1, "delta1", "act1")
    _fit_pair(delta2, act2, "delta2", "act2")
    checks.floating(delta1=delta1, delta2=delta2)
    checks.at_least(3, "(..., B, T, O)", delta1=delta1, delta2=delta2)
    checks.agree(
        delta1.shape[:-3] == delta2.shape[:-3]
        and delta1.shape[-1] == delta2.shape[-1]
        and act1.shape[-1] == act2.shape[-1],
        "both sides must share batch dimensions, O and I",
        delta1=delta1, act1=act1, delta2=delta2, act2=act2,
    )  # fmt: skip
    tokens = max(delta1.shape[-2], delta2.shape[-2])
    return (prefer_ghost_pairwise(tokens, delta1.shape[-1], act1.shape[-1]),)


def _ghost(method: str, cheaper: bool) -> bool:
    if method not in ("auto", "materialise", "ghost"):
        raise ValueError(f"method must be auto, materialise or ghost, got {method!r}")
    return cheaper if method == "auto" else method == "ghost"

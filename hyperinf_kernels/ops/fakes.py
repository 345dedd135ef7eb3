"""What each compiled op returns for tensors without data, so that torch.compile can trace it.

Import only after the extension: the schemas live there (csrc/ops.cpp).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def fake(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function for tensors without data, which must all be such.

    torch takes one tensor on `meta` for a call without data; the result of another one's device
    would then be memory that nobody has written.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            each = [t for arg in args for t in (arg if isinstance(arg, list | tuple) else [arg])]
            devices = {str(t.device) for t in each if isinstance(t, Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{op}: tensors on {' and '.join(sorted(devices))}; move them")
            return function(*args, **kwargs)

        torch.library.register_fake(f"hyperinf::{op}")(checked)
        return function

    return register


@fake("sherman_morrison")
def sherman_morrison(V: Tensor, G: Tensor, damping: Tensor) -> Tensor:
    return V.new_empty(V.shape)


@fake("row_dots")
def row_dots(rows: list[Tensor], V: Tensor) -> tuple[Tensor, Tensor]:
    n = sum(len(part) for part in rows)
    return (
        V.new_empty((n, len(V)), dtype=torch.float64),
        V.new_empty(n, dtype=torch.float64),
    )


@fake("span")
def span(V: Tensor, rows: list[Tensor], B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    return V.new_empty(V.shape), V.new_empty(V.shape[:1], dtype=torch.float64)


@fake("span_dots")
def span_dots(V: Tensor, rows: list[Tensor], B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    return (
        V.new_empty(B.shape, dtype=torch.float64),
        V.new_empty(V.shape[:1], dtype=torch.float64),
    )


@fake("gram_accumulate_")
def gram_accumulate_(
    C: Tensor, X: Tensor, Y: Tensor | None, alpha: float, runs: bool = False
) -> None:
    return None


@fake("combine_rows")
def combine_rows(X: Tensor, P: Tensor) -> Tensor:
    return X.new_empty(X.shape[1], P.shape[1])


@fake("row_sketch")
def row_sketch(X: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return X.new_empty((X.shape[1], rows[0].shape[1])), X.new_empty(X.shape)


@fake("image_rows")
def image_rows(Z: Tensor, P: Tensor) -> Tensor:
    return Z.new_empty(Z.shape)


@fake("per_sample_grad")
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    return act.new_empty((act.shape[0], delta.shape[2], act.shape[2]), dtype=torch.float32)


@fake("per_sample_norm_sq")
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    return act.new_empty(act.shape[:1], dtype=torch.float32)


@fake("per_sample_dot")
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor) -> Tensor:
    return act.new_empty((act.shape[0], V.shape[0]), dtype=torch.float32)


@fake("pairwise_dot")
def pairwise_dot(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor, ghost: bool) -> Tensor:
    return act1.new_empty((act1.shape[0], act2.shape[0]), dtype=torch.float32)


@fake("schulz")
def schulz(A: Tensor, start: Tensor, coefficients: Tensor, degrees: list[int]) -> Tensor:
    return A.new_empty(A.shape)


@fake("schulz_adaptive")
def schulz_adaptive(
    A: Tensor, V: Tensor | None, start: Tensor | None, coefficients: Tensor | None,
    degrees: list[int], menu: Tensor, goal: float, budget: int, certify: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    result = A.new_empty(A.shape if V is None else V.shape)
    return result, A.new_empty((A.shape[0], 6), dtype=torch.float64)


@fake("matrix_norms")
def matrix_norms(A: Tensor) -> Tensor:
    return A.new_empty((A.shape[0], 6), dtype=torch.float64)


@fake("spd_inverse")
def spd_inverse(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), A.new_empty(A.shape[:1], dtype=torch.int32)


@fake("gfim_accumulate_")
def gfim_accumulate_(C: Tensor, delta: Tensor, act: Tensor, alpha: float) -> None:
    return None

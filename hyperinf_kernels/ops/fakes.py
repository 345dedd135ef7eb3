"""What each compiled op returns for tensors without data, so that torch.compile can trace it.

Import only after the extension: the schemas live there (csrc/ops.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("hyperinf::sherman_morrison")  # type: ignore[untyped-decorator]
def sherman_morrison(V: Tensor, G: Tensor, damping: Tensor) -> Tensor:
    return V.new_empty(V.shape)


@torch.library.register_fake("hyperinf::row_dots")  # type: ignore[untyped-decorator]
def row_dots(rows: list[Tensor], V: Tensor) -> tuple[Tensor, Tensor]:
    n = sum(len(part) for part in rows)
    return (
        V.new_empty((n, len(V)), dtype=torch.float64),
        V.new_empty(n, dtype=torch.float64),
    )


@torch.library.register_fake("hyperinf::span")  # type: ignore[untyped-decorator]
def span(V: Tensor, rows: list[Tensor], B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    return V.new_empty(V.shape), V.new_empty(V.shape[:1], dtype=torch.float64)


@torch.library.register_fake("hyperinf::span_dots")  # type: ignore[untyped-decorator]
def span_dots(V: Tensor, rows: list[Tensor], B: Tensor, a: float) -> tuple[Tensor, Tensor]:
    return (
        V.new_empty(B.shape, dtype=torch.float64),
        V.new_empty(V.shape[:1], dtype=torch.float64),
    )


@torch.library.register_fake("hyperinf::gram_accumulate_")  # type: ignore[untyped-decorator]
def gram_accumulate_(
    C: Tensor, X: Tensor, Y: Tensor | None, alpha: float, runs: bool = False
) -> None:
    return None


@torch.library.register_fake("hyperinf::combine_rows")  # type: ignore[untyped-decorator]
def combine_rows(X: Tensor, P: Tensor) -> Tensor:
    return X.new_empty(X.shape[1], P.shape[1])


@torch.library.register_fake("hyperinf::image_rows")  # type: ignore[untyped-decorator]
def image_rows(Z: Tensor, P: Tensor) -> Tensor:
    return Z.new_empty(Z.shape)


@torch.library.register_fake("hyperinf::per_sample_grad")  # type: ignore[untyped-decorator]
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    return act.new_empty((act.shape[0], delta.shape[2], act.shape[2]), dtype=torch.float32)


@torch.library.register_fake("hyperinf::per_sample_norm_sq")  # type: ignore[untyped-decorator]
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    return act.new_empty(act.shape[:1], dtype=torch.float32)


@torch.library.register_fake("hyperinf::per_sample_dot")  # type: ignore[untyped-decorator]
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor) -> Tensor:
    return act.new_empty((act.shape[0], V.shape[0]), dtype=torch.float32)


@torch.library.register_fake("hyperinf::pairwise_dot")  # type: ignore[untyped-decorator]
def pairwise_dot(delta1: Tensor, act1: Tensor, delta2: Tensor, act2: Tensor, ghost: bool) -> Tensor:
    return act1.new_empty((act1.shape[0], act2.shape[0]), dtype=torch.float32)


@torch.library.register_fake("hyperinf::schulz")  # type: ignore[untyped-decorator]
def schulz(A: Tensor, start: Tensor, coefficients: Tensor, degrees: list[int]) -> Tensor:
    return A.new_empty(A.shape)


@torch.library.register_fake("hyperinf::spd_inverse")  # type: ignore[untyped-decorator]
def spd_inverse(A: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), A.new_empty(A.shape[:1], dtype=torch.int32)


@torch.library.register_fake("hyperinf::gfim_accumulate_")  # type: ignore[untyped-decorator]
def gfim_accumulate_(C: Tensor, delta: Tensor, act: Tensor, alpha: float) -> None:
    return None

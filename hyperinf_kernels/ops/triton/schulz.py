"""Chebyshev-scaled Schulz chains: the whole chain in one launch up to d = 128, products beyond.

All coefficients of `schedule` come as one (steps, B, 8) tensor, so that a chain is a launch with
tensors only and no value is read back by the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..schedule import PRODUCTS, Step
from .configs import choose
from .launch import L2_BYTES, MULTIPROCESSORS, WORD, arch_of, on_device, precision_here, uploaded
from .product import product
from .registers import _schulz_registers_kernel
from .resident import SLOTS, _schulz_resident_kernel

COEFFICIENTS = {
    2: ("b0", "b1"),
    3: ("b1",),
    5: ("b1", "b3"),
    9: ("c1", "c2", "d1", "d2", "e2", "e0", "b1", "b2"),
}
COLUMNS = 8
RESIDENT_PROGRAMS = 2  # per multiprocessor, while the scratch of all of them stays in L2


def packed(steps: Sequence[Step], batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coefficients (steps, batch, 8) in fp32 and degrees (steps,) in int32."""
    zero = torch.zeros(batch, dtype=torch.float32, device=device)
    columns = []
    for step in steps:
        names = COEFFICIENTS[step.degree]
        columns += [step.coefficients[name].reshape(batch).float() for name in names]
        columns += [zero] * (COLUMNS - len(names))
    # one launch, not one for each scalar
    table = torch.stack(columns, 1) if columns else zero.new_zeros(batch, 0)
    table = table.view(batch, len(steps), COLUMNS).transpose(0, 1).contiguous()
    return table, _degrees(tuple(s.degree for s in steps), device)


@uploaded
def _degrees(chain: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(chain, dtype=torch.int32, device=device)


def resident_programs(batch: int, side: int, arch: int) -> int:
    """Programs that share the batch: two on a multiprocessor, their scratch inside L2."""
    fitting = L2_BYTES[arch] // (SLOTS.value * side**2 * WORD)
    return min(batch, RESIDENT_PROGRAMS * MULTIPROCESSORS[arch], fitting)


@torch.library.custom_op("hyperinf_triton::schulz_onchip", mutates_args=())
def schulz_onchip(
    A: Tensor, start: Tensor, coefficients: Tensor, degrees: Tensor, tol: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain from X = start * I for matrices up to 128 on a side, one launch for the batch.

    Args:
        A: (B, d, d) fp32, symmetric, unit column stride. start: (B,). coefficients: (steps, B, 8).
        degrees: (steps,) int32.
        tol: a matrix stops once ||I - A X||_F / sqrt(d) is at or below it; with 0
            only an exact inverse stops early.

    Returns:
        X (B, d, d), its residual (B,) as the kernel's arithmetic sees it, steps done (B,) int32.
    """
    batch, d, _ = A.shape
    X = A.new_empty(A.shape)
    residual, done = A.new_empty(batch), A.new_empty(batch, dtype=torch.int32)
    if X.numel() == 0:
        return X, residual.zero_(), done.zero_()
    arch = arch_of(A)
    kernel = "registers" if d <= 32 else "resident"
    config = choose(kernel, arch, "ieee" if kernel == "registers" else precision, d)
    arguments = (A, start, coefficients, degrees, X, residual, done)
    sizes = (d, len(degrees), batch, tol, A.stride(0), A.stride(1))
    with on_device(A):
        if kernel == "registers":
            _schulz_registers_kernel[(batch,)](*arguments, *sizes, **config.options())
        else:
            programs = resident_programs(batch, config.blocks["D"], arch)
            scratch = A.new_empty(programs * SLOTS.value * config.blocks["D"] ** 2)
            _schulz_resident_kernel[(programs,)](
                *arguments, scratch, *sizes, PRECISION=precision_here(precision), **config.options()
            )
    return X, residual, done


@schulz_onchip.register_fake
def _(
    A: Tensor, start: Tensor, coefficients: Tensor, degrees: Tensor, tol: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    X = A.new_empty(A.shape)
    return X, A.new_empty(len(A)), A.new_empty(len(A), dtype=torch.int32)


@torch.library.custom_op("hyperinf_triton::schulz_chain", mutates_args=())
def schulz_chain(
    A: Tensor,
    start: Tensor,
    coefficients: Tensor,
    degrees: Sequence[int],
    tol: float,
    check_every: int,
    precision: str,
    symmetric_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The chain from X = start * I for matrices of any size, one launch per product.

    Args:
        A, start, coefficients: as in `schulz_onchip`. degrees: of the steps.
        tol, check_every: after every `check_every` steps the host reads the residual, once, and
            stops when all are at or below `tol`; 0 never reads, and the chain can be captured in a
            CUDA graph.
        precision: of every product.
        symmetric_steps: that many first steps compute half of each output and mirror it.

    Returns:
        X (B, d, d), the residual (B,) before the last step done, products done as one int64.
    """
    batch, d, _ = A.shape
    count = torch.zeros((), dtype=torch.int64)
    scale = start[:, None, None]
    X = scale * torch.eye(d, dtype=A.dtype, device=A.device) if not degrees else A
    if A.numel() == 0:
        return A.new_empty(A.shape), A.new_zeros(batch), count
    R = -scale * A
    R.diagonal(dim1=-2, dim2=-1).add_(1)
    norm = R.square().sum((-2, -1))
    for k, degree in enumerate(degrees):
        options: dict[str, Any] = {"precision": precision, "symmetric": k < symmetric_steps}
        if k > 0:
            (R,), norm = product(A, X, [[1.0, -1.0]], **options)
            count += 1
            if check_every and k % check_every == 0 and bool(((norm / d).sqrt() <= tol).all()):
                break
        w = coefficients[k].unbind(-1)
        X = _first_step(R, start, degree, w, options) if k == 0 else _step(X, R, degree, w, options)
        count += PRODUCTS[degree] - (2 if k == 0 else 1)
    return X, (norm / d).sqrt(), count


@schulz_chain.register_fake
def _(
    A: Tensor, start: Tensor, coefficients: Tensor, degrees: Sequence[int], tol: float,
    check_every: int, precision: str, symmetric_steps: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    X = torch.empty_like(A, memory_format=torch.contiguous_format)
    return X, A.new_empty(len(A)), torch.empty((), dtype=torch.int64)


def _first_step(
    R: Tensor, start: Tensor, degree: int, c: Sequence[Tensor], options: dict[str, Any]
) -> Tensor:
    """start * Z: from X = start * I the last product is none."""
    if degree == 2:
        X = (start * c[1])[:, None, None] * R
        X.diagonal(dim1=-2, dim2=-1).add_((start * c[0])[:, None])
        return X
    if degree == 3:
        return product(R, R, [[start, start * c[0], start * c[0]]], (R,), **options)[0][0]
    return _factor(R, degree, c, start, options)


def _step(
    X: Tensor, R: Tensor, degree: int, c: Sequence[Tensor], options: dict[str, Any]
) -> Tensor:
    """X Z."""
    if degree == 2:
        return product(X, R, [[0.0, c[1], c[0]]], (X,), **options)[0][0]
    if degree == 3:
        (S,), _ = product(R, R, [[0.0, 1.0, 1.0]], (R,), **options)
        return product(X, S, [[0.0, c[0], 1.0]], (X,), **options)[0][0]
    Z = _factor(R, degree, c, 1.0, options)
    return product(X, Z, [[0.0, 1.0]], **options)[0][0]


def _factor(
    R: Tensor, degree: int, c: Sequence[Tensor], scale: Tensor | float, options: dict[str, Any]
) -> Tensor:
    """scale * Z of a step of degree 5 or 9, the sums of `schedule` folded into the epilogues."""
    if degree == 5:
        (T, S), _ = product(R, R, [[c[0], c[1], 0.0], [0.0, 1.0, 1.0]], (R,), **options)
        return product(T, S, [[scale, scale]], **options)[0][0]
    c1, c2, d1, d2, e2, e0, b1, b2 = c
    (R2, U), _ = product(R, R, [[0.0, 1.0, 0.0], [0.0, c1, c2]], (R,), **options)
    # S = Y + e2 R2, so e0 Y = e0 S - e0 e2 R2 and Y itself is never stored
    (P, S), _ = product(R2, U, [[0.0, 1.0, d2, d1], [0.0, 1.0, e2, 0.0]], (R2, R), **options)
    weights = [scale, scale, scale * e0, scale * (b2 - e0 * e2), scale * b1]
    return product(P, S, [weights], (S, R2, R), **options)[0][0]

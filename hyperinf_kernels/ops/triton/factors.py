"""The Triton kernels behind the ops on (delta, act): gradients that are never stored whole.

Nothing here imports Triton until a kernel runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Capability, TensorMeta, implements, unfit
from .configs import arch_for, choose, shown
from .launch import FUSED_QUERIES, HALVES, QUERIES, products_of, unit

ROWS = (torch.float32, *HALVES)
# rows of g that a program holds; taller gradients are large products, which torch does well
LARGEST_ROWS = 64


def _refuse_per_sample(metas: tuple[TensorMeta, ...]) -> str | None:
    if metas[0].shape[-1] > LARGEST_ROWS:
        return f"gradients of more than {LARGEST_ROWS} rows are large products, which torch forms"
    return unfit(metas, ROWS)


def _shown_as(
    kernel: str, metas: tuple[TensorMeta, ...], machine: Capability, **more: Any
) -> Mapping[str, Any]:
    precision = products_of([_common(meta.dtype for meta in metas[:2])])
    config = choose(kernel, arch_for(machine.cuda), precision, metas[0].shape[-1])
    return shown(config, precision=precision, **more)


def _norm_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return _shown_as("per_sample", metas, machine)


def _grad_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    return _shown_as("grad", metas, machine)


def _dot_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    if len(metas) < 3 or len(metas[2].shape) < 3 or metas[2].shape[0] <= FUSED_QUERIES:
        return _shown_as("per_sample", metas, machine, variant="fused")
    return _shown_as("grad", metas, machine, variant="slices in L2")


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def prepared(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(..., T, features) as (b, T, features) of one dtype, with unit column stride."""
    dtype = _common(t.dtype for t in tensors)
    flat = (t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:]).to(dtype) for t in tensors)
    return tuple(unit(t) for t in flat)


@implements("per_sample_grad", "triton", _refuse_per_sample, config=_grad_config)
def per_sample_grad(delta: Tensor, act: Tensor) -> Tensor:
    from .grad import per_sample_grad_

    lead = delta.shape[:-2]
    delta, act = prepared(delta, act)
    out = delta.new_empty(len(delta), delta.shape[-1], act.shape[-1], dtype=torch.float32)
    per_sample_grad_(out, delta, act)
    return out.reshape(*lead, *out.shape[1:])


@implements("per_sample_norm_sq", "triton", _refuse_per_sample, config=_norm_config)
def per_sample_norm_sq(delta: Tensor, act: Tensor, ghost: bool) -> Tensor:
    """`ghost` counts the flop of two forms in memory; here no gradient is written either way."""
    from .per_sample import per_sample

    lead = delta.shape[:-2]
    delta, act = prepared(delta, act)
    none = delta.new_empty(0, delta.shape[-1], act.shape[-1], dtype=torch.float32)
    return per_sample(delta, act, none)[1].reshape(lead)


@implements("per_sample_dot", "triton", _refuse_per_sample, config=_dot_config)
def per_sample_dot(delta: Tensor, act: Tensor, V: Tensor, ghost: bool) -> Tensor:
    """A few queries meet each gradient in registers, more of them meet it in L2."""
    from .accumulate import accumulate_
    from .grad import formed
    from .per_sample import per_sample

    lead = delta.shape[:-2]
    delta, act = prepared(delta, act)
    V = V.float()
    if len(V) <= FUSED_QUERIES:
        return per_sample(delta, act, unit(V))[0].reshape(*lead, len(V))
    out = V.new_zeros(len(delta), len(V))
    right = V.flatten(1).mT[None]
    for part, grads in formed(delta, act):
        accumulate_(out[None, part], grads.flatten(1).mT[None], right, 1.0, "tf32x3", False)
    return out.reshape(*lead, len(V))


def _refuse_factored(metas: tuple[TensorMeta, ...]) -> str | None:
    return _refuse_per_sample(metas[1:3]) or unfit(metas[:1], ROWS)


def _factored_config(metas: tuple[TensorMeta, ...], machine: Capability) -> Mapping[str, Any]:
    queries = metas[0].shape[-3] if len(metas[0].shape) > 2 else 1
    precision = "ieee" if queries == 1 else "tf32x3"
    config = choose("rows_dots", arch_for(machine.cuda), precision, min(queries, QUERIES))
    return shown(config, precision=precision)


@implements("sherman_morrison_factored", "triton", _refuse_factored, config=_factored_config)
def sherman_morrison_factored(V: Tensor, delta: Tensor, act: Tensor, lam: Tensor) -> Tensor:
    from .sherman_morrison import sherman_morrison_factored as run

    lead = V.shape[:-3]
    if not lead:
        return run(V.float().contiguous(), *prepared(delta, act), lam.float().reshape(1))
    out = V.new_empty(V.shape, dtype=torch.float32)
    for index in itertools.product(*map(range, lead)):
        out[index] = sherman_morrison_factored(V[index], delta[index], act[index], lam[index])
    return out

"""The compiled CPU kernels behind the ops: which tensors they take, and how they are called.

Autocast does not change them: the inputs' dtypes decide, and sums are fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import TensorMeta, implements

ROWS = (torch.float32, torch.bfloat16)


def _unsupported(metas: tuple[TensorMeta, ...], dtypes: tuple[torch.dtype, ...]) -> str | None:
    for meta in metas:
        if meta.dtype not in dtypes:
            return f"takes {_names(dtypes)}, not {_names((meta.dtype,))}"
        if meta.requires_grad:
            return "has no backward, and an input requires grad"
    return None


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " and ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _refuse_sherman_morrison(metas: tuple[TensorMeta, ...]) -> str | None:
    V, G, *_ = (*metas, metas[0])
    if G.shape[-1] > 1 and G.stride[-1] != 1:
        return "rows of G must have unit stride"
    return _unsupported((V, G), ROWS)


@implements("sherman_morrison", "cpu", _refuse_sherman_morrison)
def sherman_morrison(V: Tensor, G: Tensor, lam: Tensor) -> Tensor:
    batch = math.prod(V.shape[:-2])
    out = torch.ops.hyperinf.sherman_morrison(
        V.reshape(batch, *V.shape[-2:]).float().contiguous(),
        G.reshape(batch, *G.shape[-2:]),
        lam.reshape(batch).contiguous(),
    )
    return out.reshape(V.shape)

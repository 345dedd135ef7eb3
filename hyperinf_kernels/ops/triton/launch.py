"""What launchers share: the architecture a tensor is on, and how Triton runs here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from .configs import ARCHS, rows_of

HALVES = (torch.float16, torch.bfloat16)
# multiprocessors, by which work is cut: fixed per architecture, so that results do not depend on
# the model of the card
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
# of the smallest card of each architecture that has that many
L2_BYTES = {80: 40 << 20, 90: 50 << 20, 100: 126 << 20}
QUERIES = 16  # queries per launch of the tensor-core rows kernels
FUSED_QUERIES = 8  # queries that the fused per-sample kernel contracts a gradient with
WORD = 4  # bytes of fp32


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def arch_of(tensor: Tensor) -> int:
    """The architecture whose configurations serve this tensor; interpreted kernels take sm_80's."""
    if not tensor.is_cuda:
        return ARCHS[0]
    return rows_of(*torch.cuda.get_device_capability(tensor.device))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on the tensor's device, whichever device is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision_here(precision: str) -> str:
    """The interpreter cannot multiply bf16; it rounds operands to bf16 and multiplies in fp32."""
    return "bf16_widened" if precision == "bf16" and interpreting() else precision


def unit(tensor: Tensor) -> Tensor:
    """The tensor, copied if its columns are not side by side."""
    return tensor if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def products_of(dtypes: Sequence[torch.dtype]) -> str:
    """The cheapest arithmetic whose products of such numbers keep fp32's digits."""
    kinds = set(dtypes)
    if kinds == {torch.bfloat16}:
        return "bf16"
    # 10 explicit bits hold either half exactly
    return "tf32" if kinds and kinds <= set(HALVES) else "tf32x3"


def l2_share(arch: int) -> int:
    """Bytes that one launch may leave for the next to find in L2: a third of it."""
    return L2_BYTES[arch] // 3


def slice_samples(tokens: int, rows: int, columns: int, width: int, arch: int) -> int:
    """Samples whose gradients stay in L2 until they are read, one at least.

    Reading the factors (`width` bytes a number) must not drive the gradients out: together they
    take two thirds of L2.
    """
    factors = tokens * (rows + columns) * width
    return max(1, 2 * l2_share(arch) // max(1, WORD * rows * columns + factors))


def chunk_rows(columns: int, bytes_each: int, arch: int, block: int) -> int:
    """Rows per chunk: `l2_share`, in whole row blocks."""
    return max(block, l2_share(arch) // (columns * bytes_each) // block * block)


def uploaded(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what `make` sends to a device, since an upload makes the host wait for the device."""
    kept = functools.cache(make)

    @functools.wraps(make)
    def constant(*args: Hashable) -> Tensor:
        # what a mode makes of it, a tensor without data perhaps, belongs to the mode
        if torch._C._len_torch_dispatch_stack():
            return make(*args)
        with torch.inference_mode(False):
            return kept(*args)

    return constant

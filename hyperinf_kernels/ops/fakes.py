"""What each compiled op returns for tensors without data, so that torch.compile can trace it.

Import only after the extension: the schemas live there (csrc/ops.cpp).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("hyperinf::sherman_morrison")  # type: ignore[untyped-decorator]
def sherman_morrison(V: Tensor, G: Tensor, damping: Tensor) -> Tensor:
    return V.new_empty(V.shape)


@torch.library.register_fake("hyperinf::gram_accumulate_")  # type: ignore[untyped-decorator]
def gram_accumulate_(C: Tensor, X: Tensor, Y: Tensor | None, alpha: float) -> None:
    return None


@torch.library.register_fake("hyperinf::spd_inverse")  # type: ignore[untyped-decorator]
def spd_inverse(A: Tensor) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape), A.new_empty(A.shape[:1], dtype=torch.int32)

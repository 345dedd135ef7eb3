"""Gradients as the released code keeps them: a dictionary of tensors per sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import explain

Sample = Mapping[str, Tensor]

CHUNK = 64  # rows: a few MB, still in the processor's cache when their norms are taken


class Samples:
    """The gradients of one weight, a tensor per sample: read as they lie, or as one (n, r, d).

    Copying them side by side takes longer than any pass over them, so it waits until a method needs
    it. A vector counts as one row.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._grads = grads

    @property
    def device(self) -> torch.device:
        return self._grads[0].device

    def parts(self, V: Tensor) -> list[Tensor]:
        """The rows, as few or as many tensors (n_i, D) as are read fastest against V (m, D)."""
        if "whole" in self.__dict__ or explain("row_dots", V, self._rows[0]).backend != "cpu":
            return [self.whole.flatten(1)]
        return self._rows

    @cached_property
    def _rows(self) -> list[Tensor]:
        return [grad.reshape(1, -1) for grad in self._grads]

    @cached_property
    def whole(self) -> Tensor:
        """(n, r, d)."""
        return self._stacked[0]

    @cached_property
    def squares(self) -> Tensor:
        """||g_i||^2 (n,) in fp64."""
        return self._stacked[1]

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor]:
        first = self._grads[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        size = (len(self._grads), *first.shape)
        whole, norms = torch.empty(size, dtype=first.dtype, device=first.device), []
        for start in range(0, len(whole), CHUNK):
            part = whole[start : start + CHUNK]
            part.copy_(torch.stack(list(self._grads[start : start + CHUNK])))
            norm = torch.linalg.vector_norm(part.flatten(1), dim=1, dtype=wide)
            norms.append(norm.double().square())
        shaped = whole[:, None] if whole.ndim == 2 else whole.flatten(2)
        return shaped, torch.cat(norms)


def samples_of(
    samples: Mapping[int, Sample], what: str, device: torch.device | str | None
) -> dict[str, Samples]:
    """{sample: {weight: (r, d)}} -> {weight: its gradients of all samples, in order}.

    Raises:
        InputError: keys that are not 0 to n - 1, weights, shapes or dtypes that differ.
    """
    if not samples or set(samples) != set(range(len(samples))):
        raise InputError(f"{what} must hold samples 0 to n - 1, got {len(samples)} other keys")
    kinds = {name: (grad.shape, grad.dtype) for name, grad in samples[0].items()}
    for index, sample in samples.items():
        if {name: (grad.shape, grad.dtype) for name, grad in sample.items()} != kinds:
            raise InputError(
                f"{what}: sample {index} has other weights, shapes or dtypes than sample 0"
            )
    found = {}
    for name in kinds:
        grads = [samples[i][name].detach() for i in range(len(samples))]
        where = grads[0].device if device is None else device
        found[name] = Samples([grad.to(where) for grad in grads])
    return found

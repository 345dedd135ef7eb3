"""What HyperINF keeps of a block's gradients: sums, or the rows behind them while those are few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..ops import gfim_accumulate_
from ..ops.sketch import image_rows
from .directions import PROBES, normal

Side = Literal["cols", "rows", "both"]


class Gfim:
    """sum_i g_i^T g_i (cols), g_i g_i^T (rows) or both, in fp64, of gradients (B, r, d).

    With `rows="few"` the stacked rows Y (n r, d) are kept instead while n r < d, so that the
    n r x n r dual stays possible; the d x d sum takes their place once it is the smaller of the
    two. With "all" they are kept to the end, with "none" never. Sums of two objects add exactly as
    further batches would.

    With `fine` products are fp64. Otherwise those of short runs of rows are fp32, at twice the
    speed, and what that loses is known from `image`: sum_i Z g_i^T g_i (s, d) in fp64, for the few
    normal Z (s, d) of `probes`.
    """

    def __init__(
        self, r: int, d: int, side: Side, rows: Literal["few", "all", "none"], fine: bool = True
    ) -> None:
        self.r, self.d, self.side, self.fine = r, d, side, fine
        self.image: Tensor | None = None
        self.keep = rows if side == "cols" else "none"
        self._sums: dict[str, Tensor] = {}
        self._lent = (
            False  # whether a saved state has the same sums, so they must not grow in place
        )
        self._rows: list[Tensor] = []

    def add(self, batch: Tensor, copy: bool) -> None:
        """Take in (B, r, d), B > 0."""
        if self.keep != "none":
            rows = batch.reshape(-1, self.d)
            # a view of the caller's memory, unless the reshape or this clone copied
            shared = rows.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()
            self._rows.append(rows.clone() if copy and shared else rows)
            self._settle()
        else:
            for side in ("cols", "rows") if self.side == "both" else (self.side,):
                self._accumulate(side, batch)

    def probes(self) -> Tensor:
        """Z (s, d), the same for all objects of one d."""
        return normal(PROBES, self.d).to(self.device)

    def merge(self, other: Gfim) -> None:
        """Add another object's samples; it keeps its own."""
        if self.image is not None or other.image is not None:
            images = [gfim._image_of_sums() for gfim in (self, other) if gfim._sums]
            self.image = torch.stack([image.to(images[0].device) for image in images]).sum(0)
        self._rows += other._rows
        for side, total in other._sums.items():
            mine = self._sums.get(side)
            self._sums[side] = total.clone() if mine is None else mine + total.to(mine.device)
        self._settle()

    def rescaled(self, shift: int) -> Gfim:
        """The same gradients x 2^shift; it keeps its own."""
        other = Gfim(self.r, self.d, self.side, "none")
        other.keep = self.keep
        other._rows = [rows * 2.0**shift for rows in self._rows]
        other._sums = {side: total * 4.0**shift for side, total in self._sums.items()}
        other.fine = self.fine
        other.image = None if self.image is None else self.image * 4.0**shift
        return other

    def total(self, side: str) -> Tensor:
        """The fp64 sum over all samples; never to be written to."""
        if self._rows:
            # only ever the column side
            out = torch.zeros(self.d, self.d, dtype=torch.float64, device=self._rows[0].device)
            if side in self._sums:
                out += self._sums[side]
            return gfim_accumulate_(out, self.rows().unsqueeze(1))
        return self._sums[side]

    def rows(self) -> Tensor:
        """Y (n r, d) while it is kept."""
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0]

    @property
    def holds_rows(self) -> bool:
        """Whether all samples are there as rows."""
        return bool(self._rows) and not self._sums

    def would_hold(self, n: int) -> bool:
        """Whether n samples would be there as rows."""
        return self.keep == "all" or (self.keep == "few" and n * self.r < self.d)

    @property
    def device(self) -> torch.device:
        return next(iter([*self._sums.values(), *self._rows])).device

    def tensors(self) -> dict[str, Tensor]:
        """What a saved solver keeps, by a word each; what comes later does not change it."""
        self._lent = True
        image = {} if self.image is None else {"image": self.image}
        return {**self._sums, **image, **({"samples": self.rows()} if self._rows else {})}

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        self._sums = {w: t for w, t in tensors.items() if w not in ("samples", "image")}
        self.image = tensors.get("image")
        self.fine = self.image is None
        self._lent = True
        self._rows = [tensors["samples"]] if "samples" in tensors else []

    def _accumulate(self, side: str, batch: Tensor) -> None:
        if self._lent:
            self._sums = {word: total.clone() for word, total in self._sums.items()}
            self._lent = False
        if side not in self._sums:
            size = self.d if side == "cols" else self.r
            self._sums[side] = torch.zeros(size, size, dtype=torch.float64, device=batch.device)
        fine = self.fine or side == "rows" or batch.dtype == torch.float64
        if not fine or self.image is not None:
            rows = batch.reshape(-1, self.d)
            self.image = self._image_of_sums() + image_rows(self.probes(), rows)
        gfim_accumulate_(
            self._sums[side], batch, side="cols" if side == "cols" else "rows", fine=fine
        )

    def sum_again(self, batches: Sequence[Tensor]) -> None:
        """Exchange the sum for one in fp64 of the same samples (B, r, d)."""
        self._sums, self.image, self.fine, self._lent = {}, None, True, False
        for batch in batches:
            self._accumulate("cols", batch)

    def _image_of_sums(self) -> Tensor:
        return self.image if self.image is not None else self.probes() @ self._sums["cols"]

    def _settle(self) -> None:
        """Exchange rows for their sum once they are no longer the smaller of the two."""
        few = sum(map(len, self._rows)) < self.d and not self._sums
        if self._rows and not few and self.keep != "all":
            self._accumulate("cols", self.rows().unsqueeze(1))
            self._rows, self.keep = [], "none"

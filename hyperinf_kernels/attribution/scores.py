"""Influence scores: a matrix, who its rows and columns are, and how exact it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import row_dots, topk_empty, topk_merge_
from ..ops.checks import accumulation_dtype
from ..report.document import method_entry, run_document
from ..report.page import render_html
from ..solvers import BlockReport, summarise
from ..store.files import atomic

Id = int | str


class Ranked(NamedTuple):
    """The first k training examples of every query: `ids` as m lists of k, `values` (m, k)."""

    ids: list[list[Id]]
    values: Tensor


@dataclass
class InfluenceScores:
    """influence[q, k]: predicted change of query q's loss when training example k is up-weighted.

    Negative helps. Dense: `values` (m, n) and `ids` the n training ids. Kept as top-k: `values`
    (m, k) holds each query's k most helpful examples, most helpful first, `ids` m lists of k; the
    k most harmful ones are kept beside them for `opponents`.

    Attributes:
        values: fp32, fp64 for fp64 gradients.
        ids: training ids, as above. `query_ids`: the m query ids.
        report: one `BlockReport` per block.
        per_block: {block: (m, n)} if asked for; the blocks sum to `values`.
        meta: plain facts about the run (method, damping, seconds), written with the scores.
    """

    values: Tensor
    ids: list[Any]
    query_ids: list[Id]
    report: list[BlockReport]
    per_block: dict[str, Tensor] | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    harmful: Ranked | None = None

    @property
    def is_dense(self) -> bool:
        return self.harmful is None

    def proponents(self, k: int = 5) -> Ranked:
        """The k training examples that help each query most (most negative influence first)."""
        if self.is_dense:
            return self._rank(k, largest=False)
        self._check_kept(k)
        return Ranked([row[:k] for row in self.ids], self.values[:, :k])

    def opponents(self, k: int = 5) -> Ranked:
        """The k training examples that harm each query most (largest influence first)."""
        if self.harmful is None:
            return self._rank(k, largest=True)
        self._check_kept(k)
        return Ranked([row[:k] for row in self.harmful.ids], self.harmful.values[:, :k])

    def certificate(self) -> dict[str, object]:
        """Whether the scores are certified, their worst error and residual, and a sentence."""
        return summarise(self.report)

    def aligned(self, train_ids: Sequence[Id], query_ids: Sequence[Id]) -> InfluenceScores:
        """The same scores with rows in the order of `query_ids`, columns in that of `train_ids`.

        A top-k result has no columns to order.

        Raises:
            ValueError: an id is missing here.
        """
        rows = _places(self.query_ids, query_ids, "query")
        if self.harmful is not None:
            kept = Ranked([self.harmful.ids[i] for i in rows], self.harmful.values[rows])
            return replace(
                self, values=self.values[rows], ids=[self.ids[i] for i in rows],
                query_ids=list(query_ids), harmful=kept,
            )  # fmt: skip
        columns = _places(self.ids, train_ids, "train")
        split = self.per_block and {n: v[rows][:, columns] for n, v in self.per_block.items()}
        return replace(
            self, values=self.values[rows][:, columns], ids=list(train_ids),
            query_ids=list(query_ids), per_block=split,
        )  # fmt: skip

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write (query_id, train_id, influence[, one column per block]) as Parquet, atomically.

        A top-k result writes its most helpful and most harmful examples.
        """
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError:
            raise InputError(
                "writing Parquet needs pyarrow: pip install 'hyperinf_kernels[cli]'"
            ) from None

        if self.is_dense:
            train_ids = [self.ids] * len(self.query_ids)
            values = list(self.values)
        else:
            harmful = self.opponents(self.values.shape[1])
            train_ids, values = _union(self.ids, self.values, harmful)
        columns = {
            "query_id": [q for q, row in zip(self.query_ids, train_ids, strict=True) for _ in row],
            "train_id": [t for row in train_ids for t in row],
            "influence": torch.cat([row.flatten() for row in values]).numpy()
            if len(self.query_ids) else [],
        }  # fmt: skip
        for name, block in (self.per_block or {}).items():
            columns[name] = block.flatten().numpy()
        # opened here: arrow cannot open a name that the locale does not encode
        with atomic(Path(path)) as temporary, open(temporary, "wb") as file:
            pq.write_table(pa.table(columns), file, compression="zstd")

    def to_html(self, path: str | os.PathLike[str], **context: Any) -> None:
        """Write the self-contained HTML report; `context` adds keys of the report document."""
        page = render_html(run_document([method_entry(self)], **context))
        with atomic(Path(path)) as temporary:
            temporary.write_text(page, encoding="utf-8")

    def _rank(self, k: int, largest: bool) -> Ranked:
        k = min(k, self.values.shape[1])
        order = _stable_order(self.values, largest)[:, :k]
        ids = [[self.ids[j] for j in row] for row in order.tolist()]
        return Ranked(ids, self.values.gather(1, order))

    def _check_kept(self, k: int) -> None:
        if k > self.values.shape[1]:
            raise ValueError(f"only the top {self.values.shape[1]} were kept, asked for {k}")


def _places(held: Sequence[Id], wanted: Sequence[Id], role: str) -> list[int]:
    place = {identity: i for i, identity in enumerate(held)}
    if len(place) < len(held):
        raise ValueError(f"{role} ids are not unique, so they cannot be put in order")
    missing = [identity for identity in wanted if identity not in place]
    if missing:
        raise ValueError(f"no {role} row is called {missing[0]!r} ({len(missing)} ids missing)")
    return [place[identity] for identity in wanted]


def _stable_order(values: Tensor, largest: bool) -> Tensor:
    """Column order by value; ties by column, so the order does not depend on the machine."""
    return torch.sort(values, dim=1, descending=largest, stable=True).indices


def _union(
    ids: Sequence[Sequence[Id]], values: Tensor, other: Ranked
) -> tuple[list[list[Id]], list[Tensor]]:
    """Helpful then harmful entries of each query, none twice."""
    out_ids, out_values = [], []
    for row, value, more_ids, more in zip(ids, values, other.ids, other.values, strict=True):
        known = set(row)
        kept = [j for j, t in enumerate(more_ids) if t not in known]
        out_ids.append([*row, *(more_ids[j] for j in kept)])
        out_values.append(torch.cat([value, more[kept]]))
    return out_ids, out_values


class DensePanel:
    """Collects influence columns batch by batch into a dense (m, n) matrix."""

    def __init__(self, queries: int) -> None:
        self.parts: list[Tensor] = []
        self.ids: list[Id] = []
        self.queries = queries

    def add(self, ids: Sequence[Id], values: Tensor) -> None:
        self.ids.extend(ids)
        self.parts.append(values.cpu())

    def finish(self) -> dict[str, Any]:
        nothing = torch.zeros(self.queries, 0, dtype=torch.float32, device="cpu")
        values = torch.cat(self.parts, dim=1) if self.parts else nothing
        return {"values": values, "ids": self.ids}


class TopKPanel:
    """Keeps each query's k most helpful and k most harmful examples of a stream of any length.

    Exact and independent of the batching: ties go to the example that came first. The merging runs
    where the scores are.
    """

    def __init__(self, queries: int, k: int) -> None:
        if k < 1:
            raise ValueError(f"top_k must be at least 1, got {k}")
        self.k, self.queries = k, queries
        self.all_ids: list[Id] = []
        self.kept: dict[bool, tuple[Tensor, Tensor]] = {}

    def add(self, ids: Sequence[Id], values: Tensor) -> None:
        for largest in (False, True):
            if largest not in self.kept:
                self.kept[largest] = topk_empty(self.queries, self.k, values.dtype, values.device)
            topk_merge_(*self.kept[largest], values, len(self.all_ids), largest=largest)
        self.all_ids.extend(ids)

    def finish(self) -> dict[str, Any]:
        count = min(self.k, len(self.all_ids))
        empty = topk_empty(self.queries, self.k)
        ends = []
        for largest in (False, True):
            values, where = (t[:, :count].cpu() for t in self.kept.get(largest, empty))
            named = [[self.all_ids[j] for j in row] for row in where.tolist()]
            ends.append(Ranked(named, values))
        helpful, harmful = ends
        return {"values": helpful.values, "ids": helpful.ids, "harmful": harmful}


def block_scores(applied: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """-<W_q, g_k> per block: {block: (m, B)} from W (m, r, d) and gradients (B, r, d)."""
    scores = {}
    for name, W in applied.items():
        g = grads[name]
        dtype = accumulation_dtype(W, g)
        dots, _ = row_dots([g.flatten(1)], W.flatten(1))
        scores[name] = dots.mT.to(dtype, memory_format=torch.contiguous_format).neg_()
    return scores

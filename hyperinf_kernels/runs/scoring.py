"""The main job on rows of text: gradients once, then every method on them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..attribution import Attributor, InfluenceScores, influence
from ..attribution.stream import Progress, check_weights, default_budget, gradient_batches
from ..gradients import Loss, find_blocks, parameter_count
from .methods import Method


class Batches(Protocol):
    """Rows in batches, the same in every pass; `dataset` holds them one by one, in their order."""

    @property
    def dataset(self) -> Sequence[Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...


@dataclass
class Data:
    """Training and query batches of one model, and where the time went."""

    model: nn.Module
    train: Batches
    query: Batches
    loss: Loss
    blocks: str | Sequence[str] = "lora"
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def train_ids(self) -> list[str]:
        return [row.id for row in self.train.dataset]

    @property
    def query_ids(self) -> list[str]:
        return [row.id for row in self.query.dataset]


def size_of(data: Data) -> dict[str, int]:
    """How many blocks are attributed, and their numbers per example."""
    blocks = find_blocks(data.model, data.blocks)
    return {"blocks": len(blocks), "parameters": parameter_count(blocks)}


def score_methods(
    data: Data,
    methods: Sequence[Method],
    *,
    top_k: int | None = None,
    per_block: bool = False,
    progress: Progress | None = None,
) -> dict[str, InfluenceScores]:
    """Scores by method label, rows and columns in the order of the data.

    Gradients are computed once when both sets fit into memory together, else once per method.
    """
    rows = len(data.train.dataset) + len(data.query.dataset)
    size = rows * size_of(data)["parameters"] * 4
    if len(methods) == 1 or 2 * size > 4 * default_budget():
        scored = {m.label: _streamed(data, m, top_k, per_block, progress) for m in methods}
    else:
        check_weights(data.model)
        (train_ids, train), (query_ids, query) = gradients(data, progress)
        scored = {}
        for done, method in enumerate(methods, 1):
            scored[method.label] = influence(
                train, query, method.solver(), train_ids=train_ids, query_ids=query_ids,
                top_k=top_k, per_block=per_block,
            )  # fmt: skip
            if progress is not None:
                progress("methods", done, len(methods))
    return {label: s.aligned(data.train_ids, data.query_ids) for label, s in scored.items()}


def gradients(
    data: Data, progress: Progress | None = None
) -> tuple[tuple[list[Any], Mapping[str, Tensor]], tuple[list[Any], Mapping[str, Tensor]]]:
    """((train ids, gradients), (query ids, gradients)) as whole tensors."""
    train, query = (
        _collect(data, batches, stage, progress)
        for batches, stage in ((data.train, "train"), (data.query, "query"))
    )
    return train, query


def _collect(
    data: Data, batches: Batches, stage: str, progress: Progress | None
) -> tuple[list[Any], Mapping[str, Tensor]]:
    start = time.perf_counter()
    blocks = find_blocks(data.model, data.blocks)
    rows = len(batches.dataset)
    whole = {
        block.name: torch.empty(rows, *block.shape, dtype=torch.float32, device="cpu")
        for block in blocks
    }
    ids: list[Any] = []
    stream = gradient_batches(
        data.model, batches, data.loss, blocks, stage, progress, verify=stage == "train"
    )
    for more, grads in stream:
        for name, grad in grads.items():
            whole[name][len(ids) : len(ids) + len(more)] = grad
        ids.extend(more)
    data.seconds[f"{stage} gradients"] = time.perf_counter() - start
    return ids, whole


def _streamed(
    data: Data,
    method: Method,
    top_k: int | None,
    per_block: bool,
    progress: Progress | None,
) -> InfluenceScores:
    attributor = Attributor(
        data.model, loss=data.loss, blocks=data.blocks, method=method.solver(), progress=progress
    )
    scores = attributor.fit(data.train).score(
        data.query, data.train, top_k=top_k, per_block=per_block
    )
    for stage in ("train gradients", "query gradients"):
        data.seconds[stage] = attributor.seconds[stage]
    return scores


def mean_query(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The papers' single query: the mean gradient over all queries, {block: (1, r, d)}."""
    return {name: grad.mean(0, keepdim=True) for name, grad in grads.items()}


def with_loss(data: Data, loss: Loss) -> Data:
    """The same data under another loss, with its own timings."""
    return replace(data, loss=loss, seconds={})

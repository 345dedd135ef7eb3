"""Batches of a loader as per-sample gradients with the ids of their rows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from ..errors import BadRowError, InputError
from ..gradients import (
    Block,
    Loss,
    OneRow,
    batch_dots,
    batch_gradients,
    check_own_loss,
    prepared,
    verify_first_batch,
)
from ..gradients.blocks import block_parameters
from ..gradients.capture import Probes, TokenSink, move
from ..gradients.precision import precision_of
from ..gradients.rows import row_cutter
from ..solvers import GradientRows
from ..solvers.scorer import Scorer
from .scores import Id

Gradients = dict[str, Tensor]
GROUP_ROWS = 512  # rows solved together for self-influence


class Progress(Protocol):
    """Told after every batch: the stage, rows done in it, and rows in all when known."""

    def __call__(self, stage: str, done: int, total: int | None) -> None: ...


def gradient_batches(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    blocks: Sequence[Block],
    stage: str,
    progress: Progress | None = None,
    verify: bool = False,
    tokens: TokenSink | None = None,
    one_row: OneRow | None = None,
    skipped: list[Skipped] | None = None,
    facts: dict[str, Any] | None = None,
) -> Iterator[tuple[list[Id], Gradients]]:
    """(ids, {block: (B, r, d)}) for every batch of the loader.

    A row's id is its entry of the batch's "id" list, else its position in the stream. The loss of
    the first batch is compared with the model's own (see `check_own_loss`, which `one_row` is
    for); `verify` checks its gradients against autograd. `tokens` is told each batch's token
    factors before the batch is yielded. With a list
    `skipped`, bad rows (no label, a loss or gradient that is not finite) are written there and the
    rest of their batch is read row by row; with None they are an error. `facts` is told the
    precision of the first batch's gradients, where `verify` asks for it.

    Raises:
        InputError: the loader yields nothing, or what `batch_gradients` raises.
    """

    def read(batch: Any, first: bool) -> Gradients:
        grads = batch_gradients(model, batch, loss, blocks, tokens)
        if verify and first:
            here = move(batch, next(model.parameters()).device)
            verify_first_batch(model, here, loss, blocks, grads, one_row)
            if facts is not None:
                budget = default_budget()
                facts["gradients"] = precision_of(model, here, loss, blocks, grads, budget)
        return grads

    return _walk(model, loader, loss, stage, progress, read, one_row, skipped)


def score_batches(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    blocks: Sequence[Block],
    applied: Mapping[str, Tensor],
    progress: Progress | None = None,
    scorer: Scorer | None = None,
    one_row: OneRow | None = None,
    skipped: list[Skipped] | None = None,
) -> Iterator[tuple[list[Id], Gradients]]:
    """(ids, {block: (m, B)}) for every batch: -<W_q, g_k> without keeping any g_k.

    Args:
        applied: {block: (m, r, d)}, W of the queries.
        scorer: told of every batch what its certificate needs.

    Raises:
        InputError: as `gradient_batches`.
    """

    def read(batch: Any, first: bool) -> Gradients:
        probes = None if scorer is None else Probes(scorer.probes)
        scores = batch_dots(model, batch, loss, blocks, applied, probes)
        scores = {name: part.mT.neg() for name, part in scores.items()}
        if scorer is not None and probes is not None:
            for name, X in probes.drawn.items():
                scorer.add(name, scores[name], X, probes.images[name])
        return scores

    yield from _walk(model, loader, loss, "train", progress, read, one_row, skipped, of=1)


def _walk(
    model: nn.Module,
    loader: Iterable[Any],
    loss: Loss,
    stage: str,
    progress: Progress | None,
    read: Callable[[Any, bool], Gradients],
    one_row: OneRow | None,
    skipped: list[Skipped] | None,
    of: int = 0,
) -> Iterator[tuple[list[Id], Gradients]]:
    """(ids, read(batch, whether it is the first)) of every batch, the model prepared meanwhile.

    `of` is the dimension of what is read that counts rows.
    """
    total = _length(loader)
    device = next(model.parameters()).device
    done, first = 0, True

    def read_checked(batch: Any) -> Gradients:
        if first:
            check_own_loss(model, move(batch, device), loss, one_row=one_row)
        return read(batch, first)

    with prepared(model):
        for batch in loader:
            if done == 0:
                _warn_if_shuffled(loader, batch)
            try:
                found = read_checked(batch)
            except BadRowError as error:
                if skipped is None:
                    raise InputError(_where(batch, stage, done, error)) from error
                for alone in _rows(batch, row_cutter(model, one_row), error):
                    identity = _ids(alone, done, 1)
                    try:
                        found = read_checked(alone)
                    except BadRowError as bad:
                        skipped.append(Skipped(stage, done, identity[0], bad.what))
                    else:
                        yield identity, found
                        first = False
                    done += 1
            else:
                count = next(iter(found.values())).shape[of]
                yield _ids(batch, done, count), found
                first = False
                done += count
            if progress is not None:
                progress(stage, done, total)
    if first:
        raise InputError(
            f"the {stage} loader gave no rows (an empty data set, or an iterator used before?)"
        )


class Skipped(NamedTuple):
    """A row that was left out: train or query, its place in the stream, its id, what is wrong."""

    stage: str
    row: int
    id: Id
    what: str


def _rows(batch: Any, cut: Callable[[Any, int], Any | None], error: BadRowError) -> Iterator[Any]:
    """The rows of a batch one by one, so that a bad one can be left out."""
    named = batch if isinstance(batch, Mapping) else {}
    counted = next((named[key] for key in ("id", "labels", "input_ids") if key in named), None)
    if counted is None or cut(batch, 0) is None:
        raise InputError(
            f"{error}; it cannot be skipped, because how to cut a row out of its batch is not "
            "known: give one_row=, or leave the row out of the data"
        )
    for row in range(len(counted)):
        yield cut(batch, row)


def _where(batch: Any, stage: str, done: int, error: BadRowError) -> str:
    """What is wrong with a row, by its place in the stream and its id."""
    given = batch.get("id") if isinstance(batch, Mapping) else None
    name = "" if given is None else f" (id {_plain(given)[error.row]!r})"
    return f"{stage} row {done + error.row}{name} {error.what}"


def check_weights(model: nn.Module) -> None:
    """Raise InputError naming the first parameter that holds NaN or inf."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise InputError(f"parameter {name} of the model holds NaN or inf")


class GradientCache:
    """Training gradients kept between fit and score while they fit into a budget.

    Args:
        budget: bytes at most; once exceeded everything is dropped and nothing more is kept.
        dtype: to keep them in, fp32 or bf16.
    """

    def __init__(self, budget: int, dtype: torch.dtype | None) -> None:
        self.budget, self.dtype = budget, dtype
        self.rows: dict[str, GradientRows] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        self.bytes = 0
        self.full = budget <= 0

    def append(self, grads: Mapping[str, Tensor]) -> None:
        if self.full:
            return
        for name, grad in grads.items():
            kept = grad if self.dtype is None else grad.to(self.dtype)
            self.bytes += kept.numel() * kept.element_size()
            self.shapes[name] = (int(kept.shape[1]), int(kept.shape[2]))
            self.rows.setdefault(name, GradientRows(kept[0].numel())).append(kept.flatten(1))
        if self.bytes > self.budget:
            self.full = True
            self.rows.clear()

    def chunks(self) -> Iterator[tuple[slice, Gradients]]:
        """(row range, {block: (B, r, d)}) over everything kept."""
        yield from cached_chunks(self.rows, self.shapes)


def cached_chunks(
    rows: Mapping[str, GradientRows], shapes: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[slice, Gradients]]:
    """Walk the gradients of all blocks together, as they were given."""
    streams = {name: block.given() for name, block in rows.items()}
    for parts in zip(*streams.values(), strict=True):
        grads = {
            name: chunk.unflatten(1, shapes[name])
            for name, (_, chunk) in zip(streams, parts, strict=True)
        }
        yield parts[0][0], grads


def grouped(
    stream: Iterator[tuple[list[Id], Gradients]],
) -> Iterator[tuple[list[Id], Gradients]]:
    """Join small batches, because solving few rows costs as much as solving many."""
    ids: list[Id] = []
    pending: list[Gradients] = []
    for more, grads in stream:
        ids.extend(more)
        pending.append(grads)
        if len(ids) >= GROUP_ROWS:
            yield ids, _joined(pending)
            ids, pending = [], []
    if pending:
        yield ids, _joined(pending)


def _joined(parts: list[Gradients]) -> Gradients:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def default_budget() -> int:
    """A quarter of the memory that is free now, 2 GiB where the system does not tell."""
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 2**31
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 4)


def block_shapes(blocks: Sequence[Block]) -> dict[str, tuple[int, int]]:
    """{block: (r, d)}, after checking that each block's parameter is finite."""
    for name, parameter in block_parameters(blocks).items():
        if not bool(torch.isfinite(parameter).all()):
            raise InputError(f"block {name}: its parameter holds NaN or inf")
    return {block.name: block.shape for block in blocks}


def _length(loader: Iterable[Any]) -> int | None:
    dataset = getattr(loader, "dataset", None)
    measure: Callable[[Any], int] | None = len if hasattr(dataset, "__len__") else None
    return measure(dataset) if measure else None


def _ids(batch: Any, start: int, count: int) -> list[Id]:
    given = batch.get("id") if isinstance(batch, Mapping) else None
    if given is None:
        return list(range(start, start + count))
    ids = _plain(given)
    if len(ids) != count:
        raise InputError(f"a batch names {len(ids)} ids for {count} samples")
    return ids


def _plain(given: Any) -> list[Id]:
    """Plain numbers and strings, which JSON and Parquet can hold."""
    return given.tolist() if hasattr(given, "tolist") else list(given)


def _warn_if_shuffled(loader: Iterable[Any], batch: Any) -> None:
    named = isinstance(batch, Mapping) and "id" in batch
    if not named and _reorders(loader):
        warnings.warn(
            "the loader shuffles, or its sampler may, and its batches have no 'id', so row numbers "
            "mean the order of one pass only; turn shuffling off or give ids",
            stacklevel=3,
        )


def _reorders(loader: Any) -> bool:
    """Whether a loader's order is any other than its data set's."""
    batches, sampler = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    # an iterable data set has a sampler that only counts
    if sampler is None or type(sampler).__name__ == "_InfiniteConstantSampler":
        return False
    if batches is not None:
        sampler = batches.sampler if type(batches) is BatchSampler else batches
    return type(sampler) is not SequentialSampler

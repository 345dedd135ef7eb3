"""A model and its data in, influence scores out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..gradients import Loss, OneRow, find_blocks, make_loss
from ..gradients.adapters import left_out
from ..gradients.capture import TokenSink
from ..gradients.losses import described
from ..gradients.tokens import check_token_factors
from ..solvers import KFAC, BlockReport, Damping, FlatSolver, GradientRows, Solver, make_solver
from ..solvers.scorer import Scorer
from . import saved
from .fingerprints import check_fingerprints, fingerprints
from .influence import fitted_scores, sum_blocks
from .scores import DensePanel, Id, InfluenceScores, TopKPanel
from .stream import (
    GradientCache,
    Gradients,
    Progress,
    Skipped,
    block_shapes,
    cached_chunks,
    check_weights,
    default_budget,
    gradient_batches,
    grouped,
    score_batches,
)


class Attributor:
    """Influence of training examples on queries, for the chosen blocks of one model.

    `fit` reads the training set once (EK-FAC with `two_pass=True` twice); `score` reads the
    queries once, preconditions them, and reads the training set again only if its gradients did not
    fit into memory.

    Args:
        model: any module; given back unchanged after every call.
        loss: "causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification",
            "token_classification", or a callable `loss(model, batch) -> (B,)`. A built-in loss is
            compared with the model's own on the first batch of `fit` and of `score`.
        blocks: "lora", a regular expression, or a list of parameter names.
        method: "hyperinf", "datainf", "lissa", "cg", "exact", "kfac", "ekfac", "grad_dot", or a
            solver object.
        damping: a `Damping` or a number; None means `DataInfDamping(0.1)`.
        device: move the model there first. None: where it is.
        dtype: keep cached gradients in this dtype. None: as they come, fp32.
        cache_bytes: memory for training gradients between fit and score; None: a quarter of what
            is free. A method that needs all gradients (DataInf, LiSSA, exact) keeps them anyway.
        progress: called as `progress(stage, done, total)` after every batch.
        one_row: `one_row(batch, i)` gives row i of a batch alone, as the collate function would,
            for the checks of a first batch. None: text is cut by its columns' names, and the
            checks of other batches do without.
        on_bad_row: what happens to a row without a label, or whose loss or gradient is NaN or inf:
            "error", or "skip", which lists it in `skipped` and in the scores' meta and goes on.
        **method_options: of the solver, such as `mode="paper"`.

    Raises:
        InputError: unsupported blocks, NaN or inf in a parameter.
        ValueError: unknown method, option or loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str | Loss = "causal_lm",
        blocks: str | Sequence[str] = "lora",
        method: str | Solver = "hyperinf",
        damping: Damping | float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cache_bytes: int | None = None,
        progress: Progress | None = None,
        one_row: OneRow | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        **method_options: Any,
    ) -> None:
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")
        self.solver = make_solver(method, damping, **method_options)
        self.loss = make_loss(loss)
        self.loss_name = loss if isinstance(loss, str) else None
        self.model = model if device is None else model.to(device)
        self.blocks = find_blocks(model, blocks)
        if isinstance(self.solver, KFAC):
            check_token_factors(self.blocks)
        self.shapes = block_shapes(self.blocks)
        check_weights(model)
        self.dtype, self.cache_bytes, self.progress = dtype, cache_bytes, progress
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"on_bad_row must be error or skip, got {on_bad_row!r}")
        self.one_row = one_row
        self.skipped: list[Skipped] | None = [] if on_bad_row == "skip" else None
        missing = left_out(model, self.shapes) if blocks == "lora" else None
        self.facts: dict[str, Any] = {} if missing is None else {"left out": missing}
        self.train_ids: list[Id] = []
        self._fitted: Iterable[Any] | None = None
        self._cache: GradientCache | None = None
        self.seconds: dict[str, float] = {}

    def fit(self, train_loader: Iterable[Any]) -> Attributor:
        """Read the training set once and fit every block's curvature.

        Raises:
            InputError: no rows, NaN or inf (block and row named), a singular block.
        """
        start = time.perf_counter()
        self.solver.reset()
        self.train_ids = []
        keeps_rows = self.solver.kept is not None
        budget = default_budget() if self.cache_bytes is None else self.cache_bytes
        self._cache = GradientCache(0 if keeps_rows else budget, self.dtype)
        tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
        sink = tokens.update if isinstance(self.solver, KFAC) else None
        for ids, grads in self._gradients(train_loader, "train", verify=True, tokens=sink):
            if keeps_rows and self.dtype is not None:
                grads = {name: grad.to(self.dtype) for name, grad in grads.items()}
            if isinstance(self.solver, KFAC):
                self.solver.update(grads, copy=False, tokens=tokens)
            else:
                self.solver.update(grads, copy=False)
            self._cache.append(grads)
            self.train_ids.extend(ids)
        self._fitted = train_loader
        if self.solver.second_pass:
            for _, grads in self._training(train_loader):
                self.solver.revisit(grads)
        self.seconds["train gradients"] = time.perf_counter() - start
        start = time.perf_counter()
        self.solver.fit()
        self.seconds["fit"] = time.perf_counter() - start
        return self

    def score(
        self,
        query_loader: Iterable[Any],
        train_loader: Iterable[Any] | None = None,
        top_k: int | None = None,
        *,
        per_block: bool = False,
    ) -> InfluenceScores:
        """Influence of training examples on queries, values (m, n); negative helps.

        Args:
            query_loader: batches of queries.
            train_loader: the examples to score; None or the loader of `fit` scores the fitted
                training set. Another loader may hold any pool, of any size.
            top_k: keep only each query's k most helpful and k most harmful examples.
            per_block: keep the split of every score over the blocks (dense results only).

        Raises:
            InputError: not fitted, no rows, NaN or inf, or gradients that were not kept and no
                loader to read them again.
            ValueError: top_k together with per_block.
        """
        if per_block and top_k is not None:
            raise ValueError("per_block needs the dense matrix; leave top_k out")
        self._check_fitted()
        start = time.perf_counter()
        query_ids: list[Id] = []
        parts: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for ids, grads in self._gradients(query_loader, "query"):
            query_ids.extend(ids)
            for name, grad in grads.items():
                parts[name].append(grad)
        queries = {name: torch.cat(parts.pop(name)) for name in list(parts)}
        self.seconds["query gradients"] = time.perf_counter() - start
        count = len(query_ids)
        panel = DensePanel(count) if top_k is None else TopKPanel(count, top_k)
        split: dict[str, list[Tensor]] = {name: [] for name in self.shapes}
        for ids, scores in self._scored(queries, train_loader, per_block):
            panel.add(ids, sum_blocks(scores))
            if per_block:
                for name, part in scores.items():
                    split[name].append(part.cpu())
        return InfluenceScores(
            **panel.finish(),
            query_ids=query_ids,
            report=self.solver.report(),
            per_block={n: torch.cat(p, 1) for n, p in split.items()} if per_block else None,
            meta={
                "method": self.solver.method,
                "damping": str(self.solver.damping),
                "loss": str(self.loss),
                "seconds": dict(self.seconds),
                **self.facts,
                **({"skipped": [row._asdict() for row in self.skipped]} if self.skipped else {}),
            },
        )

    def self_influence(self, train_loader: Iterable[Any] | None = None) -> Tensor:
        """influence[k, k] = -<g_k A^-1, g_k> of every training example, (n,), never positive for
        an exact solve; the largest magnitudes are the examples the model had to memorise.

        Args:
            train_loader: as in `score`; ids are `train_ids` for the fitted training set.
        """
        self._check_fitted()
        if isinstance(self.solver, FlatSolver) and self._is_fitted_set(train_loader):
            return self.solver.own_influence().cpu()
        groups = grouped(self._training(train_loader))
        return torch.cat([self.solver.self_influence(grads).cpu() for _, grads in groups])

    def report(self) -> list[BlockReport]:
        """One entry per block, over everything applied since `fit`."""
        return self.solver.report()

    def save(self, folder: str | os.PathLike[str], *, tokenizer: Any = None) -> None:
        """Write the fitted solver as safetensors and JSON; the folder must not exist yet.

        Args:
            tokenizer: the one that made the rows, so that `load` can tell another.

        Raises:
            InputError: not fitted, or the folder exists.
        """
        self._check_fitted()
        tensors, meta = self.solver.state()
        document = {
            "method": self.solver.method,
            "options": self.solver.options(),
            "damping": vars(self.solver.damping),
            "loss": self.loss_name,
            "loss_text": described(self.loss),
            "blocks": {name: list(shape) for name, shape in self.shapes.items()},
            "train_ids": self.train_ids,
            "solver": meta,
            "fingerprints": fingerprints(self.model, self.shapes, tokenizer),
        }
        saved.write(Path(folder), document, tensors)

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        *,
        loss: str | Loss | None = None,
        progress: Progress | None = None,
        tokenizer: Any = None,
        insist: bool = False,
    ) -> Attributor:
        """A saved attributor for the same model.

        Args:
            loss: needed when the saved one was a callable.
            tokenizer: compared with the one given to `save`.
            insist: take another adapter, base model or tokenizer than the fitted ones.

        Raises:
            InputError: no saved attributor there, another format, blocks that do not fit, another
                loss than the saved one, or other weights or another tokenizer.
        """
        source = Path(folder)
        document, tensors = saved.read(source)
        loss = loss if loss is not None else document["loss"]
        if loss is None:
            raise InputError(f"{source} was saved with a callable loss; give it again as loss=")
        given, known = described(make_loss(loss)), document["loss_text"]
        if known is not None and given is not None and given != known:
            raise InputError(f"{source} was fitted with {known}, not with {given}")
        names = list(document["blocks"])
        damping = Damping(**document["damping"])
        options = document["options"]
        attributor = cls(
            model, loss=loss, blocks=names, method=document["method"], damping=damping,
            progress=progress, **options,
        )  # fmt: skip
        for name, shape in document["blocks"].items():
            if attributor.shapes[name] != tuple(shape):
                raise InputError(
                    f"block {name} is {attributor.shapes[name]} in this model, {tuple(shape)} in "
                    f"{source}"
                )
        if not insist:
            known = document.get("fingerprints", {})
            check_fingerprints(known, fingerprints(model, names, tokenizer), str(source))
        device = next(model.parameters()).device
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        attributor.solver.restore(tensors, document["solver"])
        attributor.solver.fit()
        attributor.train_ids = document["train_ids"]
        attributor._cache = GradientCache(0, None)
        return attributor

    def _gradients(
        self,
        loader: Iterable[Any],
        stage: str,
        verify: bool = False,
        tokens: TokenSink | None = None,
    ) -> Iterator[tuple[list[Id], Gradients]]:
        return gradient_batches(
            self.model,
            loader,
            self.loss,
            self.blocks,
            stage,
            self.progress,
            verify,
            tokens,
            self.one_row,
            self.skipped,
            self.facts,
        )

    def _scored(
        self, queries: Gradients, loader: Iterable[Any] | None, per_block: bool
    ) -> Iterator[tuple[list[Id], dict[str, Tensor]]]:
        """(training ids, scores per block), all at once where the solver holds the rows."""
        start = time.perf_counter()
        rows = self._kept_rows(loader)
        if rows is not None:
            batches = {
                name: [chunk.unflatten(1, self.shapes[name]) for _, chunk in block.given()]
                for name, block in ({} if isinstance(self.solver, FlatSolver) else rows).items()
            }
            scores = fitted_scores(self.solver, queries, batches, per_block)
            self.seconds["solve"] = time.perf_counter() - start
            self.seconds["score"] = 0.0
            yield self.train_ids, scores
            return
        scorer = Scorer(self.solver, queries)
        self.seconds["solve"] = time.perf_counter() - start
        start = time.perf_counter()
        # what is read again is scored as it is read
        yield from score_batches(
            self.model, self._readable(loader), self.loss, self.blocks, scorer.applied,
            self.progress, scorer, self.one_row, self.skipped,
        )  # fmt: skip
        scorer.certify()
        self.seconds["score"] = time.perf_counter() - start

    def _is_fitted_set(self, loader: Iterable[Any] | None) -> bool:
        return loader is None or loader is self._fitted

    def _kept_rows(self, loader: Iterable[Any] | None) -> Mapping[str, GradientRows] | None:
        """The rows to score, where they are in memory."""
        if not self._is_fitted_set(loader):
            return None
        kept = self.solver.kept or None
        if kept is None and self._cache is not None and not self._cache.full:
            kept = self._cache.rows
        return kept

    def _readable(self, loader: Iterable[Any] | None) -> Iterable[Any]:
        if loader is None:
            raise InputError(
                f"the gradients of the {len(self.train_ids)} training rows were not kept in "
                "memory; give train_loader again"
            )
        return loader

    def _training(self, loader: Iterable[Any] | None) -> Iterator[tuple[list[Id], Gradients]]:
        rows = self._kept_rows(loader)
        if rows is None:
            yield from self._gradients(self._readable(loader), "train")
            return
        for part, grads in cached_chunks(rows, self.shapes):
            yield self.train_ids[part], grads

    def _check_fitted(self) -> None:
        if not self.train_ids:
            raise InputError("the attributor is not fitted: call fit(train_loader) first")

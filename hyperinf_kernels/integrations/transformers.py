"""transformers and trl: attribute a fine-tuned model with its trainer's own collator and data.

scores = attribute(trainer, queries)            # after trainer.train()
trainer.add_callback(InfluenceCallback(trainer, queries, "scores.parquet"))   # or before it
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..attribution import Attributor, InfluenceScores
from ..errors import InputError
from ..gradients import Loss
from ..gradients.inputs import unwrapped
from ..solvers import Damping
from .imports import require

require("hf", "transformers")

from transformers import Trainer, TrainerCallback

__all__ = ["InfluenceCallback", "attribute", "attributor_of", "loader_of"]

LOSSES = {
    "ForSequenceClassification": "sequence_classification",
    "ForImageClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}


def attribute(
    trainer: Trainer, queries: Any, *, train: Any = None, top_k: int | None = None, **options: Any
) -> InfluenceScores:
    """Influence of training rows on `queries`, a data set of the same columns.

    Args:
        trainer: a `Trainer`, or trl's `SFTTrainer`, whose labels (completion only, assistant only)
            and truncation apply to all rows.
        train: rows to fit on and to score; None: `trainer.train_dataset`, in its own order.
        top_k: keep each query's k most helpful and harmful rows only.
        **options: of `attributor_of`.

    Raises:
        InputError: as `attributor_of` and `loader_of`.
    """
    loader = loader_of(trainer, train, "train")
    attributor = _attributor(trainer, **options).fit(loader)
    return attributor.score(loader_of(trainer, queries, "query"), loader, top_k)


def attributor_of(trainer: Trainer, *, train: Any = None, **options: Any) -> Attributor:
    """An `Attributor` of the trainer's model, fitted on its training rows.

    Args:
        train: as in `attribute`.
        loss: None: the model's own, by its class: "sequence_classification",
            "token_classification", "masked_lm", "seq2seq_lm", or "causal_lm", summed over
            the labels that the collator makes.
        blocks, method, damping, **options: of `Attributor`.

    Raises:
        InputError: the trainer minimised another loss than its model's (say which with `loss`),
            its parameters are sharded over processes, or blocks that are not supported.
        ValueError: unknown method, option or loss.
    """
    return _attributor(trainer, **options).fit(loader_of(trainer, train, "train"))


def _attributor(
    trainer: Trainer,
    *,
    loss: str | Loss | None = None,
    blocks: Any = "lora",
    method: str = "hyperinf",
    damping: Damping | float | None = None,
    **options: Any,
) -> Attributor:
    if getattr(trainer, "is_fsdp_enabled", False) or getattr(trainer, "is_deepspeed_enabled", 0):
        raise InputError(
            "the trainer's parameters may be sharded over processes (FSDP, DeepSpeed): load the "
            "saved adapter in one process and use Attributor"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    return Attributor(
        model, loss=_loss_of(trainer, model) if loss is None else loss, blocks=blocks,
        method=method, damping=damping, **options,
    )  # fmt: skip


def loader_of(trainer: Any, dataset: Any = None, what: str = "train") -> DataLoader[Any]:
    """Batches of a data set in its own order, every row once, by the trainer's collator.

    The trainer's own loaders may drop the last batch, group rows by length or hold one process's
    share. trl's padding-free batches are padded here, which changes no sample's loss.

    Args:
        dataset: raw or prepared; None: the trainer's training set.
        what: "train" or "query", for messages.

    Raises:
        InputError: rows that are packs of several documents, or that the trainer leaves out.
    """
    args = trainer.args
    rows = trainer.train_dataset if dataset is None else _prepared(trainer, dataset, what)
    if "seq_lengths" in _columns(rows) or (dataset is None and getattr(args, "packing", False)):
        raise InputError(
            f"the {what} rows are packs of several documents, which have no score of their own: "
            "give the documents, as in attribute(trainer, queries, train=documents)"
        )
    collate = trainer.data_collator
    if getattr(collate, "padding_free", False):
        collate = dataclasses.replace(collate, padding_free=False)
    if _columns(rows):
        rows = trainer._remove_unused_columns(rows, description="attribution")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="attribution")
    return DataLoader(rows, args.eval_batch_size, collate_fn=_a_row_each(collate))


class InfluenceCallback(TrainerCallback):  # type: ignore[misc]
    """Attribute `queries` when training ends; `callback.scores` holds the result.

    Args:
        trainer: the trainer that it is added to.
        queries: a data set of the training set's columns.
        output: a Parquet file to write, or None.
        **options: of `attribute`.
    """

    def __init__(
        self,
        trainer: Trainer,
        queries: Any,
        output: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        self.trainer, self.queries, self.output, self.options = trainer, queries, output, options
        self.scores: InfluenceScores | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        with torch.enable_grad():
            self.scores = attribute(self.trainer, self.queries, **self.options)
        if self.output is not None:
            self.scores.to_parquet(self.output)


def _loss_of(trainer: Trainer, model: Any) -> str:
    """The loss that the trainer minimised, where that is known."""
    args = trainer.args
    owner = next(c for c in type(trainer).__mro__ if "compute_loss" in vars(c))
    changed = {
        f"label_smoothing_factor={args.label_smoothing_factor}": args.label_smoothing_factor > 0,
        "a compute_loss_func": getattr(trainer, "compute_loss_func", None) is not None,
        f"loss_type={getattr(args, 'loss_type', 'nll')!r}": _is_sft(trainer)
        and "nll" not in getattr(args, "loss_type", "nll"),
        f"{owner.__name__}.compute_loss": owner is not Trainer and owner.__name__ != "SFTTrainer",
    }
    for name, found in changed.items():
        if found:
            raise InputError(
                f"the trainer minimised a loss of its own ({name}): give loss='causal_lm' to "
                "attribute plain cross-entropy, or a callable loss(model, batch) -> (B,)"
            )
    base: Any = unwrapped(model)
    kind = type(base).__name__
    for ending, loss in LOSSES.items():
        if kind.endswith(ending):
            return loss
    if kind.endswith("ForConditionalGeneration"):
        return "seq2seq_lm" if base.config.is_encoder_decoder else "causal_lm"
    raise InputError(
        f"the loss of a {kind} is not known: give loss='causal_lm', 'masked_lm', 'seq2seq_lm', "
        "'sequence_classification', 'token_classification', or a callable "
        "loss(model, batch) -> (B,)"
    )


def _prepared(trainer: Any, dataset: Any, what: str) -> Any:
    """Raw rows as trl's SFTTrainer prepares them, in order and unpacked; others as they are."""
    skipped = getattr(trainer, "_skip_prepare_dataset", False)
    if not _is_sft(trainer) or skipped or not _columns(dataset):
        return dataset
    args = copy.copy(trainer.args)
    args.shuffle_dataset = False
    rows = trainer._prepare_dataset(
        dataset, trainer.processing_class, args, False, trainer._formatting_func, what
    )
    if len(rows) != len(dataset):
        raise InputError(
            f"max_length={args.max_length} leaves {len(dataset) - len(rows)} of {len(dataset)} "
            f"{what} rows without a label, and the trainer drops them: leave them out"
        )
    return rows


def _is_sft(trainer: Trainer) -> bool:
    return any(c.__name__ == "SFTTrainer" for c in type(trainer).__mro__)


def _columns(dataset: Any) -> list[str]:
    """Column names of a `datasets.Dataset`; none of any other data set."""
    return list(getattr(dataset, "column_names", None) or ())


def _a_row_each(collate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def checked(samples: Any) -> Any:
        batch = collate(samples)
        made = len(next(iter(batch.values())))
        if made != len(samples):
            raise InputError(
                f"the collator made {made} rows of {len(samples)} samples; a score needs a row "
                "of its own: use a collator that pads instead of joining"
            )
        return batch

    return checked

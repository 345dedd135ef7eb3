"""transformers and trl: attribute a fine-tuned model with its trainer's own collator and data.

scores = attribute(trainer, queries)            # after trainer.train()
trainer.add_callback(InfluenceCallback(trainer, queries, "scores.parquet"))   # or before it
"""

from __future__ import annotations

import os
from typing import Any

import torch

from ..attribution import Attributor, InfluenceScores
from ..gradients import Loss
from ..solvers import Damping
from .imports import require

require("hf", "transformers")

from transformers import Trainer, TrainerCallback

__all__ = ["InfluenceCallback", "attribute", "attributor_of"]


def attributor_of(
    trainer: Trainer,
    *,
    loss: str | Loss | None = None,
    blocks: Any = "lora",
    method: str = "hyperinf",
    damping: Damping | float | None = None,
    **options: Any,
) -> Attributor:
    """An `Attributor` fitted on the trainer's training set, in the data set's order.

    Args:
        trainer: a `Trainer` or any of its children, such as trl's `SFTTrainer`.
        loss: None: by the model's class, "sequence_classification", "token_classification" or
            "causal_lm" over the labels that the collator makes.
        blocks, method, damping, **options: of `Attributor`.

    Raises:
        InputError: blocks that are not supported, NaN or inf.
        ValueError: unknown method, option or loss.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    attributor = Attributor(
        model, loss=loss if loss is not None else _loss_of(model), blocks=blocks, method=method,
        damping=damping, **options,
    )  # fmt: skip
    return attributor.fit(loader_of(trainer, trainer.train_dataset))


def attribute(
    trainer: Trainer, queries: Any, *, top_k: int | None = None, **options: Any
) -> InfluenceScores:
    """Influence of the trainer's training rows on `queries`, a data set of the same columns.

    Args:
        top_k: keep each query's k most helpful and harmful rows only.
        **options: of `attributor_of`.
    """
    attributor = attributor_of(trainer, **options)
    return attributor.score(
        loader_of(trainer, queries), loader_of(trainer, trainer.train_dataset), top_k
    )


def loader_of(trainer: Trainer, dataset: Any) -> Any:
    """The data set in order, by the trainer's collator and column rules."""
    return trainer.get_eval_dataloader(dataset)


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


def _loss_of(model: Any) -> str:
    base = getattr(model, "get_base_model", lambda: model)()
    name = type(base).__name__
    if name.endswith("ForSequenceClassification"):
        return "sequence_classification"
    if name.endswith("ForTokenClassification"):
        return "token_classification"
    return "causal_lm"

"""LoRA fine-tuning with the huggingface Trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .models import first_line, need_hf, query_value_modules
from .protocol import Example, Workload


@dataclass(frozen=True)
class LoraTraining:
    """Settings of a fine-tuning run.

    Raises:
        InputError: a number that cannot be trained with.
    """

    rank: int = 8
    alpha: int = 32
    targets: tuple[str, ...] = ()
    rslora: bool = False
    dropout: float = 0.0
    epochs: float = 5
    learning_rate: float = 1e-3
    batch_size: int = 16
    bf16: bool = False

    def __post_init__(self) -> None:
        for option, value in (
            ("--lora-rank", self.rank), ("--lora-alpha", self.alpha),
            ("--epochs", self.epochs), ("--learning-rate", self.learning_rate),
        ):  # fmt: skip
            if not 0 < value < float("inf"):
                raise InputError(f"{option} must be finite and above 0, got {value}")


def fine_tune(
    model: nn.Module,
    data: Sequence[Example],
    pad_token: int,
    workload: Workload,
    settings: LoraTraining,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Wrap `model` with a LoRA adapter and train it with the model's own loss.

    Args:
        progress: called as `progress(step, steps)` after every optimiser step.

    Returns:
        The `PeftModel`, in eval mode.

    Raises:
        InputError: a package is missing, or the model has no module called as in `targets`.
    """
    need_hf("transformers", "peft", "accelerate")
    import peft
    import transformers

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        task_type=workload.model.task,
        r=settings.rank,
        lora_alpha=settings.alpha,
        use_rslora=settings.rslora,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or query_value_modules(model),
    )

    class Report(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress is not None:
                progress(state.global_step, state.max_steps)

    def collate(rows: list[Example]) -> dict[str, Any]:
        batch = workload.collate(rows, pad_token)
        del batch["id"]
        return batch

    # the Trainer makes its output folder even when it is told to save nothing
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tuned = peft.get_peft_model(model, config)
            arguments = transformers.TrainingArguments(
                output_dir=scratch,
                num_train_epochs=settings.epochs,
                learning_rate=settings.learning_rate,
                per_device_train_batch_size=settings.batch_size,
                lr_scheduler_type="linear",
                bf16=settings.bf16,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                use_cpu=next(model.parameters()).device.type == "cpu",
                seed=seed,
                data_seed=seed,
            )
        except ValueError as error:
            raise InputError(f"cannot tune this model: {first_line(error)}") from error
        trainer = transformers.Trainer(
            model=tuned,
            args=arguments,
            train_dataset=list(data),
            data_collator=collate,
            callbacks=[Report()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return tuned.eval()

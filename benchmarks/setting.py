"""The model and rows that the benchmarks of the whole job share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyperinf_kernels.experiments import sentences
from hyperinf_kernels.workloads import models
from hyperinf_kernels.workloads.batches import Batches
from hyperinf_kernels.workloads.prompted import Prompted
from hyperinf_kernels.workloads.protocol import Loaded
from hyperinf_kernels.workloads.reading import read_rows
from hyperinf_kernels.workloads.rows import Row


def lora_model() -> Loaded:
    """SmolLM2-135M with LoRA r=8 on query and value, B away from zero as after training."""
    import peft

    model, tokenizer = models.load("smollm2", Prompted())
    targets = models.query_value_modules(model)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=32, target_modules=targets)
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return Loaded(tuned, tokenizer)


def sentence_rows(train: int, query: int) -> tuple[str, list[Row], list[Row]]:
    """The sentence set of the papers where it is at hand, generated sentences elsewhere."""
    data = Path(os.environ.get("HYPERINF_DATA", "data"))
    files = [data / f"sentence_transformations.{part}.jsonl" for part in ("train", "test")]
    if all(file.exists() for file in files):
        rows, queries = (read_rows(file).rows for file in files)
        # every k-th row keeps the classes balanced
        return (
            "sentence_transformations",
            rows[:: max(1, len(rows) // train)][:train],
            queries[:: max(1, len(queries) // query)][:query],
        )
    return "generated sentences", *sentences.generate(train, query, seed=0)


def batches(rows: list[Row], loaded: Loaded, size: int) -> Batches:
    """Padded batches of rows of similar length."""
    kind, pad_token = Prompted(), loaded.tokenizer.pad_token_id
    examples = kind.encode(rows, loaded.tokenizer, model=loaded.model)
    return Batches(examples, lambda chosen: kind.collate(chosen, pad_token), size)


def singles(data: Batches) -> Iterator[dict[str, Any]]:
    """The same rows one at a time, without padding, in the order of the data set."""
    for row in data.dataset:
        yield data.collate([row])


def tokens(data: Batches) -> int:
    """Tokens without padding."""
    return sum(len(row.columns["input_ids"]) for row in data.dataset)

"""From a model and a batch to per-sample gradients of the chosen blocks."""

from .blocks import Block, find_blocks, parameter_count
from .capture import batch_dots, batch_gradients, per_sample_gradients, prepared
from .losses import (
    CausalLM,
    Loss,
    MaskedLM,
    Seq2SeqLM,
    SequenceClassification,
    TokenClassification,
    make_loss,
)
from .own_loss import check_own_loss
from .rows import OneRow
from .verify import verify_first_batch

__all__ = [
    "Block",
    "CausalLM",
    "Loss",
    "MaskedLM",
    "OneRow",
    "Seq2SeqLM",
    "SequenceClassification",
    "TokenClassification",
    "batch_dots",
    "batch_gradients",
    "check_own_loss",
    "find_blocks",
    "make_loss",
    "parameter_count",
    "per_sample_gradients",
    "prepared",
    "verify_first_batch",
]

"""What of a batch a model takes: its columns, seen through wrappers, and its position ids."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError

# of a row, never inputs of a model
SIDE_KEYS = ("labels", "id", "ids")
# (B, T), whichever model: what a text model may take through **kwargs
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside peft and inside wrappers that only hand their arguments on."""
    if hasattr(model, "get_base_model"):
        return unwrapped(cast(Any, model).get_base_model())
    children = list(model.children())
    kinds = {p.kind for p in inspect.signature(model.forward).parameters.values()}
    handed_on = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    if len(children) == 1 and kinds and kinds <= handed_on:
        return unwrapped(children[0])
    return model


def local(model: nn.Module) -> nn.Module:
    """The module that a data-parallel wrapper replicates; replicas would run without our hooks."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return local(model.module) if isinstance(model, wrappers) else model


def accepted(model: nn.Module) -> set[str] | None:
    """Names that the model's forward takes; None where it takes any name."""
    inner = unwrapped(model)
    parameters = inspect.signature(inner.forward).parameters
    names = {n for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(names) == len(parameters):
        return names
    if hasattr(inner, "config"):
        # transformers hands these names on; the rest of **kwargs is for its attention functions
        return names | set(TEXT_KEYS)
    children = list(inner.children())
    below = accepted(children[0]) if len(children) == 1 else None
    return None if below is None else names | below


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model's forward takes, without labels and ids.

    Rows padded on the left get position ids that start at their first token, unless the model
    makes its own.
    """
    known = accepted(model)
    columns = {key: value for key, value in batch.items() if key not in SIDE_KEYS}
    inputs = {key: value for key, value in columns.items() if known is None or key in known}
    lost = [k for k, v in columns.items() if k not in inputs and isinstance(v, Tensor)]
    if lost:
        warnings.warn(
            f"{type(unwrapped(model)).__name__} takes no {', '.join(lost)}: left out of its inputs",
            stacklevel=4,
        )
    if known is None:
        return inputs
    if "use_cache" in known:
        inputs["use_cache"] = False
    mask: Any = batch.get("attention_mask")
    left_padded = isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
    asked = left_padded and "position_ids" in known and "position_ids" not in inputs
    if asked and not _makes_positions(unwrapped(model)):
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs


def _makes_positions(model: nn.Module) -> bool:
    """Whether positions come from the tokens: in three dimensions, or from where padding is."""
    for name, module in model.named_modules():
        if hasattr(module, "get_rope_index"):
            return True
        # RoBERTa and its kin count from behind the padding's own position
        counted = getattr(module, "padding_idx", None) is not None
        if name.endswith("position_embeddings") and counted:
            return True
    return False


def tensor_column(batch: Mapping[str, Any], key: str, loss: object) -> Tensor:
    """A column of a batch.

    Raises:
        InputError: it is missing, or not a tensor.
    """
    if key not in batch:
        raise InputError(f"the loss ({loss}) needs {key!r} in every batch, got {sorted(batch)}")
    value = batch[key]
    if not isinstance(value, torch.Tensor):
        raise InputError(
            f"{key!r} of the batch is a {type(value).__name__}, not a tensor: collate rows first "
            "(torch.tensor, or the collate function of a DataLoader)"
        )
    return value

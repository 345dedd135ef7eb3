"""Which weights and which tokenizer a curvature was fitted with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

SAMPLED = 4096  # entries of a base weight; another checkpoint differs in far more
WORDS = {"adapter": "attributed weights", "base": "base weights", "tokenizer": "tokenizer"}


def fingerprints(
    model: nn.Module, blocks: Collection[str], tokenizer: Any = None
) -> dict[str, str]:
    """Hashes of the attributed weights (whole), of all others (sampled) and of the tokenizer."""
    adapter, base = hashlib.sha256(), hashlib.sha256()
    for name, parameter in model.named_parameters():
        # a wrapper's prefix or another dtype's name changes no weight
        values = parameter.detach().flatten()
        if name in blocks:
            adapter.update(_bytes(values))
        else:
            step = max(1, len(values) // SAMPLED)
            base.update(str(tuple(parameter.shape)).encode() + _bytes(values[::step]))
    found = {"adapter": adapter.hexdigest(), "base": base.hexdigest()}
    if tokenizer is not None:
        found["tokenizer"] = hashlib.sha256(_described(tokenizer).encode()).hexdigest()
    return found


def _bytes(values: Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _described(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    template = getattr(tokenizer, "chat_template", None)
    special = {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()}
    return json.dumps([words, template, special], sort_keys=True)


def check_fingerprints(known: Mapping[str, str], given: Mapping[str, str], source: str) -> None:
    """Raise InputError naming what differs from what was fitted."""
    other = [WORDS[part] for part in known if part in given and known[part] != given[part]]
    if other:
        raise InputError(
            f"{source} was fitted with other {' and other '.join(other)} than these, so its "
            "curvature is not theirs: load what it was fitted with, or insist=True"
        )

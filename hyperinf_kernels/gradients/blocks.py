"""Which parameters are attributed: from "lora", a regular expression or names to blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from .adapters import is_lora, lora_parameters, read_one_by_one, refuse_unknown
from .inputs import unwrapped
from .layers import ONE_BY_ONE, Layer, features_of, layer_of


@dataclass(frozen=True)
class Block:
    """One attributed parameter: gradients of shape (B, *shape), see `layers`."""

    name: str
    module: nn.Module
    layer: Layer
    is_bias: bool
    transpose: bool
    shape: tuple[int, int]

    @property
    def features(self) -> int:
        return features_of(self.module, self.layer)

    def layout(self, gradient: Tensor) -> Tensor:
        """A gradient in the parameter's own shape as this block's (r, d)."""
        if gradient.ndim == 1:
            return gradient.reshape(1, -1)
        flat = gradient.flatten(1)
        return flat.mT if self.transpose != (self.layer.kind == "conv1d") else flat


def find_blocks(model: nn.Module, blocks: str | Sequence[str] = "lora") -> list[Block]:
    """The blocks of a model, in the order of its parameters.

    Args:
        blocks: "lora" for all LoRA matrices of the active peft adapter and the weight matrices of
            its `modules_to_save`; another string is a regular expression searched in parameter
            names; a list holds exact parameter names.

    Raises:
        InputError: nothing matches, a name is unknown, or a match is not supported (LoRA variants
            beyond DoRA and AdaLoRA, merged, disabled or several active adapters, tied parameters,
            layers that are not known, packed, sharded, offloaded or scattered weights).
    """
    names = [name for name, _ in model.named_parameters()]
    if blocks == "lora":
        wanted = set(lora_parameters(model))
    elif isinstance(blocks, str):
        try:
            pattern = re.compile(blocks)
        except re.error as error:
            raise InputError(f"blocks={blocks!r} is not a regular expression: {error}") from None
        wanted = {name for name in names if pattern.search(name)}
        if not wanted:
            raise InputError(
                f"blocks={blocks!r} matches none of {len(names)} parameters, such as {names[:2]}"
            )
    else:
        wanted = set(blocks)
        for name in blocks:
            if name not in names:
                close = difflib.get_close_matches(name, names, 2, 0.3)
                raise InputError(f"the model has no parameter {name!r}; similar: {close}")
        if not wanted:
            raise InputError("blocks is empty: name at least one parameter")
    check_whole(model)
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for module_name, module in modules.items():
        for short, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{short}".lstrip("."))
    text = _language_model(model)
    return [_block(name, modules, owners, text) for name in names if name in wanted]


def check_whole(model: nn.Module) -> None:
    """Raise InputError for weights that are not all here: offloaded, scattered or sharded."""
    places: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        places.setdefault(str(parameter.device), name)
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise InputError(
                f"parameter {name} is sharded over processes (FSDP, tensor parallelism): load the "
                "saved adapter in one process"
            )
    if "meta" in places:
        raise InputError(
            f"parameter {places['meta']} is on the meta device (offloaded by accelerate's "
            "device_map, or never loaded): load the whole model on one device"
        )
    if len(places) > 1:
        found = ", ".join(f"{name} on {place}" for place, name in list(places.items())[:3])
        raise InputError(
            f"the model lies on several devices ({found}), which is not supported: load it on one "
            "(no device_map), in bf16 or quantised if it does not fit"
        )


def _language_model(model: nn.Module) -> frozenset[nn.Module] | None:
    """Modules that see a row of text per sample, in a model of text and images; else None.

    What lies outside them sees images or patches, however many of them a sample has.
    """
    inner: Any = unwrapped(model)
    config = getattr(inner, "config", None)
    if not (hasattr(config, "text_config") and hasattr(inner, "get_decoder")):
        return None
    if not (hasattr(config, "vision_config") or hasattr(config, "audio_config")):
        return None
    decoder = inner.get_decoder()
    head = getattr(inner, "get_output_embeddings", lambda: None)()
    inside = list(decoder.modules()) + ([] if head is None else list(head.modules()))
    return None if decoder is inner else frozenset(inside)


def _block(
    name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]],
    text: frozenset[nn.Module] | None,
) -> Block:  # fmt: skip
    module_name, _, short = name.rpartition(".")
    module = modules[module_name]
    parameter = getattr(module, short)
    layer = layer_of(module)
    path = module_name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        above = modules[".".join(path[:depth])]
        if is_lora(above):
            adapter = path[depth + 1] if depth + 1 < len(path) else short
            refuse_unknown(".".join(path[:depth]), above, adapter)
            if path[depth].startswith("lora_") and read_one_by_one(above, adapter):
                layer = ONE_BY_ONE
            break
    if text is not None and module not in text:
        layer = ONE_BY_ONE
    if layer is None or (layer.hooked and short not in ("weight", "bias")):
        raise InputError(
            f"block {name}: gradients of {type(module).__name__}.{short} are not supported; "
            "supported are Linear, Conv1D (transformers), Conv2d, Embedding and norm layers"
        )
    refusal = layer.refuse(module)
    if refusal:
        raise InputError(f"block {name}: {refusal} is not supported")
    if not parameter.is_floating_point():
        raise InputError(
            f"block {name}: its weight is packed as {parameter.dtype} (quantised), so it has no "
            "gradient; attribute its LoRA matrices instead"
        )
    if len(owners[id(parameter)]) > 1:
        raise InputError(
            f"block {name}: the parameter is tied ({', '.join(owners[id(parameter)])})"
        )
    if parameter.ndim == 1:
        return Block(name, module, layer, short == "bias", False, (1, int(parameter.numel())))
    dotted = f".{name}."
    transpose = ".lora_B." in dotted or ".lora_embedding_B." in dotted
    if layer.hooked:
        shape = layer.shape(module)
    else:
        shape = (int(parameter.shape[0]), int(parameter[0].numel()))
    return Block(name, module, layer, False, transpose, shape[::-1] if transpose else shape)


def parameter_count(blocks: Sequence[Block]) -> int:
    """Numbers in one sample's gradients over all blocks."""
    return sum(r * d for r, d in (block.shape for block in blocks))


def block_parameters(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The parameters themselves, by block name."""
    return {b.name: getattr(b.module, b.name.rpartition(".")[2]) for b in blocks}

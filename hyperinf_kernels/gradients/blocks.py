"""Which parameters are attributed: from "lora", a regular expression or names to blocks."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import InputError
from .layers import Layer, features_of, layer_of


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
        InputError: nothing matches, a name is unknown, or a match is not supported (DoRA and other
            LoRA variants, merged, disabled or several active adapters, tied parameters, layers that
            are not known, packed weights).
    """
    names = [name for name, _ in model.named_parameters()]
    if blocks == "lora":
        wanted = set(_lora_parameters(model))
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
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for module_name, module in modules.items():
        for short, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{short}".lstrip("."))
    return [_block(name, modules, owners) for name in names if name in wanted]


def _block(name: str, modules: dict[str, nn.Module], owners: dict[int, list[str]]) -> Block:
    module_name, _, short = name.rpartition(".")
    module = modules[module_name]
    parameter = getattr(module, short)
    layer = layer_of(module)
    if layer is None or short not in ("weight", "bias"):
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
    if short == "bias":
        return Block(name, module, layer, True, False, (1, int(parameter.numel())))
    transpose = ".lora_B." in f".{name}"
    shape = layer.shape(module)
    return Block(name, module, layer, False, transpose, shape[::-1] if transpose else shape)


def _lora_parameters(model: nn.Module) -> Iterator[str]:
    """Names of the active adapter's matrices; peft's layers are known by their attributes."""
    found = False
    for name, module in model.named_modules():
        is_lora = hasattr(module, "lora_A") and hasattr(module, "lora_B")
        is_saved = hasattr(module, "modules_to_save") and hasattr(module, "original_module")
        if not (is_lora or is_saved):
            continue
        if type(module).__name__ in ("ParamWrapper", "MultiheadAttention"):
            raise InputError(
                f"{name}: LoRA on {type(module).__name__} is not supported, because it changes a "
                "weight without running a layer of its own"
            )
        adapter = _active_adapter(name, module)
        if is_saved:
            saved = module.modules_to_save
            if adapter in saved:
                for short, parameter in saved[adapter].named_parameters():
                    if parameter.ndim > 1:
                        yield f"{name}.modules_to_save.{adapter}.{short}"
            continue
        if adapter in getattr(module, "lora_embedding_A", {}):
            raise InputError(
                f"{name}: LoRA on an Embedding is not supported; choose blocks by a regular "
                "expression that leaves it out"
            )
        if adapter not in module.lora_A:
            continue
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or getattr(module, "use_dora", {}).get(adapter):
            kind = type(variant).__name__ if variant is not None else "DoRA"
            raise InputError(
                f"{name}: the LoRA variant {kind} is not supported, only plain LoRA and rsLoRA"
            )
        found = True
        yield f"{name}.lora_A.{adapter}.weight"
        yield f"{name}.lora_B.{adapter}.weight"
    if not found:
        raise InputError(
            "the model has no LoRA layer, but blocks='lora': give an adapter, or choose the "
            "parameters to attribute by a regular expression or a list of names"
        )


def _active_adapter(name: str, module: nn.Module) -> str:
    if getattr(module, "merged_adapters", None):
        raise InputError(f"{name}: the adapter is merged into the base weights; unmerge it first")
    if getattr(module, "disable_adapters", False) is True:
        raise InputError(f"{name}: its adapters are disabled; enable them first")
    active = list(getattr(module, "active_adapters", []))
    if len(active) != 1:
        raise InputError(
            f"{name}: {len(active)} adapters are active ({', '.join(active) or 'none'}); activate "
            "one, or choose blocks by a regular expression such as 'lora_[AB]\\.NAME\\.'"
        )
    return str(active[0])


def parameter_count(blocks: Sequence[Block]) -> int:
    """Numbers in one sample's gradients over all blocks."""
    return sum(r * d for r, d in (block.shape for block in blocks))


def block_parameters(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """The parameters themselves, by block name."""
    return {b.name: getattr(b.module, b.name.rpartition(".")[2]) for b in blocks}

"""What peft trained: the matrices of the active adapter, how they are read, what is left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from ..errors import InputError

# read by one backward pass per sample, because their layers do not show a sample's gradient
ONE_BY_ONE_VARIANTS = ("DoraLinearVariant",)


def lora_parameters(model: nn.Module) -> list[str]:
    """Names of the active adapter's matrices; peft's layers are known by their attributes.

    Where some of them require grad, those that do not (LoRA-FA) were not trained.
    """
    names = list(_matrices(model))
    trained = [n for n in names if model.get_parameter(n).requires_grad]
    return trained or names


def _matrices(model: nn.Module) -> Iterator[str]:
    found = False
    for name, module in model.named_modules():
        is_saved = hasattr(module, "modules_to_save") and hasattr(module, "original_module")
        if not (is_lora(module) or is_saved):
            continue
        adapter = _active_adapter(name, module)
        if is_saved:
            saved: Any = module.modules_to_save
            if adapter in saved:
                for short, parameter in saved[adapter].named_parameters():
                    if parameter.ndim > 1:
                        yield f"{name}.modules_to_save.{adapter}.{short}"
            continue
        refuse_unknown(name, module, adapter)
        for held in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            if adapter not in getattr(module, held, {}):
                continue
            found = True
            matrix = getattr(module, held)[adapter]
            suffix = ".weight" if isinstance(matrix, nn.Module) else ""
            yield f"{name}.{held}.{adapter}{suffix}"
    if not found:
        raise InputError(
            f"the model has no LoRA layer{_other_adapter(model)}, but blocks='lora': give an "
            "adapter, or choose the parameters to attribute by a regular expression or a list of "
            "names"
        )


def is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "lora_B")


def refuse_unknown(name: str, module: nn.Module, adapter: str) -> None:
    """Raise InputError naming a kind of LoRA whose gradient would not be right."""
    if type(module).__name__ == "MultiheadAttention":
        raise InputError(
            f"{name}: LoRA on MultiheadAttention is not supported, because it changes a weight "
            "without running a layer of its own"
        )
    variant = _variant(module, adapter)
    if variant not in (None, *ONE_BY_ONE_VARIANTS):
        raise InputError(
            f"{name}: the LoRA variant {variant} is not supported, only plain LoRA, rsLoRA, DoRA "
            "and AdaLoRA"
        )


def read_one_by_one(module: nn.Module, adapter: str) -> bool:
    """Whether a LoRA layer's matrices are used otherwise than as layers of their own."""
    experts = type(module).__name__ == "ParamWrapper"
    plain = isinstance(getattr(module, "lora_A", None), nn.ModuleDict)
    embedding = adapter in getattr(module, "lora_embedding_A", {})
    return experts or not plain or embedding or _variant(module, adapter) is not None


def _variant(module: nn.Module, adapter: str) -> str | None:
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None:
        return type(variant).__name__
    return "DoRA" if getattr(module, "use_dora", {}).get(adapter) else None


def _active_adapter(name: str, module: nn.Module) -> str:
    if getattr(module, "merged_adapters", None):
        raise InputError(f"{name}: the adapter is merged into the base weights; unmerge it first")
    if getattr(module, "disable_adapters", False) is True:
        raise InputError(f"{name}: its adapters are disabled; enable them first")
    active: Any = getattr(module, "active_adapters", [])
    if len(active) != 1:
        raise InputError(
            f"{name}: {len(active)} adapters are active ({', '.join(active) or 'none'}); activate "
            "one, or choose blocks by a regular expression such as 'lora_[AB]\\.NAME\\.'"
        )
    return str(active[0])


def _other_adapter(model: nn.Module) -> str:
    kinds = {
        str(getattr(config.peft_type, "value", config.peft_type))
        for config in _configs(model).values()
    }
    return f" (its adapter is {', '.join(sorted(kinds))})" if kinds else ""


def _configs(model: nn.Module) -> dict[str, Any]:
    return dict(getattr(model, "peft_config", None) or {})


def left_out(model: nn.Module, chosen: Collection[str]) -> dict[str, Any] | None:
    """What was trained but is not attributed, and its share of the trained parameters.

    Trained is what requires grad and, for an adapter loaded for inference, what peft saves of it.

    Returns:
        {"parameters", "share", "names"} or None for nothing.
    """
    biases = {str(getattr(config, "bias", "none")) for config in _configs(model).values()}
    trained: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        saved = any(p.startswith(("lora_", "trainable_tokens_delta")) for p in parts)
        of_layer = parts[-1] == "bias" and "base_layer" in parts
        by_bias = ("all" in biases and parts[-1] == "bias") or ("lora_only" in biases and of_layer)
        if parameter.requires_grad or saved or "modules_to_save" in parts or by_bias:
            trained[name] = parameter.numel()
    missing = [name for name in trained if name not in chosen]
    if not missing:
        return None
    numbers = sum(trained[name] for name in missing)
    return {
        "parameters": numbers,
        "share": numbers / sum(trained.values()),
        "names": missing[:5] + ([f"and {len(missing) - 5} more"] if len(missing) > 5 else []),
    }

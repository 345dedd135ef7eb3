"""The commands of `hyperinf`: which options each takes, and its own defaults for them."""

from __future__ import annotations

import json
from typing import Any

import typer

from ..jobs.request import OPTIONS
from .bench import bench
from .command import Json, job_command
from .converge import converge
from .replay import replay

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training examples made a LoRA-tuned model behave as it does.",
)

MODEL = ("model", "train", "adapter", "kind")
PAIR = ("model", "train", "query", "adapter", "kind")
METHOD = ("method", "damping", "tokens", "reduction", "blocks")
FIELDS = tuple(name for name in OPTIONS if name.endswith("_field"))
RUN = ("output", "batch_size", "max_length", "limit")
TUNE = ("epochs", "lora_rank", "lora_alpha", "lora_target", "rslora", "learning_rate", "bf16")
PLACE = ("device", "seed")
ALL_METHODS = ("hyperinf", "datainf", "exact", "grad_dot")

# name: what it does, its options in the order of the help, its own defaults
COMMANDS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "demo": (
        "Tune a small real language model on generated sentences and explain it, in minutes.",
        ("method", "rows", "queries", "corrupt", "epochs", "learning_rate", "bf16", "model",
         "output", "batch_size", *PLACE),
        {"method": ALL_METHODS, "epochs": 3.0, "learning_rate": 2e-3, "model": "smollm2",
         "output": "demo-output"},
    ),
    "score": (
        "Influence of every training row on every query, for your own model and data.",
        (*PAIR, *METHOD, "fitted", *RUN, "query_limit", "top_k", "per_block", *FIELDS, *PLACE),
        {},
    ),
    "fit": (
        "The curvature of a training set or a sample of it, kept for score --fitted.",
        (*MODEL, *METHOD, *RUN, *FIELDS, *PLACE),
        {"output": "hyperinf-fitted"},
    ),
    "self-influence": (
        "Influence of every training row on itself: what the model had to memorise.",
        (*MODEL, *METHOD, *RUN, *FIELDS, *PLACE),
        {},
    ),
    "plan": (
        "What each method would do with every block, its predicted cost and memory; runs nothing.",
        (*PAIR, "method", "damping", "blocks", "max_length", "limit",
         "query_limit", *FIELDS, "device"),
        {"method": ALL_METHODS},
    ),
    "show": (
        "The tokens of rows, decoded, and which of them carry loss; needs no weights.",
        ("model", "train", "adapter", "kind", "tokens", "row", "limit", "max_length", *FIELDS),
        {"limit": 5},
    ),
    "identify": (
        "Does influence find the training rows of each query's class? AUC and recall.",
        (*PAIR, *METHOD, *RUN, "query_limit", *FIELDS, *TUNE, *PLACE),
        {"method": ALL_METHODS},
    ),
    "mislabeled": (
        "Rank training rows by the harm they do: wrong labels come first.",
        (*PAIR, "method", "damping", "flip", "blocks", *RUN, "query_limit", *FIELDS, *TUNE,
         *PLACE),
        {"method": ALL_METHODS, "batch_size": 32, "lora_rank": 16, "rslora": True},
    ),
    "select": (
        "Keep the training rows that help the queries most, as selected.jsonl.",
        (*PAIR, "share", *METHOD, *RUN, "query_limit", *FIELDS, *PLACE),
        {},
    ),
}  # fmt: skip


def info(as_json: Json = False) -> None:
    """Versions, extras, and which backends each op has here, with the reason for every no."""
    from ..ops.info import as_text, collect

    print(json.dumps(collect(), indent=1) if as_json else as_text())


for name, (text, options, defaults) in COMMANDS.items():
    app.command(name, help=text)(job_command(name, options, defaults))
app.command()(replay)
app.command()(converge)
app.command()(bench)
app.command()(info)

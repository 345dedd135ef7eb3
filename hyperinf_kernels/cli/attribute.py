"""`hyperinf score`, `fit`, `self-influence` and `plan`: attribution of your own model and rows."""

from pathlib import Path
from typing import Annotated

from ..workloads.rows import Fields
from .options import (
    Adapter,
    Batch,
    Blocks,
    Damping,
    Device,
    Json,
    Length,
    Limit,
    Method,
    Model,
    Output,
    PerBlock,
    Query,
    QueryLimit,
    Reduction,
    Seed,
    TopK,
    Train,
    option,
    reads_rows,
)
from .running import run


@reads_rows
def score(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    method: Method = ["hyperinf"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    tokens: Annotated[str, option("Tokens in the loss: answer, prompt or all.")] = "answer",
    reduction: Reduction = "sum",
    blocks: Blocks = "lora",
    fitted: Annotated[
        str | None,
        option("Curvature saved by hyperinf fit; its method and damping stand.", "--fitted"),
    ] = None,
    output: Output = Path("hyperinf-output"),
    top_k: TopK = None,
    per_block: PerBlock = False,
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """Influence of every training row on every query, for your own model and data."""
    run("score", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "tokens": (tokens,),
        "reduction": reduction, "blocks": blocks, "fitted": fitted, "output": output,
        "top_k": top_k, "per_block": per_block, "batch_size": batch_size,
        "max_length": max_length,
        "limit": limit, "query_limit": query_limit, "device": device, "seed": seed,
        "fields": fields,
    })  # fmt: skip


@reads_rows
def fit(
    model: Model,
    train: Train,
    adapter: Adapter = None,
    method: Annotated[str, option("As for score; one.", "--method", "-m")] = "hyperinf",
    damping: Annotated[str, option("As for score; one.", "--damping")] = "0.1",
    tokens: Annotated[str, option("Tokens in the loss: answer, prompt or all.")] = "answer",
    reduction: Reduction = "sum",
    blocks: Blocks = "lora",
    output: Annotated[Path, option("New folder for the curvature.", "--output", "-o")] = Path(
        "hyperinf-fitted"
    ),
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """The curvature of a training set or a sample of it, kept for score --fitted."""
    run("fit", as_json, {
        "model": model, "train": train, "adapter": adapter, "methods": (method,),
        "dampings": (damping,), "tokens": (tokens,), "reduction": reduction, "blocks": blocks,
        "output": output, "batch_size": batch_size, "max_length": max_length, "limit": limit,
        "device": device, "seed": seed,
        "fields": fields,
    })  # fmt: skip


@reads_rows
def self_influence(
    model: Model,
    train: Train,
    adapter: Adapter = None,
    method: Method = ["hyperinf"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    tokens: Annotated[str, option("Tokens in the loss: answer, prompt or all.")] = "answer",
    reduction: Reduction = "sum",
    blocks: Blocks = "lora",
    output: Output = Path("hyperinf-output"),
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """Influence of every training row on itself: what the model had to memorise."""
    run("self_influence", as_json, {
        "model": model, "train": train, "adapter": adapter, "methods": tuple(method),
        "dampings": tuple(damping), "tokens": (tokens,), "reduction": reduction,
        "blocks": blocks, "output": output, "batch_size": batch_size,
        "max_length": max_length, "limit": limit, "device": device, "seed": seed,
        "fields": fields,
    })  # fmt: skip


@reads_rows
def plan(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    method: Method = ["hyperinf", "datainf", "exact", "grad_dot"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    blocks: Blocks = "lora",
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    device: Device = "cpu",
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """What each method would do with every block, its predicted cost and memory; runs nothing."""
    run("plan", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "blocks": blocks,
        "max_length": max_length, "limit": limit, "query_limit": query_limit, "device": device,
        "fields": fields,
    })  # fmt: skip

"""`hyperinf demo`, `identify`, `mislabeled` and `select`: the papers' workloads."""

from pathlib import Path
from typing import Annotated

from ..workloads.rows import Fields
from .options import (
    Adapter,
    Alpha,
    Batch,
    Bf16,
    Blocks,
    Damping,
    Device,
    Epochs,
    Flip,
    Json,
    Length,
    Limit,
    Method,
    Model,
    Output,
    Query,
    QueryLimit,
    Rank,
    Rate,
    Reduction,
    RsLora,
    Seed,
    Target,
    Tokens,
    Train,
    option,
    reads_rows,
)
from .running import run, tuning


def demo(
    method: Method = ["hyperinf", "datainf", "exact", "grad_dot"],  # noqa: B006
    rows: Annotated[int, option("Training rows to generate.", "--rows")] = 300,
    queries: Annotated[int, option("Queries to generate.", "--queries")] = 50,
    corrupt: Annotated[float, option("Share of wrong answers.", "--corrupt")] = 0.1,
    epochs: Epochs = 3,
    rate: Rate = 2e-3,
    bf16: Bf16 = False,
    model: Model = "smollm2",
    output: Output = Path("demo-output"),
    batch_size: Batch = 16,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Tune a small real language model on generated sentences and explain it, in minutes."""
    settings = {
        "model": model, "output": output, "methods": tuple(method), "seed": seed,
        "batch_size": batch_size, "device": device,
        "tuning": tuning(epochs, 8, 32, [], False, rate, bf16, batch_size),
    }  # fmt: skip
    run("demo", as_json, settings, rows=rows, queries=queries, corrupt=corrupt)


@reads_rows
def identify(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    method: Method = ["hyperinf", "datainf", "exact", "grad_dot"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    tokens: Tokens = ["answer"],  # noqa: B006
    reduction: Reduction = "sum",
    blocks: Blocks = "lora",
    output: Output = Path("hyperinf-output"),
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    epochs: Epochs = 0,
    rank: Rank = 8,
    alpha: Alpha = 32,
    target: Target = [],  # noqa: B006
    rslora: RsLora = False,
    rate: Rate = 1e-3,
    bf16: Bf16 = False,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """Does influence find the training rows of each query's class? AUC and recall."""
    run("identify", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "tokens": tuple(tokens),
        "reduction": reduction, "blocks": blocks, "output": output, "batch_size": batch_size,
        "max_length": max_length, "limit": limit, "query_limit": query_limit,
        "device": device, "seed": seed,
        "fields": fields,
        "tuning": tuning(epochs, rank, alpha, target, rslora, rate, bf16, batch_size),
    })  # fmt: skip


@reads_rows
def mislabeled(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    method: Method = ["hyperinf", "datainf", "exact", "grad_dot"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    flip: Flip = 0.0,
    blocks: Blocks = "lora",
    output: Output = Path("hyperinf-output"),
    batch_size: Batch = 32,
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    epochs: Epochs = 0,
    rank: Rank = 16,
    alpha: Alpha = 32,
    target: Target = [],  # noqa: B006
    rslora: RsLora = True,
    rate: Rate = 1e-3,
    bf16: Bf16 = False,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """Rank training rows by the harm they do: wrong labels come first."""
    run("mislabeled", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "flip": flip, "blocks": blocks,
        "output": output, "batch_size": batch_size, "max_length": max_length, "limit": limit,
        "query_limit": query_limit, "device": device, "seed": seed,
        "fields": fields,
        "tuning": tuning(epochs, rank, alpha, target, rslora, rate, bf16, batch_size),
    })  # fmt: skip


@reads_rows
def select(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    share: Annotated[float, option("Share of the training rows to keep.", "--share")] = 0.05,
    method: Method = ["hyperinf"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    tokens: Annotated[str, option("Tokens in the loss: answer, prompt or all.")] = "answer",
    reduction: Reduction = "sum",
    blocks: Blocks = "lora",
    output: Output = Path("hyperinf-output"),
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """Keep the training rows that help the queries most, as selected.jsonl."""
    run("select", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "tokens": (tokens,),
        "reduction": reduction, "blocks": blocks, "output": output, "batch_size": batch_size,
        "max_length": max_length, "limit": limit, "query_limit": query_limit,
        "device": device, "seed": seed,
        "fields": fields,
    }, share=share)  # fmt: skip

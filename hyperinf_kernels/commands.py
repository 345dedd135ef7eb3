"""The commands of `hyperinf` as typer definitions; the jobs themselves are in `jobs`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_command import bench
from .converge_command import converge
from .errors import InputError
from .info import as_text, collect
from .ops import BackendError
from .options import (
    Adapter,
    Alpha,
    AnswerField,
    Batch,
    Bf16,
    Blocks,
    Damping,
    Device,
    Epochs,
    Flip,
    GroupField,
    IdField,
    Json,
    LabelField,
    Length,
    Limit,
    Method,
    Model,
    Output,
    PerBlock,
    PromptField,
    Query,
    QueryLimit,
    Rank,
    Rate,
    Reduction,
    RsLora,
    Seed,
    Target,
    TextField,
    Tokens,
    TopK,
    Train,
    option,
)
from .plan_command import plan_table
from .tasks.finetune import LoraTraining
from .tasks.rows import Fields
from .terminal import Bars, closing_table, quiet_libraries

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training examples made a LoRA-tuned model behave as it does.",
)


def run(job: str, as_json: bool, settings: dict[str, Any], **arguments: Any) -> None:
    quiet_libraries()
    # only now: these import libraries that read their environment when first imported
    from . import jobs
    from .preparation import Settings

    check_device(settings["device"])
    try:
        with Bars() as bars:
            chosen = Settings(**settings, progress=bars.advance)
            document = getattr(jobs, job)(chosen, **arguments)
    except BackendError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        # said here, since what typer makes of it depends on its version
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        # ASCII goes through a pipe of any encoding
        print(json.dumps(document, allow_nan=False))
    if job == "plan":
        plan_table(document)
    else:
        closing_table(document, chosen.output)


def tuning(
    epochs: float, rank: int, alpha: int, target: list[str], rslora: bool, rate: float,
    bf16: bool, batch: int,
) -> LoraTraining | None:  # fmt: skip
    if not epochs:
        return None
    return LoraTraining(
        rank=rank, alpha=alpha, targets=tuple(target), rslora=rslora, epochs=epochs,
        learning_rate=rate, batch_size=batch, bf16=bf16,
    )  # fmt: skip


@app.command()
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


@app.command()
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
    output: Output = Path("hyperinf-output"),
    top_k: TopK = None,
    per_block: PerBlock = False,
    batch_size: Batch = 16,
    max_length: Length = None,
    limit: Limit = None,
    query_limit: QueryLimit = None,
    prompt_field: PromptField = "prompt",
    answer_field: AnswerField = "answer",
    text_field: TextField = "text",
    label_field: LabelField = "label",
    group_field: GroupField = "variation",
    id_field: IdField = "id",
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Influence of every training row on every query, for your own model and data."""
    run("score", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "tokens": (tokens,),
        "reduction": reduction, "blocks": blocks, "output": output, "top_k": top_k,
        "per_block": per_block, "batch_size": batch_size, "max_length": max_length,
        "limit": limit, "query_limit": query_limit, "device": device, "seed": seed,
        "fields": Fields(prompt_field, answer_field, text_field, label_field, group_field,
                         id_field),
    })  # fmt: skip


@app.command("self-influence")
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
) -> None:
    """Influence of every training row on itself: what the model had to memorise."""
    run("self_influence", as_json, {
        "model": model, "train": train, "adapter": adapter, "methods": tuple(method),
        "dampings": tuple(damping), "tokens": (tokens,), "reduction": reduction,
        "blocks": blocks, "output": output, "batch_size": batch_size,
        "max_length": max_length, "limit": limit, "device": device, "seed": seed,
    })  # fmt: skip


@app.command()
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
    prompt_field: PromptField = "prompt",
    answer_field: AnswerField = "answer",
    group_field: GroupField = "variation",
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
) -> None:
    """Does influence find the training rows of each query's class? AUC and recall."""
    run("identify", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "tokens": tuple(tokens),
        "reduction": reduction, "blocks": blocks, "output": output, "batch_size": batch_size,
        "max_length": max_length, "limit": limit, "query_limit": query_limit,
        "device": device, "seed": seed,
        "fields": Fields(prompt=prompt_field, answer=answer_field, group=group_field),
        "tuning": tuning(epochs, rank, alpha, target, rslora, rate, bf16, batch_size),
    })  # fmt: skip


@app.command()
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
    text_field: TextField = "text",
    label_field: LabelField = "label",
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
) -> None:
    """Rank training rows by the harm they do: wrong labels come first."""
    run("mislabeled", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "flip": flip, "blocks": blocks,
        "output": output, "batch_size": batch_size, "max_length": max_length, "limit": limit,
        "query_limit": query_limit, "device": device, "seed": seed,
        "fields": Fields(text=text_field, label=label_field),
        "tuning": tuning(epochs, rank, alpha, target, rslora, rate, bf16, batch_size),
    })  # fmt: skip


@app.command()
def plan(
    model: Model,
    train: Train,
    query: Query,
    adapter: Adapter = None,
    method: Method = ["hyperinf", "datainf", "exact", "grad_dot"],  # noqa: B006
    damping: Damping = ["0.1"],  # noqa: B006
    blocks: Blocks = "lora",
    limit: Limit = None,
    query_limit: QueryLimit = None,
    prompt_field: PromptField = "prompt",
    answer_field: AnswerField = "answer",
    text_field: TextField = "text",
    label_field: LabelField = "label",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """What each method would do with every block, its predicted cost and memory; runs nothing."""
    run("plan", as_json, {
        "model": model, "train": train, "query": query, "adapter": adapter,
        "methods": tuple(method), "dampings": tuple(damping), "blocks": blocks, "limit": limit,
        "query_limit": query_limit, "device": device,
        "fields": Fields(prompt=prompt_field, answer=answer_field, text=text_field,
                         label=label_field),
    })  # fmt: skip


@app.command()
def info(as_json: Json = False) -> None:
    """Versions, extras, and which backends each op has here, with the reason for every no."""
    print(json.dumps(collect(), indent=1) if as_json else as_text())


app.command()(converge)
app.command()(bench)


def check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: choose cpu, cuda or cuda:NUMBER")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InputError(f"--device {name}: torch {torch.__version__} sees {found} CUDA devices")

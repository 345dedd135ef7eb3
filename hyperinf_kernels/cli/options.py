"""The options that commands share, with their help."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..workloads.rows import Fields


def option(text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, **more)


Model = Annotated[str, option("Model folder, or smollm2 or minilm.", "--model")]
Adapter = Annotated[str | None, option("Folder of a peft adapter.", "--adapter")]
Train = Annotated[str, option("Training rows, JSON Lines; - for standard input.", "--train")]
Query = Annotated[str, option("Query rows, JSON Lines; - for standard input.", "--query")]
Method = Annotated[list[str], option(
    "hyperinf, datainf, lissa, cg, exact or grad_dot, with options as hyperinf:mode=paper. "
    "Repeat for several.", "--method", "-m")]  # fmt: skip
Damping = Annotated[list[str], option(
    "0.1 (times the mean squared gradient), abs:1e-3, trace:0.1, or a sum with +. "
    "Repeat to compare.", "--damping")]  # fmt: skip
Tokens = Annotated[list[str], option(
    "Tokens in the loss: answer, prompt or all. Repeat to compare.", "--tokens")]  # fmt: skip
Reduction = Annotated[str, option(
    "Over the tokens of one example: sum or mean.", "--reduction")]  # fmt: skip
Output = Annotated[Path, option("New folder for the results.", "--output", "-o")]
Blocks = Annotated[str, option(
    "lora, or a regular expression of parameter names.", "--blocks")]  # fmt: skip
Batch = Annotated[int, option("Rows per batch.", "--batch-size")]
Length = Annotated[int | None, option("Cut rows to this many tokens.", "--max-length")]
Limit = Annotated[int | None, option("Draw this many training rows.", "--limit")]
QueryLimit = Annotated[int | None, option("Draw this many queries.", "--query-limit")]
TopK = Annotated[int | None, option(
    "Keep only each query's most helpful and most harmful rows.", "--top-k")]  # fmt: skip
Device = Annotated[str, option("cpu, cuda or cuda:1.", "--device")]
Seed = Annotated[int, option("Seed of everything random.", "--seed")]
Json = Annotated[bool, option("Print the result as one JSON document.", "--json")]
Epochs = Annotated[float, option(
    "Fine-tune a LoRA adapter for so many epochs first (when no --adapter is given).",
    "--epochs")]  # fmt: skip
Rank = Annotated[int, option("LoRA rank.", "--lora-rank")]
Alpha = Annotated[int, option("LoRA alpha.", "--lora-alpha")]
Target = Annotated[list[str], option(
    "Modules to tune; default: the query and value projections.", "--lora-target")]  # fmt: skip
RsLora = Annotated[bool, option("Scale by alpha / sqrt(rank).", "--rslora")]
Rate = Annotated[float, option("Learning rate.", "--learning-rate")]
Bf16 = Annotated[
    bool, option("Fine-tune under bf16 autocast: faster where the processor has it.", "--bf16")
]
Flip = Annotated[float, option("Share of training labels to flip first.", "--flip")]
PerBlock = Annotated[bool, option("Write the split of every score over blocks.", "--per-block")]

# name of the option and of the field of `Fields`, its help; a command takes them all as `fields`
FIELDS = {
    "prompt": "Field of the prompt.",
    "answer": "Field of the answer.",
    "text": "Field of the text.",
    "label": "Field of the label.",
    "group": "Field of the class.",
    "id": "Field of the row's name.",
    "corrupted": "Field that tells a wrong answer or label.",
}


def reads_rows(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options for the names of fields; it gets them as `fields`."""
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "fields"]
    named = [
        inspect.Parameter(
            f"{name}_field", inspect.Parameter.KEYWORD_ONLY, default=getattr(Fields, name),
            annotation=Annotated[str, option(text, f"--{name}-field")],
        )
        for name, text in FIELDS.items()
    ]  # fmt: skip

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        fields = Fields(**{name: given.pop(f"{name}_field") for name in FIELDS})
        command(**given, fields=fields)

    wrapper.__signature__ = inspect.Signature([*own, *named])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in (*own, *named)}
    return wrapper

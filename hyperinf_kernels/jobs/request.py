"""What a person asks for: every option of the command line, defined once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from ..attribution.stream import Progress
    from ..workloads.finetune import LoraTraining
    from ..workloads.rows import Fields


HERE = Path("hyperinf-output")


def option(default: Any, text: str, *flags: str) -> Any:
    """A field that is an option: its help, and its flags where they are not the field's name."""
    return field(default=default, metadata={"help": text, "flags": flags})


@dataclass(frozen=True)
class Request:
    """What was asked for. A tuple is an option that may be repeated."""

    model: str = option("", "Model folder, or smollm2 or minilm.")
    adapter: str | None = option(None, "Folder of a peft adapter.")
    train: tuple[str, ...] = option(
        (), "Training rows: JSON Lines (.gz, .zst), Parquet, a datasets folder, a pattern, - for "
        "standard input. Repeat for several.")  # fmt: skip
    query: tuple[str, ...] = option((), "Query rows, likewise.")
    kind: str | None = option(
        None, "generation, classification, text, seq2seq or chat, with options as "
        "chat:turns=last; by default told by the fields.")  # fmt: skip
    method: tuple[str, ...] = option(
        ("hyperinf",), "hyperinf, datainf, lissa, cg, exact, kfac, ekfac or grad_dot, with options "
        "as hyperinf:mode=paper. Repeat for several.", "--method", "-m")  # fmt: skip
    damping: tuple[str, ...] = option(
        ("0.1",), "0.1 (times the mean squared gradient), abs:1e-3, trace:0.1, or a sum with +. "
        "Repeat to compare.")  # fmt: skip
    tokens: tuple[str, ...] = option(
        ("answer",), "Tokens in the loss: answer, prompt or all. Repeat to compare.")  # fmt: skip
    reduction: str = option("sum", "Over the tokens of one example: sum or mean.")
    blocks: str = option("lora", "lora, or a regular expression of parameter names.")
    fitted: str | None = option(
        None, "Curvature saved by hyperinf fit; its method and damping stand.")  # fmt: skip
    share: float = option(0.05, "Share of the training rows to keep.")
    flip: float = option(0.0, "Share of training labels to flip first.")
    rows: int = option(300, "Training rows to generate.")
    queries: int = option(50, "Queries to generate.")
    corrupt: float = option(0.1, "Share of wrong answers.")
    output: Path = option(  # noqa: RUF009
        HERE, "New folder for the results.", "--output", "-o"
    )
    top_k: int | None = option(
        None, "Keep only each query's most helpful and most harmful rows.")  # fmt: skip
    per_block: bool = option(False, "Write the split of every score over blocks.", "--per-block")
    batch_size: int = option(16, "Rows per batch.")
    row: tuple[str, ...] = option((), "Id of a row to show. Repeat for several.")
    max_length: int | None = option(None, "Cut rows to this many tokens.")
    limit: int | None = option(None, "Draw this many training rows.")
    query_limit: int | None = option(None, "Draw this many queries.")
    prompt_field: str = option("prompt", "Field of the prompt.")
    answer_field: str = option("answer", "Field of the answer.")
    text_field: str = option("text", "Field of the text.")
    label_field: str = option("label", "Field of the label.")
    source_field: str = option("source", "Field of the source.")
    target_field: str = option("target", "Field of the target.")
    messages_field: str = option("messages", "Field of a chat's messages.")
    completion_field: str = option("completion", "Field of a chat's completion.")
    tools_field: str = option("tools", "Field of a chat's tools.")
    corrupted_field: str = option("corrupted", "Field that tells a wrong answer or label.")
    group_field: str = option("variation", "Field of the class.")
    id_field: str = option("id", "Field of the row's name.")
    epochs: float = option(
        0, "Fine-tune a LoRA adapter for so many epochs first (when no --adapter is given)."
    )
    lora_rank: int = option(8, "LoRA rank.")
    lora_alpha: int = option(32, "LoRA alpha.")
    lora_target: tuple[str, ...] = option(
        (), "Modules to tune; default: the query and value projections.")  # fmt: skip
    rslora: bool = option(False, "Scale by alpha / sqrt(rank).", "--rslora/--no-rslora")
    learning_rate: float = option(1e-3, "Learning rate.")
    bf16: bool = option(
        False, "Fine-tune under bf16 autocast: faster where the processor has it.", "--bf16"
    )
    device: str = option("cpu", "cpu, cuda or cuda:1.")
    seed: int = option(0, "Seed of everything random.")
    progress: Progress | None = None

    @property
    def fields(self) -> Fields:
        """What the rows' fields are called."""
        from ..workloads.rows import Fields

        ours = (f.name for f in fields(Fields))
        return Fields(**{n: getattr(self, f"{n}_field") for n in ours if f"{n}_field" in OPTIONS})

    @property
    def tuning(self) -> LoraTraining | None:
        """How to fine-tune, if that was asked for.

        Raises:
            InputError: a number that cannot be trained with.
        """
        from ..workloads.finetune import LoraTraining

        if not self.epochs:
            return None
        return LoraTraining(
            rank=self.lora_rank, alpha=self.lora_alpha, targets=self.lora_target,
            rslora=self.rslora, epochs=self.epochs, learning_rate=self.learning_rate,
            batch_size=self.batch_size, bf16=self.bf16,
        )  # fmt: skip

    def check_numbers(self) -> None:
        """Refuse numbers that are out of range."""
        for name in ("batch_size", "max_length", "limit", "query_limit", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed must be at least 0 and below 2^32, got {self.seed}")

    def check(self) -> None:
        """Refuse what can be seen wrong without data, model and libraries."""
        self.check_numbers()
        if self.per_block and self.top_k is not None:
            raise InputError("--per-block needs every score; leave --top-k out")
        if self.fitted is not None and any(
            getattr(self, name) != OPTIONS[name].default for name in ("method", "damping", "blocks")
        ):
            raise InputError(
                "--fitted brings its method, damping and blocks; leave --method, --damping and "
                "--blocks out"
            )
        tuned = self.adapter or self.tuning or (Path(self.model) / "adapter_config.json").exists()
        if self.blocks == "lora" and not tuned:
            raise InputError(
                "there is no LoRA adapter to attribute; give one with --adapter, let identify or "
                "mislabeled tune one with --epochs, or choose parameters of the model with --blocks"
            )

    def single(self, *names: str) -> None:
        """Refuse several values of options that this job takes one of."""
        for name in names:
            if len(getattr(self, name)) != 1:
                raise InputError(f"--{name}: give one here, got {', '.join(getattr(self, name))}")

    def as_plain(self) -> dict[str, Any]:
        """Every option as a value that JSON holds; `from_plain` reads it."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {
            name: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v
            for name, v in values.items()
        }

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Request:
        """The request of `as_plain`.

        Raises:
            InputError: an option that this version does not have.
        """
        unknown = [name for name in values if name not in OPTIONS]
        if unknown:
            raise InputError(f"this version has no option {unknown[0]!r}")
        made: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**{**made, "output": Path(made["output"])})


OPTIONS: dict[str, Field[Any]] = {f.name: f for f in fields(Request) if f.metadata}

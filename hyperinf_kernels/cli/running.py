"""Run a job for a command: bars, one clear error, one JSON document, the closing table."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

from ..errors import InputError
from ..ops import BackendError
from ..workloads.finetune import LoraTraining
from .plan_table import plan_table
from .terminal import Bars, closing_table, fitted_lines, quiet_libraries


def run(job: str, as_json: bool, settings: dict[str, Any], **arguments: Any) -> None:
    quiet_libraries()
    # only now: these import libraries that read their environment when first imported
    from .. import jobs
    from ..jobs.preparation import Settings

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
    elif job == "fit":
        fitted_lines(document)
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

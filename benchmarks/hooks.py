"""What per-sample gradients cost on top of a plain batched forward and backward pass."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.attribution.influence import sum_blocks
from hyperinf_kernels.attribution.scores import block_scores
from hyperinf_kernels.attribution.stream import gradient_batches
from hyperinf_kernels.gradients import Block, Loss, find_blocks

from . import setting
from .registry import Measurement, benchmark, interleaved, measurements

Grads = dict[str, Tensor]
Part = list[dict[str, Any]]


# the two passes take turns every few batches, so that a busy moment of the machine hits both
TURN = 6


@benchmark("hooks")
def hooks(quick: bool) -> Iterator[Measurement]:
    """Gradients of all training rows, scored against all queries, beside plain training passes.

    The plain pass is what training does: labels given to the model, the mean loss, gradients of the
    LoRA weights alone. Ours computes every sample's gradients and scores them in the same pass.
    """
    loaded = setting.lora_model()
    model = loaded.model
    source, train_rows, query_rows = setting.sentence_rows(
        64 if quick else 900, 10 if quick else 100
    )
    train, query = (setting.batches(rows, loaded, 16) for rows in (train_rows, query_rows))
    for name_, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name_)

    def plain(part: Part) -> None:
        model.eval()
        for batch in part:
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
            model(**inputs, use_cache=False).loss.backward()
            model.zero_grad()

    held = list(train)
    for kept, every in (("answer", 1), ("all", 1 if quick else 5)):
        chosen = held[::every]
        count = sum(int(batch["attention_mask"].sum()) for batch in chosen)
        rows = sum(len(batch["labels"]) for batch in chosen)
        parts = [chosen[i : i + TURN] for i in range(0, len(chosen), TURN)]
        loss, blocks = hk.CausalLM(kept), find_blocks(model)
        queries = [grads for _, grads in gradient_batches(model, query, loss, blocks, "query")]
        # preconditioned queries have the shape of their gradients, so these stand for any method's
        applied = {b.name: torch.cat([q[b.name] for q in queries]) for b in blocks}

        def collect_and_score(
            part: Part, loss: Loss = loss, blocks: list[Block] = blocks, applied: Grads = applied
        ) -> None:
            for _, grads in gradient_batches(model, part, loss, blocks, "train"):
                sum_blocks(block_scores(applied, grads))

        providers = {
            "plain forward and backward": plain,
            "per-sample gradients and scores": collect_and_score,
        }
        turns = [
            interleaved({name: partial(run, part) for name, run in providers.items()}, 1)
            for part in parts
        ]
        totals = {name: [sum(turn[name][0] for turn in turns)] for name in providers}
        case = f"{source}, {rows} rows x {len(query_rows)} queries, loss on {kept} tokens"
        yield from measurements(
            case, totals, "plain forward and backward", work=count, unit="tokens"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory of the process {peak:.2f} GiB")

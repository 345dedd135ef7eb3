"""Scoring a pool that streams by: each layer's gradients met inside backward, or all kept first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import hyperinf_kernels as hk
from hyperinf_kernels.attribution.scores import block_scores
from hyperinf_kernels.attribution.stream import gradient_batches, score_batches
from hyperinf_kernels.gradients import find_blocks

from .memory import peak_memory
from .registry import Measurement, benchmark, interleaved, measurements

REPEATS = 9
ROWS, BATCH, TOKENS, VOCABULARY = 32, 8, 64, 2000


@benchmark("pool")
def pool(quick: bool) -> Iterator[Measurement]:
    """32 rows against queries of LoRA r=16 on every layer of a small random llama."""
    model, loss = _model(), hk.CausalLM()
    blocks = find_blocks(model)
    rows = _batches(ROWS, BATCH, seed=1)
    for queries in (4,) if quick else (4, 32, 128):
        asked = list(gradient_batches(model, _batches(queries, 8, seed=2), loss, blocks, "query"))
        applied = {b.name: torch.cat([grads[b.name] for _, grads in asked]) for b in blocks}

        def kept(applied: dict[str, Tensor] = applied) -> Tensor:
            parts = [
                sum(block_scores(applied, grads).values())
                for _, grads in gradient_batches(model, rows, loss, blocks, "train")
            ]
            return torch.cat(parts, 1)

        def layer_by_layer(applied: dict[str, Tensor] = applied) -> Tensor:
            parts = score_batches(model, rows, loss, blocks, applied)
            return torch.cat([sum(scores.values()) for _, scores in parts], 1)

        providers = {"gradients, then scores": kept, "scores layer by layer": layer_by_layer}
        truth = _truth(model, rows, applied)
        errors, peaks = {}, {}
        for name, call in providers.items():
            errors[name] = float((call().double() - truth).norm() / truth.norm())
            peaks[name] = peak_memory(call)
        times = interleaved(providers, 2 if quick else REPEATS)
        case = f"{ROWS} rows of {TOKENS} tokens in batches of {BATCH}, {queries} queries"
        for row in measurements(case, times, next(iter(providers)), errors, ROWS, "rows"):
            yield replace(row, note=f"peak {peaks[row.provider] / 2**20:.0f} MiB")


def _model() -> nn.Module:
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return tuned


def _batches(rows: int, size: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, TOKENS), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(size)
    ]


def _truth(model: nn.Module, rows: list[dict[str, Tensor]], applied: dict[str, Tensor]) -> Tensor:
    """-<W, g> added up in fp64, of the same fp32 gradients."""
    parts = []
    for batch in rows:
        wide = {n: g.flatten(1).double() for n, g in hk.per_sample_gradients(model, batch).items()}
        parts.append(-sum(W.flatten(1).double() @ wide[name].mT for name, W in applied.items()))
    return torch.cat(parts, 1)

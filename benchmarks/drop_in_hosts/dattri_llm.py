"""dattri-llm's own attributors and ours on one pair of its gradient stores."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

import hyperinf_kernels as hk
from hyperinf_kernels.integrations import dattri_llm as hkd

from ..registry import Measurement, interleaved, measurements

from dattri_llm import AttributionArguments, AttributionTask, HookManagerConfig  # isort: skip
from dattri_llm import EKFACAttributor, KFACAttributor, TracInAttributor  # isort: skip


class Rows(Dataset):
    """Random tokens."""

    def __init__(self, count: int, length: int) -> None:
        self.ids = torch.randint(1, 997, (count, length))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def measure(quick: bool) -> Iterator[Measurement]:
    """Fit and score from disk: LoRA on q and v of a Llama, gradients stored once for all."""
    n, m, width, layers, length = (24, 6, 32, 1, 8) if quick else (256, 32, 256, 4, 32)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=997, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    model.eval()

    def loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = module(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    train, query = Rows(n, length), Rows(m, length)
    blocks = [name for name, _ in model.named_parameters() if "lora_" in name]
    hooks = HookManagerConfig(
        hook_types={name.removesuffix(".weight"): "linear_io" for name in blocks}
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = AttributionArguments(
            output_dir=folder, per_device_train_batch_size=32, per_device_eval_batch_size=32,
            use_cpu=True,
        )  # fmt: skip
        capture = hkd.HyperINFAttributor(arguments, task=AttributionTask(loss, model))
        [stores] = capture.cache(train, query, hook_config=hooks)

        def stock(kind: Any) -> Any:
            return lambda: kind(arguments).attribute_from_cache(*stores)

        def ours(method: str) -> Any:
            return lambda: (
                hkd.InfluenceAttributor(arguments, method).attribute_from_cache(*stores).scores
            )

        times = interleaved(
            {
                "stock K-FAC": stock(KFACAttributor),
                "stock EK-FAC": stock(EKFACAttributor),
                "stock gradient dot": stock(TracInAttributor),
                "HyperINF": ours("hyperinf"),
                "DataInf": ours("datainf"),
                "exact": ours("exact"),
            },
            1 if quick else 7,
        )
        batches = [dict.fromkeys(("input_ids", "labels"), rows.ids) for rows in (train, query)]
        double = model.double()
        grads = [hk.per_sample_gradients(double, batch) for batch in batches]
        errors = {}
        for label, method in (("HyperINF", "hyperinf"), ("DataInf", "datainf"), ("exact",) * 2):
            truth = -hk.influence(*grads, method).values.T
            errors[label] = float((ours(method)() - truth).abs().max() / truth.abs().max())
    size = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    case = f"attribute_from_cache, {len(blocks)} LoRA matrices, D={size}, N={n}, M={m}, T={length}"
    yield from measurements(case, times, "stock K-FAC", errors)

"""Every kind of LoRA that peft makes: right, or refused by its name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import hyperinf_kernels as hk
from hyperinf_kernels.gradients.adapters import left_out

from . import families

LLAMA = next(f for f in families.FAMILIES if f.name == "Llama")
ROWS = [LLAMA.row(i) for i in range(3)]
BATCH = LLAMA.collate(ROWS, "left")
LIMIT = 1e-5


def assert_right(model: nn.Module) -> None:
    got = hk.per_sample_gradients(model, BATCH)
    want = families.own_gradients(model, ROWS)
    for name, grad in got.items():
        known = want[name]
        if "lora_B.default" in name and ".weight" not in name:
            known = known if known.shape == grad.shape else known.mT
        if "lora_embedding_B" in name:
            known = known.mT
        assert float((grad - known).norm()) <= LIMIT * float(known.norm()), name
    assert any("lora_A" in n or "embedding_A" in n for n in got)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"},
        {"bias": "all"}, {"layer_replication": [(0, 2), (1, 2)]},
        {"trainable_token_indices": [5, 6]}, {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_pattern": {"v_proj": 4}},
    ],
    ids=str,
)  # fmt: skip
def test_variants_of_lora_are_right(options: dict[str, Any]) -> None:
    assert_right(LLAMA.tuned(**options))


def test_adalora_is_right() -> None:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"],
                                task_type="CAUSAL_LM")  # fmt: skip
    model = peft.get_peft_model(LLAMA.make(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name and "ranknum" not in name:
            nn.init.normal_(parameter, std=0.3)
    got = hk.per_sample_gradients(model, BATCH)
    rows: dict[str, list[Any]] = {name: [] for name in got}
    parameters = dict(model.named_parameters())
    for row in ROWS:
        model.zero_grad()
        count = int((row["labels"][:, 1:] != -100).sum())
        # the adapter adds an orthogonality term of its own to the loss, which no row owns
        (model.get_base_model()(**row).loss * count).backward()
        for name in rows:
            grad = parameters[name].grad
            rows[name].append(grad.mT if ".lora_B." in name else grad)
    for name, grads in rows.items():
        want = torch.stack(grads)
        assert float((got[name] - want).norm()) <= LIMIT * float(want.norm()), name
    assert sum("lora_A" in name for name in got) == 2


def test_a_frozen_matrix_is_left_out() -> None:
    """LoRA-FA trains B alone."""
    model = LLAMA.tuned()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    assert all("lora_B" in name for name in hk.per_sample_gradients(model, BATCH))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft.LoHaConfig(target_modules=["q_proj"]), "no LoRA layer .its adapter is LOHA"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        (peft.VeraConfig(target_modules=["q_proj"]), "VERA"),
        (peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8), "OFT"),
        (peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5],
                         task_type="CAUSAL_LM"), "ALoraLinearVariant is not supported"),
    ],
    ids=["LoHa", "IA3", "VeRA", "OFT", "aLoRA"],
)  # fmt: skip
def test_other_adapters_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(hk.InputError, match=message):
        hk.Attributor(peft.get_peft_model(LLAMA.make(), config))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({}, None),
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"trainable_token_indices": [5, 6]}, "trainable_tokens_delta"),
    ],
    ids=str,
)
@pytest.mark.parametrize("inference", [False, True])
def test_what_was_trained_but_is_left_out_is_said(options, part, inference: bool) -> None:
    model = LLAMA.tuned(**options)
    model.requires_grad_(False) if inference else None
    scores = hk.Attributor(model, method="grad_dot").fit([BATCH]).score([BATCH])
    said = scores.meta.get("left out")
    if part is None:
        assert said is None
        return
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or part in n)
    missing = sum(p.numel() for n, p in model.named_parameters() if part in n)
    assert said["parameters"] == missing
    assert said["share"] == pytest.approx(missing / total)
    assert part in said["names"][0]


def test_biases_of_lora_layers_are_counted_as_left_out() -> None:
    gpt2 = next(f for f in families.FAMILIES if f.name == "GPT-2")
    model = gpt2.tuned(bias="lora_only").requires_grad_(False)
    chosen = [n for n, _ in model.named_parameters() if "lora_" in n]
    said = left_out(model, chosen)
    assert said is not None
    assert all("c_attn.base_layer.bias" in name for name in said["names"])
    assert said["parameters"] == 2 * 96

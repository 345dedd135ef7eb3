"""Plausible wrong gradients are found on the first batch, before any score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hyperinf_kernels as hk

from . import models


class Functional(nn.Module):
    """Uses one layer's weight without running the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.bypassed = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.used(x), self.bypassed.weight).sum(1)


class Scaled(nn.Linear):
    """A subclass that changes the forward it inherits."""

    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * super().forward(x).tanh() + nn.functional.linear(x, self.weight)


class TimeFirst(nn.Module):
    """The layer sees (T, B, d), here with as many tokens as samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).pow(2).sum((0, 2))


class Mixing(nn.Module):
    """A sample's loss depends on the rest of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return (h - h.mean(0)).pow(2).sum(1)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"])


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Functional(), (5, 4), "bypassed.weight.*outside its layer"),
        (nn.Sequential(Scaled(4, 3), nn.Flatten()), (5, 4), "changes the forward"),
        (TimeFirst(), (5, 5, 4), "samples in its first dimension"),
        (Mixing(), (5, 4), "depends on the others"),
    ],
    ids=["functional", "subclass", "time first", "mixing"],
)
def test_wrong_gradients_are_refused(
    model: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(*shape)}

    def per_sample(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        out = loss(m, b)
        return out if out.ndim == 1 else out.sum(1)

    attributor = hk.Attributor(model, loss=per_sample, blocks="weight")
    with pytest.raises(hk.InputError, match=message):
        attributor.fit([batch])


@pytest.mark.parametrize("family", [models.llama, models.gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_right_gradients_pass_and_leave_the_model_alone(family, dtype: torch.dtype) -> None:
    model = family().to(dtype)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    for side in ("left", "right"):
        hk.Attributor(model).fit([models.text_batch(side)])
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())


def test_lora_that_runs_no_layer_of_its_own_is_refused_by_name() -> None:
    import peft

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0].sum((1, 2))

    config = peft.LoraConfig(r=2, target_modules=["attention"])
    model = peft.get_peft_model(Attention(), config)
    with pytest.raises(hk.InputError, match="LoRA on MultiheadAttention is not supported"):
        hk.per_sample_gradients(model, {"x": torch.randn(2, 3, 8)}, loss=loss)

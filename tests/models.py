"""Tiny models of every supported family, built from configurations, never downloaded."""

from __future__ import annotations

import peft
import torch
import transformers
from torch import Tensor, nn


def llama(rank: int = 4, use_rslora: bool = False, **lora: object) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return tuned(
        model, "CAUSAL_LM", r=rank, use_rslora=use_rslora,
        **{"target_modules": ["q_proj", "v_proj", "down_proj"], **lora},
    )  # fmt: skip


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
    )  # fmt: skip
    return tuned(
        transformers.GPT2LMHeadModel(config), "CAUSAL_LM", r=4, target_modules=["c_attn"],
        fan_in_fan_out=True,
    )  # fmt: skip


def bert_config(labels: int) -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_labels=labels, max_position_embeddings=64,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip


def bert_sequence(labels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(bert_config(labels))
    return tuned(model, "SEQ_CLS", r=4, target_modules=["query", "value"])


def bert_token() -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(bert_config(5))
    return tuned(model, "TOKEN_CLS", r=4, target_modules=["query", "value"])


def tuned(model: nn.Module, task: str, **lora: object) -> nn.Module:
    """LoRA with B away from zero, as after training."""
    config = peft.LoraConfig(task_type=task, lora_alpha=8, lora_dropout=0.2, **lora)
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped


class Net(nn.Module):
    """Convolutions (strided, dilated, grouped), every norm, embedding, linear; (B,) losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, dilation=2, padding="same", groups=4, bias=False)
        self.conv3 = nn.Conv2d(8, 4, 2, padding=1, padding_mode="circular")
        self.batch_norm = nn.BatchNorm2d(8)
        self.group_norm = nn.GroupNorm(2, 8)
        self.layer_norm = nn.LayerNorm(6)
        self.rms_norm = nn.RMSNorm(6)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(10, 3)
        self.batch_norm.running_mean.normal_()
        self.batch_norm.running_var.uniform_(0.5, 2.0)

    def forward(self, image: Tensor, ids: Tensor) -> Tensor:
        x = self.batch_norm(self.conv1(image)).relu()
        x = self.group_norm(self.conv2(x)).relu()
        pooled = self.conv3(x).mean((2, 3))
        t = self.layer_norm(self.embed(ids))
        # used twice in one forward pass: gradients of both uses add up
        t = self.rms_norm(self.shared(torch.tanh(self.shared(t)))).mean(1)
        return self.head(torch.cat([pooled, t], 1))


def net_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(batch["image"], batch["ids"])
    return nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def text_batch(
    side: str, lengths: tuple[int, ...] = (9, 4, 12, 7), pad: int = 0
) -> dict[str, Tensor]:
    """Token rows of unequal lengths, the first third of each a prompt, padded on one side."""
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    batch = {
        "input_ids": torch.full((len(lengths), width), pad),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.long),
        "labels": torch.full((len(lengths), width), -100),
    }
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(width - length, width)
        tokens = torch.randint(1, 61, (length,), generator=generator)
        labels = tokens.clone()
        labels[: length // 3 + 1] = -100
        batch["input_ids"][row, where] = tokens
        batch["attention_mask"][row, where] = 1
        batch["labels"][row, where] = labels
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample without its padding, as a batch of one."""
    if "attention_mask" not in batch:
        return {key: value[row : row + 1] for key, value in batch.items()}
    kept = batch["attention_mask"][row].bool()
    return {
        key: value[row : row + 1] if value.ndim == 1 else value[row : row + 1, kept]
        for key, value in batch.items()
    }

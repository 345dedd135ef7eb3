"""One MLP and one LoRA-tuned transformer in fp64, with per-sample gradients from plain autograd.

Train and query loaders are unequal batches, because hosts that average wrongly are right on one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests import oracle

N_TRAIN, N_QUERY, CLASSES = 13, 7, 3
TRAIN_BATCH, QUERY_BATCH = 5, 4  # 5 + 5 + 3 and 4 + 3


class Classifier(nn.Module):
    """Token ids to class logits by a Hugging Face decoder, read at the last token."""

    def __init__(self) -> None:
        super().__init__()
        import transformers

        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
            attn_implementation="eager",
        )  # fmt: skip
        self.body = transformers.LlamaModel(config)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        # explicit additive causal mask and positions: vmap cannot trace how they are made
        length = ids.shape[1]
        full = torch.full((length, length), -1e9, dtype=self.head.weight.dtype)
        mask = full.triu(1)[None, None]
        hidden = self.body(
            input_ids=ids, attention_mask=mask,
            position_ids=torch.arange(length)[None], use_cache=False,
        ).last_hidden_state  # fmt: skip
        return self.head(hidden[:, -1])


@dataclass
class Case:
    """A model, the parameters to attribute, data as (x, y), and the truth about them."""

    model: nn.Module
    names: list[str]
    train: TensorDataset
    query: TensorDataset

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        return DataLoader(self.train, TRAIN_BATCH), DataLoader(self.query, QUERY_BATCH)

    def float(self) -> Case:
        """The same in fp32, for hosts that know nothing else."""
        train, query = (
            TensorDataset(*(t.float() if t.is_floating_point() else t for t in data.tensors))
            for data in (self.train, self.query)
        )
        return Case(self.model.float(), self.names, train, query)

    def raw(self, data: TensorDataset) -> dict[str, Tensor]:
        """{parameter: (n, *shape)}: one backward pass per sample."""
        parameters = dict(self.model.named_parameters())
        chosen = [parameters[name] for name in self.names]
        rows: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for x, y in data:
            loss = nn.functional.cross_entropy(self.model(x[None]), y[None])
            for name, grad in zip(self.names, torch.autograd.grad(loss, chosen), strict=True):
                rows[name].append(grad.detach())
        return {name: torch.stack(grads) for name, grads in rows.items()}

    def blocks(self, data: TensorDataset) -> dict[str, Tensor]:
        """{block: (n, r, d)}, LoRA B transposed, a vector as one row."""
        return {name: as_block(name, grad) for name, grad in self.raw(data).items()}

    def influence(self, method: str, damping: oracle.Damping | None = None) -> Tensor:
        """(query, train) in our sign, from the fp64 oracle."""
        values = oracle.influence(self.blocks(self.train), self.blocks(self.query), method, damping)
        return torch.from_numpy(values)


def as_block(name: str, grad: Tensor) -> Tensor:
    if grad.ndim == 2:
        return grad[:, None]
    return grad.mT if "lora_B" in name else grad


def mlp(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    data = TensorDataset(torch.randn(20, 6, dtype=dtype), torch.randint(0, CLASSES, (20,)))
    return _case(model.to(dtype), [n for n, _ in model.named_parameters()], data)


def transformer(dtype: torch.dtype = torch.float64) -> Case:
    import peft

    base = Classifier()
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(1, 31, (20, 6))
    data = TensorDataset(ids, torch.randint(0, CLASSES, (20,)))
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    return _case(model.to(dtype), names, data)


def _case(model: nn.Module, names: list[str], data: TensorDataset) -> Case:
    model.eval()
    parts = (TensorDataset(*(t[part] for t in data.tensors))
             for part in (slice(0, N_TRAIN), slice(N_TRAIN, None)))  # fmt: skip
    return Case(model, names, *parts)


CASES: dict[str, Callable[[], Case]] = {"mlp": mlp, "lora transformer": transformer}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest entry."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())

"""One small random model of every family, its rows, and how they are padded into a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers as hf
from torch import Tensor, nn

Row = dict[str, Tensor]
VOCABULARY = 61
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
FILL = {"labels": -100}


@dataclass(frozen=True, eq=False)
class Family:
    """A model's class with a configuration, the loss that fits it, and rows without padding."""

    name: str
    make: Callable[[], nn.Module]
    loss: str
    row: Callable[[int], Row]
    targets: Any
    # columns whose rows are joined instead of padded and stacked
    joined: tuple[str, ...] = ()
    padded: bool = True
    task: str | None = None
    experts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {self.loss}"

    def tuned(self, **lora: Any) -> nn.Module:
        torch.manual_seed(0)
        options = {
            "r": 2, "init_lora_weights": False, "task_type": self.task,
            "target_modules": self.targets, "target_parameters": self.experts or None,
        }  # fmt: skip
        config = peft.LoraConfig(**(options | lora))
        return peft.get_peft_model(self.make(), config).eval()

    def collate(self, rows: Sequence[Row], side: str) -> Row:
        batch = {}
        for key in rows[0]:
            parts = [row[key] for row in rows]
            if key in self.joined:
                batch[key] = torch.cat(parts)
                continue
            width = max(part.shape[1] for part in parts) if parts[0].ndim > 1 else 0
            # the decoder of an encoder-decoder has its padding on the right, whatever the encoder
            left = side == "left" and not (key == "labels" and self.loss == "seq2seq_lm")
            batch[key] = torch.cat([_padded(p, width, left, FILL.get(key, 0)) for p in parts])
        return batch


def _padded(part: Tensor, width: int, left: bool, fill: int) -> Tensor:
    if part.ndim != 2 or part.is_floating_point():
        return part
    missing = width - part.shape[1]
    return nn.functional.pad(part, (missing, 0) if left else (0, missing), value=fill)


def _draw(seed: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 50, (1, length), generator=generator)


def _text(i: int) -> Row:
    ids = _draw(i, (9, 5, 7)[i])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def causal_row(i: int) -> Row:
    row = _text(i)
    labels = row["input_ids"].clone()
    labels[:, :2] = -100
    return row | {"labels": labels}


def masked_row(i: int) -> Row:
    row = _text(i)
    labels = torch.full_like(row["input_ids"], -100)
    labels[0, 1], labels[0, -1] = 7 + i, 11
    return row | {"labels": labels}


def seq2seq_row(i: int) -> Row:
    return _text(i) | {"labels": _draw(10 + i, (4, 6, 3)[i])}


def class_row(i: int) -> Row:
    return _text(i) | {"labels": torch.tensor([i])}


def tagged_row(i: int) -> Row:
    row = _text(i)
    labels = row["input_ids"] % 3
    labels[0, 0] = -100
    return row | {"labels": labels}


def _image(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def audio_row(i: int) -> Row:
    return {"input_features": _image(i, 1, 8, 40), "labels": _draw(10 + i, (4, 6, 3)[i])}


def image_row(i: int) -> Row:
    return {"pixel_values": _image(i, 1, 3, 8, 8), "labels": torch.tensor([i])}


def llava_row(i: int) -> Row:
    """Two images in the first row, one in the second, none in the third: three for three rows."""
    images = (2, 1, 0)[i]
    pictures = torch.tensor([[55] * 4 * images], dtype=torch.long)
    ids = torch.cat([_draw(i, 2), pictures, _draw(20 + i, (4, 6, 5)[i])], 1)
    labels = ids.clone()
    labels[:, : 3 + 4 * images] = -100
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": _image(i, images, 3, 8, 8),
    }  # fmt: skip


def qwen_row(i: int) -> Row:
    """One picture of 16 patches, 4 tokens of the text."""
    picture = torch.tensor([[52, 55, 55, 55, 55, 53]])
    ids = torch.cat([_draw(i, 2), picture, _draw(20 + i, (4, 6, 3)[i])], 1)
    labels = ids.clone()
    labels[:, :8] = -100
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "mm_token_type_ids": (ids == 55).long(), "pixel_values": _image(i, 16, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip


def _decoder(name: str, config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(hf, name)(copy.deepcopy(config))


def _bert(name: str, labels: int = 3) -> Callable[[], nn.Module]:
    kind = name.partition("For")[0]
    options = TEXT | SIZES | {"num_attention_heads": 4, "num_labels": labels}
    if kind == "Roberta":
        options["pad_token_id"] = 0
    return lambda: getattr(hf, name)(getattr(hf, f"{kind}Config")(**options))


BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
QUERY_VALUE = ["q_proj", "v_proj"]
QWEN_TEXT = TEXT | SIZES | HEADS | {
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
}  # fmt: skip

FAMILIES = [
    Family("Llama", _decoder("LlamaForCausalLM", hf.LlamaConfig(**TEXT, **SIZES, **HEADS)),
           "causal_lm", causal_row, QUERY_VALUE),
    Family("Qwen2", _decoder("Qwen2ForCausalLM", hf.Qwen2Config(**TEXT, **SIZES, **HEADS)),
           "causal_lm", causal_row, QUERY_VALUE),
    Family("Qwen3", _decoder("Qwen3ForCausalLM", hf.Qwen3Config(**TEXT, **SIZES, **HEADS,
           head_dim=8)), "causal_lm", causal_row, QUERY_VALUE),
    Family("Gemma 3", _decoder("Gemma3ForCausalLM", hf.Gemma3TextConfig(**TEXT, **SIZES, **HEADS,
           head_dim=8, sliding_window=4)), "causal_lm", causal_row, QUERY_VALUE),
    Family("GPT-2", _decoder("GPT2LMHeadModel", hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32,
           n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)),
           "causal_lm", causal_row, ["c_attn"]),
    Family("Mixtral", _decoder("MixtralForCausalLM", hf.MixtralConfig(**TEXT, **SIZES, **HEADS,
           num_local_experts=4)), "causal_lm", causal_row, QUERY_VALUE),
    Family("Mixtral, its experts", _decoder("MixtralForCausalLM", hf.MixtralConfig(**TEXT, **SIZES,
           **HEADS, num_local_experts=4)), "causal_lm", causal_row, ["q_proj"],
           experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
    Family("Bloom", _decoder("BloomForCausalLM", hf.BloomConfig(vocab_size=VOCABULARY,
           hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
           "causal_lm", causal_row, ["query_key_value"]),
    Family("Mamba", _decoder("MambaForCausalLM", hf.MambaConfig(vocab_size=VOCABULARY,
           hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0)),
           "causal_lm", causal_row, ["in_proj"]),
    Family("BERT", _bert("BertForMaskedLM"), "masked_lm", masked_row, ["query", "value"]),
    Family("RoBERTa", _bert("RobertaForMaskedLM"), "masked_lm", masked_row, ["query", "value"]),
    Family("BERT", _bert("BertForSequenceClassification"), "sequence_classification", class_row,
           ["query", "value"], task="SEQ_CLS"),
    Family("BERT", _bert("BertForTokenClassification"), "token_classification", tagged_row,
           ["query", "value"], task="TOKEN_CLS"),
    Family("T5", _decoder("T5ForConditionalGeneration", hf.T5Config(vocab_size=VOCABULARY,
           d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0,
           pad_token_id=0)), "seq2seq_lm", seq2seq_row, ["q", "v"]),
    Family("BART", _decoder("BartForConditionalGeneration", hf.BartConfig(**BART,
           max_position_embeddings=64)), "seq2seq_lm", seq2seq_row, QUERY_VALUE),
    Family("Whisper", _decoder("WhisperForConditionalGeneration", hf.WhisperConfig(**BART,
           num_mel_bins=8, max_source_positions=20, max_target_positions=32)),
           "seq2seq_lm", audio_row, QUERY_VALUE, padded=False),
    Family("ViT", _decoder("ViTForImageClassification", hf.ViTConfig(**VISION, num_labels=3)),
           "sequence_classification", image_row, QUERY_VALUE, padded=False),
    Family("LLaVA", _decoder("LlavaForConditionalGeneration", hf.LlavaConfig(
           vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
           text_config=hf.LlamaConfig(**TEXT, **SIZES, **HEADS), image_token_index=55,
           image_token_id=55, vision_feature_select_strategy="default", vision_feature_layer=-1)),
           "causal_lm", llava_row, QUERY_VALUE, joined=("pixel_values",)),
    Family("Qwen2-VL", _decoder("Qwen2VLForConditionalGeneration", hf.Qwen2VLConfig(
           text_config=QWEN_TEXT, vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2,
           "hidden_size": 32, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
           "temporal_patch_size": 2, "in_channels": 3}, image_token_id=55, video_token_id=51,
           vision_start_token_id=52, vision_end_token_id=53)),
           "causal_lm", qwen_row, ["q_proj", "v_proj", "qkv"],
           joined=("pixel_values", "image_grid_thw")),
]  # fmt: skip


def own_gradients(model: nn.Module, rows: Sequence[Row], scale: float = 1.0) -> dict[str, Tensor]:
    """Autograd of the model's own loss times its count, one unpadded row at a time, in fp64."""
    trained = ("lora_", "modules_to_save")
    parameters = {
        n: p for n, p in model.named_parameters() if p.ndim > 1 and any(t in n for t in trained)
    }
    found: dict[str, list[Tensor]] = {n: [] for n in parameters}
    dtype = next(model.parameters()).dtype
    for row in rows:
        model.zero_grad()
        given = {
            k: v.to(dtype) if v.is_floating_point() else v for k, v in row.items() if v.numel()
        }
        loss = model(**given).loss * _count(model, row["labels"]) * scale
        loss.backward()
        for n, p in parameters.items():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            grad = grad.double() / scale
            found[n].append(grad.mT if ".lora_B." in n else grad)
    model.zero_grad()
    return {n: torch.stack(g) for n, g in found.items()}


def _count(model: Any, labels: Tensor) -> int:
    """What the model's own loss of one row is averaged over."""
    base = model.get_base_model()
    if labels.ndim == 1:
        return 1
    if base.config.is_encoder_decoder or "ForMaskedLM" in type(base).__name__:
        return int((labels != -100).sum())
    shifted = "ForTokenClassification" not in type(base).__name__
    return int((labels[:, 1:] if shifted else labels).ne(-100).sum())

"""Saved folders as a person has them: tiny models with tokenizers, trained adapters, rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SENTENCE = ("add", "take", "double", "of", "the", "and", "film", "book", "song", "meal", "was")
OPINION = ("good", "bad", "fine", "poor", "not", "very")
WORDS = (*NUMBERS, *SENTENCE, *OPINION)
SPECIAL = ("<pad>", "<unk>", "<end>", "[CLS]", "[SEP]")
POSITIONS = 32


# every turn on a line of its own, tools in front, calls after what is said
CHAT = (
    "{% if tools %}the {{ tools[0].function.name }} <end> {% endif %}"
    "{% for m in messages %}{{ m.role }} : {{ m.content }}"
    "{% for c in m.tool_calls or [] %} take {{ c.function.arguments.of }}{% endfor %} <end> "
    "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


def save_tokenizer(folder: Path, *, marks: bool = False, end: bool = True) -> None:
    """One token a word; with BERT's marks around a text, or a token that ends it and a template."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    inner = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>"}
    if marks:
        inner.post_processor = TemplateProcessing(
            "[CLS] $A [SEP]",
            special_tokens=[(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")],
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    elif end:
        names |= {"eos_token": "<end>", "chat_template": CHAT}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder)


def save_llama(
    folder: Path, *, layers: int = 2, hidden: int = 16, words: int | None = None, end: bool = True
) -> Path:
    """A causal language model of `words` tokens, by default those of its tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words or len(SPECIAL) + len(WORDS), hidden_size=hidden,
        intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=POSITIONS, pad_token_id=0, eos_token_id=2,
        bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, end=end)
    return folder


def save_bert(folder: Path, *, labels: int = 2) -> Path:
    """A sequence classifier."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=POSITIONS,
        num_labels=labels, pad_token_id=0,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder, marks=True)
    return folder


def save_t5(folder: Path) -> Path:
    """A model with encoder and decoder."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(SPECIAL) + len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2,
        num_heads=2, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(folder: Path, model: Path, *, trained: bool = True) -> Path:
    """A LoRA adapter of rank 2 for a saved model, its B away from zero when `trained`."""
    if "Bert" in (model / "config.json").read_text(encoding="utf-8"):
        base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    elif "T5" in (model / "config.json").read_text(encoding="utf-8"):
        base = transformers.AutoModelForSeq2SeqLM.from_pretrained(model)
        config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", r=2, target_modules=["q", "v"])
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    tuned = peft.get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name and trained:
            nn.init.normal_(parameter, std=0.3)
    tuned.save_pretrained(folder)
    return folder


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """JSON Lines; a string stands for itself, so that bad lines can be written too."""
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def sums(count: int, name: str, seed: int = 0) -> list[dict[str, str]]:
    """Generation rows of three classes and several lengths, so that batches reorder them."""
    drawn = torch.randint(len(NUMBERS), (count, 3), generator=torch.Generator().manual_seed(seed))
    rows = []
    for i, places in enumerate(drawn.tolist()):
        a, b, c = (NUMBERS[place] for place in places)
        prompt, answer, group = (
            (f"add {a} and {b}", c, "add"),
            (f"take {a} of the {b} and {c}", f"{b} {a}", "take"),
            (f"double {a}", f"{c} {b} {a}", "double"),
        )[i % 3]
        rows.append({"id": f"{name}{i}", "prompt": prompt, "answer": answer, "variation": group})
    return rows


def opinions(
    count: int, seed: int = 0, labels: Sequence[int | str] = (0, 1)
) -> list[dict[str, int | str]]:
    """Classification rows, taking turns: bad words have the first label, good ones the second."""
    drawn = torch.randint(4, (count, 3), generator=torch.Generator().manual_seed(seed))
    words = (("bad", "poor", "not good", "not fine"), ("good", "fine", "not bad", "not poor"))
    things = ("film", "book", "song", "meal")
    return [
        {"text": f"the {things[a]} was {'very ' * b}{words[i % 2][c]}", "label": labels[i % 2]}
        for i, (a, b, c) in enumerate(drawn.tolist())
    ]

"""transformers' Trainer and trl's SFTTrainer: their collators, labels and row order, our scores."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hyperinf_kernels import InputError
from tests import oracle
from tests.integrations.cases import relative_error

pytest.importorskip("transformers", reason="run `make test-integrations`")

import transformers

from hyperinf_kernels.integrations.transformers import InfluenceCallback, attribute
from tests.models import bert_sequence, llama

REASON = "run `make test-integrations`"
COMMON = {
    "per_device_train_batch_size": 5, "per_device_eval_batch_size": 5, "num_train_epochs": 1,
    "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip


class Words(torch.utils.data.Dataset):
    def __init__(self, start: int, count: int) -> None:
        generator = torch.Generator().manual_seed(start)
        self.rows = [
            {"input_ids": torch.randint(1, 61, (length,), generator=generator).tolist()}
            for length in (5 + (start + k) % 4 for k in range(count))
        ]
        for row in self.rows:
            row["labels"] = [-100, -100, *row["input_ids"][2:]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)
    padded = {
        key: torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
        for key, fill in (("input_ids", 0), ("labels", -100))
    }
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return padded | {"attention_mask": mask.long()}


def truth(model: nn.Module, train: Any, query: Any, method: str = "hyperinf") -> Tensor:
    """The oracle on one backward pass per row of {"input_ids", "labels"}, unpadded."""
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    parameters = dict(model.named_parameters())
    model.eval()

    def grads(rows: Any) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {n: [] for n in names}
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits
            loss = nn.functional.cross_entropy(
                logits[0, :-1], torch.tensor(row["labels"][1:]), reduction="sum", ignore_index=-100
            )
            each = torch.autograd.grad(loss, [parameters[n] for n in names])
            for n, g in zip(names, each, strict=True):
                found[n].append(g.mT if "lora_B" in n else g)
        return {n: torch.stack(g) for n, g in found.items()}

    return torch.from_numpy(oracle.influence(grads(train), grads(query), method))


def trainer_of(folder: Path, **changes: Any) -> Any:
    arguments = transformers.TrainingArguments(output_dir=str(folder), **COMMON, **changes)
    return transformers.Trainer(
        llama().double(), arguments, train_dataset=Words(0, 13), data_collator=collate
    )


def test_a_trainer_attributes_with_its_own_collator(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    callback = InfluenceCallback(trainer, Words(50, 7), tmp_path / "scores.parquet")
    trainer.add_callback(callback)
    trainer.train()
    assert callback.scores is not None
    assert (tmp_path / "scores.parquet").exists()
    again = attribute(trainer, Words(50, 7), method="exact")
    for scores, method in ((callback.scores, "hyperinf"), (again, "exact")):
        expected = truth(trainer.model, Words(0, 13).rows, Words(50, 7).rows, method)
        assert relative_error(scores.values, expected) < 1e-6


def test_rows_keep_their_order_and_number_whatever_the_trainers_loaders_do(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, dataloader_drop_last=True, train_sampling_strategy="group_by_length"
    )
    scores = attribute(trainer, Words(50, 7))
    expected = truth(trainer.model, Words(0, 13).rows, Words(50, 7).rows)
    assert relative_error(scores.values, expected) < 1e-6
    assert scores.ids == list(range(13))


def test_a_loss_that_is_not_the_models_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"label_smoothing_factor=0\.1"):
        attribute(trainer_of(tmp_path, label_smoothing_factor=0.1), Words(50, 7))
    trainer = trainer_of(tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.sum()
    with pytest.raises(InputError, match="compute_loss_func"):
        attribute(trainer, Words(50, 7))
    assert attribute(trainer, Words(50, 7), loss="causal_lm").values.shape == (7, 13)

    class Own(transformers.Trainer):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return super().compute_loss(*args, **options) * 2

    own = Own(trainer.model, trainer.args, train_dataset=Words(0, 13), data_collator=collate)
    with pytest.raises(InputError, match=r"Own\.compute_loss"):
        attribute(own, Words(50, 7))
    config = bert_sequence().get_base_model().config
    masked = transformers.Trainer(
        transformers.BertForNextSentencePrediction(config), trainer.args,
        train_dataset=Words(0, 13), data_collator=collate,
    )  # fmt: skip
    with pytest.raises(InputError, match="BertForNextSentencePrediction is not known"):
        attribute(masked, Words(50, 7), blocks="query")


def test_a_collator_that_joins_rows_is_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.data_collator = transformers.DataCollatorWithFlattening()
    with pytest.raises(InputError, match="1 rows of 5 samples"):
        attribute(trainer, Words(50, 7))


WORDS = [f"w{i}" for i in range(50)]
VOCABULARY = {"<pad>": 0, "<unk>": 1, "</s>": 2, "<user>": 3, "<bot>": 4} | {
    word: k + 5 for k, word in enumerate(WORDS)
}
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot> {% generation %}"
    "{{ m['content'] }} </s>{% endgeneration %} {% else %}<user> {{ m['content'] }} {% endif %}"
    "{% endfor %}"
)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    fast.chat_template = TEMPLATE
    return fast


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def documents(kind: str, count: int, seed: int) -> tuple[Any, list[dict[str, list[int]]]]:
    """A data set as trl takes it, and the tokens and labels that it stands for, by hand."""
    Dataset = pytest.importorskip("datasets", reason=REASON).Dataset

    draw = random.Random(seed)
    raw, rows = [], []
    for k in range(count):
        ask, answer = (" ".join(draw.choices(WORDS, k=length)) for length in (3, 2 + k % 3))
        if kind == "completion":
            raw.append({"prompt": ask, "completion": " " + answer + " "})
            parts = [(ids(ask), False), ([*ids(answer), 2], True)]
        elif kind == "assistant":
            turn = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            raw.append({"messages": turn * 2})
            parts = [([3, *ids(ask), 4], False), ([*ids(answer), 2], True)] * 2
        else:
            raw.append({"text": ask + " " + answer + " "})
            parts = [([*ids(ask + " " + answer), 2], True)]
        row: dict[str, list[int]] = {"input_ids": [], "labels": []}
        for tokens, counted in parts:
            row["input_ids"] += tokens
            row["labels"] += tokens if counted else [-100] * len(tokens)
        rows.append(row)
    return Dataset.from_list(raw), rows


def sft(folder: Path, dataset: Any, **changes: Any) -> Any:
    trl = pytest.importorskip("trl", reason=REASON)
    arguments = trl.SFTConfig(
        output_dir=str(folder), bf16=False, **{"max_length": 32, **COMMON, **changes}
    )
    return trl.SFTTrainer(
        llama().double(), arguments, train_dataset=dataset, processing_class=tokenizer()
    )


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("completion", {}),
        ("assistant", {"assistant_only_loss": True}),
        ("text", {"padding_free": True, "max_length": None}),
    ],
)
def test_an_sft_trainers_labels_are_what_is_attributed(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    train, rows = documents(kind, 13, 0)
    queries, query_rows = documents(kind, 7, 1)
    trainer = sft(tmp_path, train, **changes)
    callback = InfluenceCallback(trainer, queries)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.scores is not None
    expected = truth(trainer.model, rows, query_rows)
    assert relative_error(callback.scores.values, expected) < 1e-6
    again = attribute(trainer, queries, train=train, method="datainf")
    expected = truth(trainer.model, rows, query_rows, "datainf")
    assert relative_error(again.values, expected) < 1e-6


def test_packs_have_no_score_but_their_documents_have(tmp_path: Path) -> None:
    train, rows = documents("completion", 13, 0)
    queries, query_rows = documents("completion", 7, 1)
    # shuffled queries would be scores in another order
    trainer = sft(tmp_path, train, packing=True, shuffle_dataset=True)
    trainer.train()
    with pytest.raises(InputError, match="train=documents"):
        attribute(trainer, queries)
    scores = attribute(trainer, queries, train=train)
    assert relative_error(scores.values, truth(trainer.model, rows, query_rows)) < 1e-6


def test_rows_that_truncation_empties_are_named_and_other_losses_asked_for(tmp_path: Path) -> None:
    train, _ = documents("completion", 13, 0)
    queries, _ = documents("completion", 7, 1)
    with pytest.raises(InputError, match="7 of 7 query rows"):
        attribute(sft(tmp_path, train.map(lambda row: {"prompt": "w1"}), max_length=3), queries)
    with pytest.raises(InputError, match="loss_type='dft'"):
        attribute(sft(tmp_path, train, loss_type="dft"), queries)

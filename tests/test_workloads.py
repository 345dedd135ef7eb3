"""Every kind of row from file to scores, against the model's own loss and autograd, row by row."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

import hyperinf_kernels as hk
from hyperinf_kernels import cli
from hyperinf_kernels.errors import InputError
from hyperinf_kernels.workloads import KINDS
from hyperinf_kernels.workloads.batches import Batches
from hyperinf_kernels.workloads.reading import parse_kind, read_rows
from hyperinf_kernels.workloads.rows import Row
from tests import folders
from tests.cli.command import document, scores

Records = list[dict[str, Any]]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def conversations(count: int, seed: int) -> Records:
    """Two turns each of a person and the assistant."""
    rows = []
    for row in folders.sums(count, "c", seed):
        turns = [
            said("user", row["prompt"]),
            said("assistant", row["answer"]),
            said("user", f"and {row['prompt']}"),
            said("assistant", f"the {row['answer']}"),
        ]
        rows.append({"id": row["id"], "variation": row["variation"], "messages": turns})
    return rows


def completions(count: int, seed: int) -> Records:
    return [
        {"id": row["id"], "variation": row["variation"],
         "prompt": row["messages"][:3], "completion": row["messages"][3:]}
        for row in conversations(count, seed)
    ]  # fmt: skip


def texts(count: int, seed: int) -> Records:
    return [
        {"id": row["id"], "variation": row["variation"], "text": f"{row['prompt']} was one"}
        for row in folders.sums(count, "x", seed)
    ]


def pairs(count: int, seed: int) -> Records:
    return [
        {"id": row["id"], "variation": row["variation"], "source": row["prompt"],
         "target": row["answer"]}
        for row in folders.sums(count, "p", seed)
    ]  # fmt: skip


# name: (kind, model, records)
CASES: dict[str, tuple[str, str, Callable[[int, int], Records]]] = {
    "text": ("text", "llama", texts),
    "seq2seq": ("seq2seq", "t5", pairs),
    "chat": ("chat", "llama", conversations),
    "last turn": ("chat:turns=last", "llama", conversations),
    "completion": ("chat", "llama", completions),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    made = {"llama": folders.save_llama(root / "llama"), "t5": folders.save_t5(root / "t5")}
    return made | {
        f"{name}_adapter": folders.save_adapter(root / f"{name}_adapter", path)
        for name, path in made.items()
    }


def tokens_of(case: str, record: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels as one would write them by hand: word by word."""

    def words(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split())

    if case == "text":
        ids = words(f"{record['text']} <end>")
        return ids, ids
    if case == "seq2seq":
        return words(record["source"]), words(f"{record['target']} <end>")
    messages = record.get("messages") or [*record["prompt"], *record["completion"]]
    ids, labels = [], []
    for place, message in enumerate(messages):
        head, body = words(f"{message['role']} :"), words(f"{message['content']} <end>")
        counts = message["role"] == "assistant" and (case == "chat" or place == len(messages) - 1)
        ids += head + body
        labels += [-100] * len(head) + (body if counts else [-100] * len(body))
    return ids, labels


def model_of(site: dict[str, Path], name: str) -> tuple[Any, Any]:
    maker = {"llama": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}
    base = maker[name].from_pretrained(site[name])
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(site[name])
    return peft.PeftModel.from_pretrained(base, site[f"{name}_adapter"]).eval(), tokenizer


def own_losses(case: str, records: Records, model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """The model's own loss of every row alone, times the tokens that it averages over."""
    losses = []
    for record in records:
        ids, labels = tokens_of(case, record, tokenizer)
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        scored = labels if case == "seq2seq" else labels[1:]
        count = sum(label != -100 for label in scored)
        losses.append(model(**batch).loss * count)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_batched_losses_are_the_models_own(
    case: str, site: dict[str, Path], tmp_path: Path
) -> None:
    kind, name, make = CASES[case]
    records = make(9, 0)
    found = read_rows(folders.write_lines(tmp_path / "rows.jsonl", records), kind=parse_kind(kind))
    model, tokenizer = model_of(site, name)
    workload = found.workload
    examples = workload.encode(found.rows, tokenizer, model=model)
    batches = Batches(examples, lambda e: workload.collate(e, 0), 4)
    (loss,) = workload.losses(("answer",), "sum").values()
    (mean,) = workload.losses(("answer",), "mean").values()
    by_id, mean_by_id = {}, {}
    with torch.no_grad():
        for batch in batches:
            values = loss(model, batch)
            by_id |= dict(zip(batch["id"], values.tolist(), strict=True))
            mean_by_id |= dict(zip(batch["id"], mean(model, batch).tolist(), strict=True))
            # a row cut out of the batch is the row
            for i in range(len(values)):
                alone = workload.cut(batch, i)
                assert alone["id"] == [batch["id"][i]]
                torch.testing.assert_close(loss(model, alone), values[i : i + 1])
        own = own_losses(case, records, model, tokenizer)
        counts = []
        for record in records:
            _, labels = tokens_of(case, record, tokenizer)
            scored = labels if case == "seq2seq" else labels[1:]
            counts.append(sum(label != -100 for label in scored))
    wanted = torch.stack(own)
    ids = [record["id"] for record in records]
    torch.testing.assert_close(torch.tensor([by_id[i] for i in ids]), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor([mean_by_id[i] for i in ids]), wanted / torch.tensor(counts),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert len(set(counts)) > 1


def gradients(case: str, records: Records, model: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
    """{block: (n, r, d)} by autograd, one row at a time."""
    blocks = {n: p for n, p in model.named_parameters() if "lora_" in n}
    for parameter in blocks.values():
        parameter.requires_grad_(True)
    rows = []
    for loss in own_losses(case, records, model, tokenizer):
        rows.append(torch.autograd.grad(loss, list(blocks.values())))
    return {
        name: torch.stack([row[i].mT if "lora_B" in name else row[i] for row in rows])
        for i, name in enumerate(blocks)
    }


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["hyperinf", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert isinstance(left.value.code, int)
        return left.value.code

    return run


def files(folder: Path, make: Callable[[int, int], Records]) -> tuple[Records, Records]:
    train, query = make(10, 0), make(4, 1)
    for row in query:
        row["id"] = f"q{row['id']}"
    folders.write_lines(folder / "train.jsonl", train)
    folders.write_lines(folder / "query.jsonl", query)
    return train, query


@pytest.mark.parametrize("case", CASES)
def test_scores_of_the_command_are_those_of_autograd(
    case: str, site: dict[str, Path], tmp_path: Path, command: Callable[..., int]
) -> None:
    kind, name, make = CASES[case]
    train, query = files(tmp_path, make)
    assert command(
        "score", "--model", site[name], "--adapter", site[f"{name}_adapter"], "--train",
        "train.jsonl", "--query", "query.jsonl", "--kind", kind, "-m", "exact", "--batch-size", 4,
        "--output", "out",
    ) == 0  # fmt: skip
    model, tokenizer = model_of(site, name)
    sides = [gradients(case, rows, model, tokenizer) for rows in (train, query)]
    wanted = hk.influence(*sides, "exact").values
    found = scores("out/scores.parquet")
    assert found.train_ids == [row["id"] for row in train]
    assert found.query_ids == [row["id"] for row in query]
    torch.testing.assert_close(found.values, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    shown = document("out")["queries"][0]
    assert shown["class"] == query[0]["variation"]
    prompt, answer = {
        "text": (query[0].get("text"), None),
        "seq2seq": (query[0].get("source"), query[0].get("target")),
    }.get(case, ("user: ", "the "))
    assert shown["prompt"].startswith(prompt)
    assert shown["answer"] == answer or shown["answer"].startswith(answer)


@pytest.mark.parametrize("case", ["text", "seq2seq", "chat"])
def test_a_model_can_be_tuned_on_it(
    case: str, site: dict[str, Path], tmp_path: Path, command: Callable[..., int]
) -> None:
    _, name, make = CASES[case]
    files(tmp_path, make)
    assert command(
        "identify", "--model", site[name], "--train", "train.jsonl", "--query", "query.jsonl",
        "--epochs", 3, "--learning-rate", 0.05, "--batch-size", 4, "-m", "grad_dot",
        "--output", "out",
    ) == 0  # fmt: skip
    skill = document("out")["model"]["skill"]
    assert skill["unit"] == parse_kind(CASES[case][0]).unit
    if case == "text":
        assert 1 < skill["tuned"] < skill["base"]
    assert read_rows("out/train.jsonl").rows == read_rows("train.jsonl").rows


def test_the_skill_on_text_is_its_perplexity(site: dict[str, Path], tmp_path: Path) -> None:
    records = texts(6, 2)
    found = read_rows(folders.write_lines(tmp_path / "t.jsonl", records))
    model, tokenizer = model_of(site, "llama")
    examples = found.workload.encode(found.rows, tokenizer, model=model)
    collate = lambda e: found.workload.collate(e, 0)
    skill = found.workload.skill(model, Batches(examples, collate, 4))
    total = sum(float(x.detach()) for x in own_losses("text", records, model, tokenizer))
    count = sum(len(tokens_of("text", r, tokenizer)[0]) - 1 for r in records)
    assert skill == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)


def test_tool_calls_and_tools_are_part_of_what_the_model_reads(
    site: dict[str, Path], tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "sum", "arguments": '{"of": "three"}'}}
    tools = [{"type": "function", "function": {"name": "book", "parameters": {}}}]
    messages = [said("user", "add one"), said("assistant", None, tool_calls=[call]),
                said("tool", "four"), said("assistant", "nine")]  # fmt: skip
    path = folders.write_lines(tmp_path / "c.jsonl", [{"messages": messages, "tools": tools}])
    _, tokenizer = model_of(site, "llama")
    (example,) = parse_kind("chat").encode(read_rows(path).rows, tokenizer)
    read = tokenizer.convert_ids_to_tokens(example.columns["input_ids"])
    wanted = ("the book <end> <unk> : add one <end> <unk> : take three <end> "
              "<unk> : four <end> <unk> : nine <end>")  # fmt: skip
    assert read == wanted.replace(":", "<unk>").split()
    scored = [t for t, label in zip(read, example.columns["labels"], strict=True) if label != -100]
    assert scored == ["take", "three", "<end>", "nine", "<end>"]


REFUSED = [
    ('{"messages": []}', '"messages" must be a list of messages, but is []'),
    ('{"messages": [{"role": "user", "content": "one"}]}', "has no turn of the assistant"),
    ('{"messages": [{"content": "one"}]}', "must be messages, each with a role"),
    ('{"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}', "images"),
    ('{"prompt": "one", "completion": "two"}', '"prompt" must be a list of messages (for text'),
    ('{"source": "one"}', 'no field "target"'),
    ('{"source": "one", "target": ""}', '"target" is empty'),
    ('{"text": "one", "prompt": "two", "answer": "three", "label": 1}', "choose one kind"),
    ('{"text": "one", "messages": []}', "has text as well as messages; choose one kind"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_rows_that_are_refused_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    path = folders.write_lines(tmp_path / "rows.jsonl", [line])
    with pytest.raises(InputError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line 1: ")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("letter", "unknown, choose one of generation, classification"),
     ("chat:turns=first", "turns must be all or last, got 'first'"),
     ("text:turns=last", "--kind text:turns=last: ")],
)  # fmt: skip
def test_kinds_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_kind(text)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_the_last_is_meant(
    site: dict[str, Path], tmp_path: Path
) -> None:
    path = folders.write_lines(tmp_path / "c.jsonl", conversations(1, 0))
    _, tokenizer = model_of(site, "llama")
    # as templates do that drop the reasoning of all turns but the last
    tokenizer.chat_template = folders.CHAT.replace(
        "{{ m.content }}",
        "{% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}one{% endif %}",
    )
    for kind, well in (("chat", False), ("chat:turns=last", True)):
        found = read_rows(path, kind=parse_kind(kind))
        if well:
            (example,) = found.workload.encode(found.rows, tokenizer)
            labels = example.columns["labels"]
            assert sum(label != -100 for label in labels) == 3
        else:
            with pytest.raises(InputError, match="writes turn 2 differently.*chat:turns=last"):
                found.workload.encode(found.rows, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="with a chat template"):
        found.workload.encode(found.rows, tokenizer)


@pytest.mark.parametrize("tokens", ["prompt", "all"])
def test_choices_of_tokens_that_a_kind_does_not_have(tokens: str) -> None:
    refusing = {"seq2seq", "classification"} | ({"text"} if tokens == "prompt" else set())
    for kind in KINDS:
        if kind.name in refusing:
            with pytest.raises(InputError, match=f"--tokens {tokens}"):
                kind.losses((tokens,), "sum")
        else:
            assert list(kind.losses((tokens,), "sum")) == [tokens]


# --- files


def test_every_format_holds_the_same_rows(tmp_path: Path) -> None:
    records = conversations(6, 0)
    plain = folders.write_lines(tmp_path / "rows.jsonl", records)
    wanted = read_rows(plain)
    content = plain.read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content))
    with pa.output_stream(str(tmp_path / "rows.jsonl.zst"), compression="zstd") as file:
        file.write(content)
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    saved = tmp_path / "saved"
    saved.mkdir()
    for part, half in (("a", table[:4]), ("b", table[4:])):
        with pa.ipc.new_stream(str(saved / f"{part}.arrow"), table.schema) as writer:
            writer.write_table(half)
    state = {"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}]}
    (saved / "state.json").write_text(json.dumps(state))
    (tmp_path / "parts").mkdir()
    folders.write_lines(tmp_path / "parts/1.jsonl", records[:4])
    folders.write_lines(tmp_path / "parts/2.jsonl", records[4:])
    parts = (tmp_path / "parts/1.jsonl", tmp_path / "parts/2.jsonl")
    for sources in (("rows.jsonl.gz",), ("rows.jsonl.zst",), ("rows.parquet",), ("saved",),
                    ("parts/*.jsonl",), parts):  # fmt: skip
        assert read_rows(*(tmp_path / source for source in sources)) == wanted, sources
    swapped = read_rows(*reversed(parts)).rows
    assert [row.id for row in swapped] == [row["id"] for row in records[4:] + records[:4]]


def test_bad_files_are_named(tmp_path: Path) -> None:
    rows = texts(3, 0)
    first = folders.write_lines(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist([{"text": "one"}, {"text": None}]), tmp_path / "t.parquet")
    (tmp_path / "no.parquet").write_bytes(b"PAR0")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n' * 99)[:-20])
    (tmp_path / "empty.jsonl").write_text("")
    cases: list[tuple[tuple[str, ...], str]] = [
        (("t.parquet",), 't.parquet, row 2: "text" must be text, but is null'),
        (("no.parquet",), "no.parquet: not a Parquet file"),
        (("cut.jsonl.gz",), "cut.jsonl.gz: cannot be read"),
        (("*.txt",), "*.txt: no file matches"),
        (("a.jsonl", "empty.jsonl"), "empty.jsonl: the file has no rows"),
        (("a.jsonl", "a.jsonl"), f'id "{rows[0]["id"]}" is already used in line 1'),
    ]
    for sources, said in cases:
        with pytest.raises(InputError) as caught:
            read_rows(*(tmp_path / source for source in sources))
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    other = folders.write_lines(tmp_path / "b.jsonl", [{**rows[1], "text": "two"}])
    with pytest.raises(InputError) as caught:
        read_rows(first, other)
    assert str(caught.value).startswith(f"{other}, line 1: ")
    assert str(caught.value).endswith(f"is already used in {first}, line 2")


def test_a_row_has_no_fields_but_its_own() -> None:
    assert Row("a", {"text": "t"}) == Row("a", {"text": "t"}, None, None)

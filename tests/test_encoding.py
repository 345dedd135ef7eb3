"""Tokens of prompt and answer, by tokenizers of every family, against those of the joined text."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hyperinf_kernels.errors import InputError
from hyperinf_kernels.workloads.classification import Classification
from hyperinf_kernels.workloads.encoding import Encoder, warn_of_difference
from hyperinf_kernels.workloads.prompted import Prompted
from hyperinf_kernels.workloads.rows import Row

CORPUS = [
    "The capital of France is Paris. " * 3,
    "Question: two plus two? Answer: four",
    "The sky is blue.",
] * 20
BEGIN, END, UNKNOWN, TURN = "<s>", "</s>", "<unk>", "<|turn|>"
SPECIAL = [UNKNOWN, BEGIN, END]
FAMILIES = ("bytes", "bytes untrimmed", "legacy", "metaspace", "unmarked", "unigram", "wordpiece")
PAIRS = [
    ("The capital of France is", "Paris."),
    ("Question: two plus two?", "four"),
    ("The sky\nis\n", "blue"),
    ("The sky is ", "blue"),
    ("The sky", " is blue"),
    ("Zoë asks: 天 is?", "\U0001f600 blue"),
    ("two", "two"),
    ("e", "\u0301x"),
]


def asked(name: str, prompt: str, answer: str) -> Row:
    return Row(name, {"prompt": prompt, "answer": answer})


def encode(rows: list[Row], tokenizer: Any, kind: Any = Prompted()) -> list[Any]:  # noqa: B008
    """The columns of every row as attributes."""
    return [SimpleNamespace(**e.columns) for e in kind.encode(rows, tokenizer)]


def inner(family: str) -> Tokenizer:
    """A tokenizer of this family, trained on a few sentences."""
    trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL)
    if family.startswith("bytes"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )  # fmt: skip
        made.decoder = decoders.ByteLevel()
    elif family == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
        made.normalizer = normalizers.BertNormalizer()
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
    elif family == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token=UNKNOWN)
    else:
        made = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True, byte_fallback=False))
        if family == "legacy":  # one word, blanks and all: merges go across the boundary
            made.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            scheme = "first" if family == "metaspace" else "never"
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.train_from_iterator(CORPUS, trainer)
    return made


def build(family: str, begin: bool, end: bool, side: str = "right") -> Any:
    """As a person loads it: with a begin and an end token put around every text, or not."""
    made = inner(family)
    template = f"{BEGIN} " * begin + "$A" + f" {END}" * end
    around = processors.TemplateProcessing(
        single=template, special_tokens=[(name, SPECIAL.index(name)) for name in (BEGIN, END)]
    )
    parts: list[Any] = [around] if begin or end else []
    if family.startswith("bytes"):
        parts.insert(0, processors.ByteLevel(trim_offsets=family == "bytes"))
    if parts:
        made.post_processor = processors.Sequence(parts)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=END,
        padding_side=side,
    )  # fmt: skip


def around(begin: bool, end: bool) -> Any:
    return pytest.param(begin, end, id=f"{'begin' if begin else 'bare'}-{'end' if end else 'open'}")


def letters(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text with nothing put around it: the oracle."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


AROUND = [around(b, e) for b, e in itertools.product((False, True), repeat=2)]


@pytest.mark.filterwarnings("ignore:.*across the boundary")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("begin", "end"), AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_are_those_of_the_joined_text(
    family: str, begin: bool, end: bool, side: str
) -> None:
    tokenizer = build(family, begin, end, side)
    for prompt, answer in PAIRS:
        for given in (prompt, BEGIN + prompt):
            text = f"{given} {answer}"
            (row,) = encode([asked("0", given, answer)], tokenizer)
            wanted = letters(tokenizer, text)
            if begin and given == prompt:
                wanted = [1, *wanted]
            assert row.input_ids == [*wanted, 2]
            assert row.input_ids.count(2) == 1
            assert row.input_ids.count(1) == (begin or given != prompt)
            assert isinstance(row.labels, list)
            start = next(i for i, label in enumerate(row.labels) if label != -100)
            assert row.labels == [-100] * start + row.input_ids[start:]


@pytest.mark.filterwarnings("ignore:.*across the boundary")
@pytest.mark.parametrize(("begin", "end"), AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_starts_with_the_first_token_that_has_a_letter_of_it(
    family: str, begin: bool, end: bool
) -> None:
    """The oracle asks, letter by letter, which token it is in."""
    tokenizer = build(family, begin, end)
    for prompt, answer in PAIRS:
        text = f"{prompt} {answer}"
        found = tokenizer(text, add_special_tokens=False)
        owners = [found.char_to_token(i) for i in range(len(prompt), len(text))]
        first = min(owner for owner in owners if owner is not None)
        # a blank of a token's own that its offsets leave out
        if family == "bytes" and owners[0] is None:
            blank = found.tokens()[first - 1] if first else ""
            first -= bool(blank) and set(blank) == {"Ġ"} and not prompt.endswith((" ", "\n"))
        tokens = Encoder(tokenizer, 2).pair(prompt, answer)
        assert tokens.answer == first + begin, (prompt, tokenizer.convert_ids_to_tokens(tokens.ids))
        if family != "bytes":
            assert tokens.merged == (found.token_to_chars(first).start < len(prompt))


def test_a_merge_across_the_boundary_is_counted_with_the_answer_and_said() -> None:
    tokenizer = build("legacy", True, False)
    rows = [asked(str(i), "The capital of France is", "Paris.") for i in range(3)]
    with pytest.warns(UserWarning, match="across the boundary") as said:
        row = encode(rows, tokenizer)[0]
    (line,) = [str(warning.message) for warning in said]
    assert "\n" not in line
    assert "3 rows have a token across the boundary" in line
    assert "row 0: '▁The▁capital▁of▁France▁is▁Paris.'" in line
    # the one token that is both is in the loss
    assert row.labels == [-100, *row.input_ids[1:]]


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("merge", "prompt", "answer"),
    [
        ("ĠĠ", "a ", ["ĠĠ", "b"]),
        ("aĠ", "a", ["aĠ", "b"]),
        ("Ġb", "a", ["Ġb"]),
        ("", "a", ["Ġ", "b"]),
    ],
)
def test_blanks_that_byte_level_offsets_leave_out_are_counted(
    trim: bool, merge: str, prompt: str, answer: list[str]
) -> None:
    vocabulary = {END: 0, "a": 1, "b": 2, "Ġ": 3} | ({merge: 4} if merge else {})
    made = Tokenizer(models.BPE(vocabulary, [(merge[0], merge[1])] if merge else []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)
    tokens = Encoder(tokenizer, 0).pair(prompt, "b")
    assert tokenizer.convert_ids_to_tokens(tokens.ids[tokens.answer : -1]) == answer
    assert tokens.merged == (merge in ("ĠĠ", "aĠ"))


def test_a_token_that_strips_the_blank_after_it_stays_in_the_prompt() -> None:
    tokenizer = build("bytes", False, False)
    tokenizer.add_tokens([transformers.AddedToken(TURN, rstrip=True, normalized=False)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = encode([asked("0", f"The sky{TURN}", "is blue")], tokenizer)
    start = row.input_ids.index(tokenizer.convert_tokens_to_ids(TURN)) + 1
    assert isinstance(row.labels, list)
    assert row.labels == [-100] * start + row.input_ids[start:]
    assert tokenizer.decode(row.input_ids[start:-1]) == "is blue"


@pytest.mark.parametrize(("begin", "end"), AROUND)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_with_a_label_gets_each_special_token_once(
    family: str, begin: bool, end: bool
) -> None:
    tokenizer = build(family, begin, end)
    texts = ("The sky is", f"{BEGIN}The sky is", f"The sky is{END}", f"{BEGIN}The sky{END}")
    for text in texts:
        (row,) = encode([Row("0", {"text": text, "label": 0})], tokenizer, Classification((0,)))
        assert row.input_ids.count(1) == (begin or BEGIN in text)
        assert row.input_ids.count(2) == (end or END in text)
        plain = letters(tokenizer, text)
        assert [i for i in row.input_ids if i not in (1, 2)] == [
            i for i in plain if i not in (1, 2)
        ]


def test_an_answer_that_ends_with_the_end_token_gets_no_second() -> None:
    for begin, end in itertools.product((False, True), repeat=2):
        tokenizer = build("bytes", begin, end)
        (row,) = encode([asked("0", "The sky is", f"blue{END}")], tokenizer)
        assert row.input_ids.count(2) == 1
        assert row.input_ids[-1] == 2


def test_without_offsets_the_tokens_are_right_or_the_row_is_refused_by_name() -> None:
    slow = transformers.ByT5Tokenizer()
    assert not slow.is_fast
    (row,) = encode([asked("0", "Zoë is", "blue")], slow)
    assert row.input_ids == slow("Zoë is blue")["input_ids"]
    assert row.input_ids.count(slow.eos_token_id) == 1
    assert isinstance(row.labels, list)
    assert slow.decode([i for i in row.labels if i != -100]) == " blue</s>"

    class Merging(transformers.ByT5Tokenizer):
        """One token for the whole text, however long."""

        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return [chr(len(text))]

    with pytest.raises(InputError, match="row 7: the tokenizer Merging tells no character offsets"):
        encode([asked("7", "The sky is", "blue")], Merging())


def test_an_answer_without_tokens_is_refused() -> None:
    # BERT's normaliser drops control characters
    with pytest.raises(InputError, match="row 3: its answer has no token"):
        encode([asked("3", "sky", "\x07")], build("wordpiece", True, True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_batch_is_compared_with_the_joined_text(family: str) -> None:
    tokenizer = build(family, True, False)
    rows = [("a", "The sky is", "blue"), ("b\x1b[31m", "The sky is", "blue")]
    encoder = Encoder(tokenizer, 2)
    right = [encoder.pair(prompt, answer).ids for _, prompt, answer in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_difference(encoder, rows, right)
        warn_of_difference(encoder, rows, [ids[:4] for ids in right])
    # as two texts put end to end
    apart = tokenizer("The sky is")["input_ids"] + tokenizer(" blue")["input_ids"] + [2]
    with pytest.warns(UserWarning, match="other tokens") as said:
        warn_of_difference(encoder, rows, [right[0], apart])
    (line,) = [str(warning.message) for warning in said]
    assert "1 of the first 2 rows" in line
    names = tokenizer.convert_ids_to_tokens
    assert str(names(apart)) in line
    assert str(names(tokenizer("The sky is blue")["input_ids"])) in line
    assert line.count("\n") == 0


def test_long_lists_are_cut_around_the_first_difference() -> None:
    tokenizer = build("bytes", False, False)
    encoder = Encoder(tokenizer, 2)
    prompt = "The sky is blue. " * 30
    right = encoder.pair(prompt, "blue").ids
    wrong = [*right[:40], 2, *right[40:]]
    with pytest.warns(UserWarning, match="other tokens") as said:
        warn_of_difference(encoder, [("a", prompt, "blue")], [wrong])
    line = str(said[0].message)
    assert len(line) < 900
    assert repr(END) in line

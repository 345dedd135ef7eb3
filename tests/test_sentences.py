"""The made-up sentences: right answers, balanced classes, fixed by the seed, no leak to queries."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from hyperinf_kernels.errors import InputError
from hyperinf_kernels.experiments.sentences import CLASSES, Sentence, draw_sentence, generate
from hyperinf_kernels.workloads.rows import Row

PLAIN = Sentence("the shy baker", "hid", "hide", "hidden", "a lamp")
LATER = Sentence("our nurse", "drew", "draw", "drawn", "my kite", "later")

EXPECTED = {
    "reverse words": ("lamp a hid baker shy the", "later kite my drew nurse our"),
    "title case": ("The Shy Baker Hid A Lamp", "Our Nurse Drew My Kite Later"),
    "repeat words": (
        "the the shy shy baker baker hid hid a a lamp lamp",
        "our our nurse nurse drew drew my my kite kite later later",
    ),
    "commas": ("the, shy, baker, hid, a, lamp,", "our, nurse, drew, my, kite, later,"),
    "hyphens": ("the-shy-baker-hid-a-lamp", "our-nurse-drew-my-kite-later"),
    "negation": ("the shy baker did not hide a lamp", "our nurse did not draw my kite later"),
    "question": ("did the shy baker hide a lamp?", "did our nurse draw my kite later?"),
    "future": ("the shy baker will hide a lamp", "our nurse will draw my kite later"),
    "passive": ("a lamp was hidden by the shy baker", "my kite was drawn by our nurse later"),
    "emphasis": (
        "it was the shy baker who hid a lamp",
        "it was our nurse who drew my kite later",
    ),
}


def sentence_of(row: Row) -> str:
    """What stands between the request and the arrow."""
    assert row.content["prompt"].count(": ") == 1
    assert row.content["prompt"].endswith(" ->")
    return row.content["prompt"].split(": ")[1].removesuffix(" ->")


def known_sentences(count: int) -> dict[str, Sentence]:
    rng = random.Random(99)
    return {" ".join(s.words): s for s in (draw_sentence(rng) for _ in range(count))}


def test_each_class_answers_as_written_here() -> None:
    assert [c.name for c in CLASSES] == list(EXPECTED)
    for c in CLASSES:
        assert (c.answer(PLAIN), c.answer(LATER)) == EXPECTED[c.name]


def test_the_ten_answers_to_a_sentence_all_differ() -> None:
    for text, sentence in known_sentences(3000).items():
        answers = {c.answer(sentence) for c in CLASSES}
        assert len(answers | {text}) == 11


def test_requests_name_one_class_each() -> None:
    requests = [request for c in CLASSES for request in c.requests]
    assert len(set(requests)) == len(requests) == 30
    assert all(":" not in r and 2 <= len(r.split()) <= 9 for r in requests)


def test_sentences_are_plain_lower_case_of_five_or_six_words() -> None:
    sentences = known_sentences(5000)
    assert len(sentences) > 4900
    for text, sentence in sentences.items():
        assert all(word.isascii() and word.isalpha() and word.islower() for word in text.split())
        assert len(sentence.words) in (5, 6)
        assert "a" not in sentence.subject.split()
        # An article "a" never stands before a vowel.
        assert not any(f" a {vowel}" in text for vowel in "aeiou")
        assert len({sentence.past, sentence.base}) == 2


def test_rows_are_balanced_distinct_and_do_not_leak() -> None:
    train, query = generate(900, 100, seed=4)
    assert Counter(row.group for row in train) == {c.name: 90 for c in CLASSES}
    assert Counter(row.group for row in query) == {c.name: 10 for c in CLASSES}
    sentences = [sentence_of(row) for row in train + query]
    assert len(set(sentences)) == 1000
    assert len({row.id for row in train + query}) == 1000
    used: dict[str | None, set[str]] = defaultdict(set)
    for row in train:
        used[row.group].add(row.content["prompt"].split(":")[0])
    assert used == {c.name: set(c.requests) for c in CLASSES}
    assert max(len(row.content["prompt"].split()) for row in train) <= 16
    assert max(len(row.content["answer"].split()) for row in train if row.content["answer"]) <= 12


@pytest.mark.parametrize(
    ("n", "corrupt"), [(900, 0.1), (137, 0.25), (20, 1.0), (20, 0.0), (5, 0.5)]
)
def test_corruption_is_exact_even_and_wrong(n: int, corrupt: float) -> None:
    train, query = generate(n, 30, corrupt=corrupt, seed=8)
    # The right answers again, from the same draws without corruption.
    by_name = {c.name: c for c in CLASSES}
    rng = random.Random(8)
    drawn: dict[str, Sentence] = {}
    while len(drawn) < n + 30:
        sentence = draw_sentence(rng)
        drawn.setdefault(" ".join(sentence.words), sentence)
    for row in train + query:
        sentence = drawn[sentence_of(row)]
        assert row.group is not None
        right = by_name[row.group].answer(sentence)
        assert (row.content["answer"] != right) is row.corrupted
        assert row.content["answer"] in [c.answer(sentence) for c in CLASSES]
    assert sum(bool(row.corrupted) for row in train) == round(corrupt * n)
    assert all(row.corrupted is False for row in query)
    share = Counter(row.group for row in train if row.corrupted)
    if n == 900:
        places = [i for i, row in enumerate(train) if row.corrupted]
        assert min(places) < 100
        assert max(places) >= 800
    if corrupt < 1:
        assert max(share.values(), default=0) - min(share[c.name] for c in CLASSES) <= 1


def test_wrong_answers_come_from_all_the_other_classes() -> None:
    train, _ = generate(2000, 0, corrupt=1.0, seed=2)
    questions = sum(
        row.content["answer"] is not None and row.content["answer"].endswith("?") for row in train
    )
    # 1800 rows of other classes, one in nine becomes a question: 200, standard deviation 13.
    assert 140 < questions < 260


def test_the_seed_alone_fixes_the_rows() -> None:
    assert generate(50, 20, seed=1) == generate(50, 20, seed=1)
    first, other = generate(50, 20, seed=1)[0], generate(50, 20, seed=2)[0]
    assert not {sentence_of(row) for row in first} & {sentence_of(row) for row in other}
    code = (
        "from hyperinf_kernels.experiments.sentences import generate;"
        "print([list(map(repr, part)) for part in generate(50, 20, seed=1)])"
    )
    want = str([list(map(repr, part)) for part in generate(50, 20, seed=1)])
    for salt in ("0", "12345"):
        env = {**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == want


def test_thousands_of_rows_and_none() -> None:
    train, query = generate(20_000, 1000, seed=0)
    assert len({sentence_of(row) for row in train + query}) == 21_000
    assert generate(0, 0) == ([], [])


@pytest.mark.parametrize(
    ("n_train", "n_query", "corrupt", "message"),
    [
        (-1, 5, 0.1, "between 0 and"),
        (5, -1, 0.1, "between 0 and"),
        (999_999, 2, 0.1, r"999999 \+ 2"),
        (5, 5, 1.1, r"in \[0, 1\], but is 1.1"),
        (5, 5, float("nan"), r"in \[0, 1\]"),
    ],
)
def test_impossible_requests_are_refused(
    n_train: int, n_query: int, corrupt: float, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generate(n_train, n_query, corrupt=corrupt)

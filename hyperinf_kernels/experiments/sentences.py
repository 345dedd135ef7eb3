"""Made-up questions about sentences, in ten classes: the data of the demo.

Every row shows a short sentence and asks for one transformation of it. A small language model
gets few of them right at first and most after a short fine-tuning, and the class of a row is
known, so one can ask whether the rows that influence a query are rows of its own class. Words and
templates are this project's own; the same seed gives the same rows everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import InputError
from ..workloads.rows import Row

__all__ = ["CLASSES", "Sentence", "Transformation", "draw_sentence", "generate"]

VOCABULARY = """
baker pilot nurse tailor farmer painter sailor teacher waiter clerk dentist gardener plumber singer
lawyer miner barber judge guard student hunter butcher banker poet driver coach scout witch uncle
neighbour

lamp ladder basket kettle drum clock carpet mirror wagon violin bucket candle hammer jacket pillow
bottle saddle camera statue helmet map rope tent chair kite boat sword shovel teapot blanket parcel
whistle

old young tall tired clever shy rich lazy kind proud brave angry quiet happy

red blue green tiny heavy broken dusty cheap shiny wooden new round black

today twice again first later slowly quickly alone outside gladly badly there

the our my his her this that

the a our my his her

sold/sell/sold found/find/found hid/hide/hidden stole/steal/stolen broke/break/broken
drew/draw/drawn took/take/taken chose/choose/chosen lost/lose/lost bought/buy/bought
brought/bring/brought built/build/built kept/keep/kept held/hold/held caught/catch/caught
washed/wash/washed painted/paint/painted carried/carry/carried dropped/drop/dropped
cleaned/clean/cleaned moved/move/moved opened/open/opened packed/pack/packed
borrowed/borrow/borrowed repaired/repair/repaired noticed/notice/noticed
"""
# The verbs are past tense/base form/participle.
AGENTS, THINGS, TRAITS, LOOKS, MANNERS, OWNERS, ARTICLES, VERBS = (
    block.split() for block in VOCABULARY.split("\n\n")
)
MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Sentence:
    """A plain sentence in parts: subject, verb in the past tense, object, and perhaps an adverb."""

    subject: str
    past: str
    base: str
    participle: str
    object: str
    adverb: str = ""

    def build(self, *parts: str) -> str:
        """The parts that are not empty, and then the adverb, joined by spaces."""
        return " ".join(part for part in (*parts, self.adverb) if part)

    @property
    def words(self) -> list[str]:
        return self.build(self.subject, self.past, self.object).split()


@dataclass(frozen=True)
class Transformation:
    """One class: its name, how a prompt may ask for it, and the right answer."""

    name: str
    requests: tuple[str, str, str]
    answer: Callable[[Sentence], str]


CLASSES = (
    Transformation(
        "reverse words",
        ("Reverse the word order", "Put the words in reverse order", "Go from last word to first"),
        lambda s: " ".join(reversed(s.words)),
    ),
    Transformation(
        "title case",
        ("Use title case", "Start each word with a capital", "Capitalise each first letter"),
        lambda s: " ".join(word.capitalize() for word in s.words),
    ),
    Transformation(
        "repeat words",
        ("Say each word twice", "Repeat every word", "Double every word"),
        lambda s: " ".join(f"{word} {word}" for word in s.words),
    ),
    Transformation(
        "commas",
        ("Put a comma after each word", "Add a comma to every word", "Follow words by commas"),
        lambda s: " ".join(f"{word}," for word in s.words),
    ),
    Transformation(
        "hyphens",
        ("Join the words with hyphens", "Put hyphens between words", "Use hyphens, not spaces"),
        lambda s: "-".join(s.words),
    ),
    Transformation(
        "negation",
        ("Make it negative", "Negate the sentence", "Say that it did not happen"),
        lambda s: s.build(s.subject, "did not", s.base, s.object),
    ),
    Transformation(
        "question",
        ("Turn it into a question", "Make a yes or no question", "Ask whether it happened"),
        lambda s: s.build("did", s.subject, s.base, s.object) + "?",
    ),
    Transformation(
        "future",
        ("Use the future tense", "Put it in the future", "Say that it will happen"),
        lambda s: s.build(s.subject, "will", s.base, s.object),
    ),
    Transformation(
        "passive",
        ("Use the passive voice", "Make it passive", "Rewrite in the passive"),
        lambda s: s.build(s.object, "was", s.participle, "by", s.subject),
    ),
    Transformation(
        "emphasis",
        ("Stress who did it", "Put the stress on the doer", "Emphasise who did it"),
        lambda s: s.build("it was", s.subject, "who", s.past, s.object),
    ),
)


def draw_sentence(rng: random.Random) -> Sentence:
    """One sentence of five words, or of six with one adjective or adverb more."""
    extra = rng.choice(("", "trait", "look", "adverb"))
    trait = rng.choice(TRAITS) if extra == "trait" else ""
    look = rng.choice(LOOKS) if extra == "look" else ""
    past, base, participle = rng.choice(VERBS).split("/")
    return Sentence(
        subject=" ".join(f"{rng.choice(OWNERS)} {trait} {rng.choice(AGENTS)}".split()),
        past=past,
        base=base,
        participle=participle,
        object=" ".join(f"{rng.choice(ARTICLES)} {look} {rng.choice(THINGS)}".split()),
        adverb=rng.choice(MANNERS) if extra == "adverb" else "",
    )


def generate(
    n_train: int, n_query: int, *, corrupt: float = 0.1, seed: int = 0
) -> tuple[list[Row], list[Row]]:
    """Train and query rows; row i of either list is of class i mod 10, and no sentence repeats.

    `group` is the class. round(corrupt * n_train) train rows, spread evenly over the classes, get
    the answer of another class to the same sentence and `corrupted=True`; their prompt and group
    stay. Queries are never corrupted. Raises InputError for negative counts, more than a million
    rows, or a fraction outside [0, 1].
    """
    if n_train < 0 or n_query < 0 or n_train + n_query > MOST_ROWS:
        raise InputError(f"rows must number between 0 and {MOST_ROWS}, not {n_train} + {n_query}")
    if not 0.0 <= corrupt <= 1.0:
        raise InputError(f"the fraction of wrong answers must be in [0, 1], but is {corrupt}")
    rng = random.Random(seed)
    sentences: dict[str, Sentence] = {}
    while len(sentences) < n_train + n_query:
        sentence = draw_sentence(rng)
        sentences.setdefault(" ".join(sentence.words), sentence)
    plain = list(sentences.values())
    wrong = _spread(n_train, round(corrupt * n_train), rng)
    train = [_row("train", i, plain[i], rng, i in wrong) for i in range(n_train)]
    query = [_row("query", i, plain[n_train + i], rng, False) for i in range(n_query)]
    return train, query


def _spread(n: int, count: int, rng: random.Random) -> set[int]:
    """`count` random positions below n, as evenly over the classes as can be."""
    positions = rng.sample(range(n), n)
    seen = [0] * len(CLASSES)
    turn = []
    for i in positions:
        turn.append(seen[i % len(CLASSES)])
        seen[i % len(CLASSES)] += 1
    return {i for _, i in sorted(zip(turn, positions, strict=True))[:count]}


def _row(part: str, i: int, sentence: Sentence, rng: random.Random, corrupted: bool) -> Row:
    asked = CLASSES[i % len(CLASSES)]
    request = rng.choice(asked.requests)
    done = rng.choice([c for c in CLASSES if c is not asked]) if corrupted else asked
    return Row(
        id=f"{part}-{i}",
        content={
            "prompt": f"{request}: {' '.join(sentence.words)} ->",
            "answer": done.answer(sentence),
        },
        group=asked.name,
        corrupted=corrupted,
    )

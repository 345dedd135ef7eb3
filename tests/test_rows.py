"""Reading and writing rows: every bad input gives one line that names the place."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperinf_kernels.errors import InputError
from hyperinf_kernels.experiments.mislabeled import flip_labels
from hyperinf_kernels.workloads.reading import parse_kind, write_rows
from hyperinf_kernels.workloads.reading import read_rows as read_set
from hyperinf_kernels.workloads.rows import Fields, Row

ASK = '{"prompt": "p1", "answer": "a1"}'
TEXT = '{"text": "t1", "label": 1}'


def asked(
    name: str, prompt: str, answer: str | None = None, label: int | str | None = None,
    group: str | None = None, corrupted: bool | None = None,
) -> Row:  # fmt: skip
    """A row with an answer, or with a label only."""
    content = {"prompt": prompt, "answer": answer, "label": label}
    if answer is None and label is not None:
        content = {"text": prompt, "label": label}
    kept = {field: value for field, value in content.items() if value is not None}
    return Row(name, kept, group, corrupted)


def read_rows(
    path: str | Path, *, fields: Fields | None = None, kind: str | None = None
) -> list[Row]:
    return read_set(path, fields=fields, kind=None if kind is None else parse_kind(kind)).rows


def save(folder: Path, *lines: str) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return path


def test_generation_rows(tmp_path: Path) -> None:
    path = save(
        tmp_path,
        '{"prompt": "p1", "answer": "a1", "variation": "g", "corrupted": true, "other": [1]}',
        '{"prompt": "p2", "answer": -49, "variation": 3}',
        '{"prompt": "p3", "answer": 2.5, "variation": null, "corrupted": null}',
    )
    assert read_rows(path) == [
        asked("0", "p1", "a1", None, "g", True),
        asked("1", "p2", "-49", None, "3", None),
        asked("2", "p3", "2.5", None, None, None),
    ]


def test_classification_rows_and_own_field_names(tmp_path: Path) -> None:
    assert read_rows(save(tmp_path, '{"text": "t", "label": 0}', '{"text": "u", "label": 7}')) == [
        asked("0", "t", label=0),
        asked("1", "u", label=7),
    ]
    path = save(tmp_path, '{"s": "t", "y": "good", "key": 41, "kind": "film"}')
    fields = Fields(text="s", label="y", id="key", group="kind")
    assert read_rows(str(path), fields=fields) == [asked("41", "t", label="good", group="film")]


def test_kind_settles_a_file_that_has_both_pairs(tmp_path: Path) -> None:
    path = save(tmp_path, '{"prompt": "p", "answer": "a", "text": "t", "label": 2}')
    with pytest.raises(InputError, match="line 1: has prompt and answer as well as text and label"):
        read_rows(path)
    assert read_rows(path, kind="generation") == [asked("0", "p", "a", 2)]
    assert read_rows(path, kind="classification") == [asked("0", "t", label=2)]


def test_line_ends_blank_tail_mark_and_separators(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "one\u2028two\x85 \u00e9\U0001f600"
    rows = [json.dumps({"text": text, "label": i}, ensure_ascii=False) for i in (0, 1)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\n  \n\n")
    assert [row.content["text"] for row in read_rows(path)] == [text, text]


BAD_LINES = [
    ([ASK, '{"prompt": "p" "answer": 1}'], "line 2: not valid JSON: Expecting ',' delimiter"),
    ([ASK, "", ASK], "line 2: blank, but rows follow"),
    (["[", "{}", "]"], "line 1: not valid JSON"),
    (["[1, 2]"], "line 1: one JSON object a line is needed, but this is [1, 2]"),
    (["null"], "line 1: one JSON object a line is needed, but this is null"),
    (['"' + "x" * 99 + '"'], "this is \"" + "x" * 56 + "..."),
    (["[" * 100_000], "line 1: not usable JSON"),
    (["9" * 5000], "line 1: not usable JSON"),
    ([ASK, '{"prompt": "p", "variation": "g"}'],
     'line 2: no field "answer"; the fields there are: "prompt", "variation"'),
    (['{"label": 1}'], 'line 1: no field "text"; the fields there are: "label"'),
    (["{}"], 'no field "prompt" and "answer", or "text" and "label", or "text", or "source" and '
     '"target", or "messages"; the fields there are: none'),
    ([json.dumps(dict.fromkeys("abcdefghij"))], '"a", "b", "c", "d", "e", "f", "g", "h", ...'),
    ([ASK, TEXT], "line 2: a classification row, but line 1 is a generation row"),
    ([TEXT, ASK], "line 2: a generation row, but line 1 is a classification row"),
    (['{"prompt": 3, "answer": "a"}'], '"prompt" must be text, but is 3'),
    (['{"prompt": "p", "answer": null}'], '"answer" must be text or a number, but is null'),
    (['{"prompt": "p", "answer": true}'], '"answer" must be text or a number, but is true'),
    (['{"prompt": "p", "answer": NaN}'], '"answer" must be text or a number, but is NaN'),
    (['{"prompt": "p", "answer": ["a"]}'], '"answer" must be text or a number, but is ["a"]'),
    (['{"prompt": " \\n", "answer": "a"}'], 'line 1: "prompt" is empty'),
    (['{"prompt": "p", "answer": ""}'], 'line 1: "answer" is empty'),
    (['{"text": "t", "label": ""}'], 'line 1: "label" is empty'),
    (['{"text": "t", "label": true}'], '"label" must be a whole number or text, but is true'),
    (['{"text": "t", "label": 1.0}'], '"label" must be a whole number or text, but is 1.0'),
    (['{"text": "t", "label": null}'], '"label" must be a whole number or text, but is null'),
    ([TEXT, '{"text": "t", "label": "1"}'], 'line 2: "label" is text in one row, a number in'),
    (['{"text": "a\\ud800", "label": 1}'], '"text" has half of a surrogate pair'),
    (['{"text": "t", "label": 1, "corrupted": 1}'], '"corrupted" must be true, false or null'),
    (['{"text": "t", "label": 1, "variation": {}}'], '"variation" must be text or a number'),
    (['{"text": "t", "label": 1, "id": null}'], '"id" must be text or a number, but is null'),
    (['{"text": "t", "label": 1, "id": 5}', TEXT], 'line 2: give "id" in every row or in none'),
    ([TEXT, '{"text": "t", "label": 1, "id": 5}'], 'line 2: give "id" in every row or in none'),
    (['{"text": "t", "label": 1, "id": 5}', '{"text": "u", "label": 0, "id": "5"}'],
     'line 2: id "5" is already used in line 1'),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message"), BAD_LINES)
def test_bad_rows_name_file_line_and_problem(
    tmp_path: Path, lines: list[str], message: str
) -> None:
    path = save(tmp_path, *lines)
    with pytest.raises(InputError) as caught:
        read_rows(path)
    text = str(caught.value)
    assert text.startswith(f"{path}, line ")
    assert message in text
    assert "\n" not in text
    assert len(text) < len(str(path)) + 200


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(InputError, match=r"data\.jsonl: cannot be read \(No such file"):
        read_rows(path)
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)$"):
        read_rows(tmp_path)
    for content in (b"", b"\n\n \n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"data\.jsonl: the file has no rows$"):
            read_rows(path)
    path.write_bytes(TEXT.encode() + b'\n{"text": "caf\xe9", "label": 1}\n')
    with pytest.raises(InputError, match=r"line 2: not UTF-8 text \(byte 14 of the line\)$"):
        read_rows(path)


clean = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
maybe = {"group": st.none() | clean, "corrupted": st.none() | st.booleans()}
answered = st.builds(
    asked, name=clean, prompt=clean, answer=clean, label=st.none() | st.integers() | clean, **maybe
)
labelled = st.builds(asked, name=clean, prompt=clean, label=st.integers(), **maybe)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(answered, min_size=1, max_size=5, unique_by=lambda row: row.id)
    | st.lists(labelled, min_size=1, max_size=5, unique_by=lambda row: row.id)
)
def test_what_is_written_is_read_back(
    rows: list[Row], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "out.jsonl"
    fields = Fields(prompt="question", text="body", group="class")
    for chosen in (None, fields):
        write_rows(rows, path, fields=chosen)
        assert read_rows(path, fields=chosen) == rows
    assert os.listdir(path.parent) == ["out.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    write_rows([asked("0", "old", "a")], path)
    with pytest.raises(UnicodeEncodeError):
        write_rows([asked("0", "new", "a"), asked("1", "\ud800", "a")], path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, full)
            with pytest.raises(InputError, match=r"out\.jsonl: cannot be written \(No space left"):
                write_rows([asked("0", "new", "a")], path)
    assert [row.content["prompt"] for row in read_rows(path)] == ["old"]
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("absent/out.jsonl", "file/out.jsonl", "folder"):
        with pytest.raises(InputError, match=r"cannot be written \("):
            write_rows([asked("0", "p", "a")], tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.parametrize(
    "rows", [[], [asked("0", "p", "a"), asked("1", "p", label=1)], [asked("0", "p")]]
)
def test_rows_that_could_not_be_read_back_are_not_written(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"at least one row|neither answer nor label"):
        write_rows(rows, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == []


def labels_of(n: int, *labels: int | str) -> list[Row]:
    return [asked(str(i), f"text {i}", label=labels[i % len(labels)]) for i in range(n)]


@pytest.mark.parametrize(("n", "fraction"), [(10, 0.2), (100, 0.336), (7, 1.0), (7, 0.0), (0, 0.5)])
@pytest.mark.parametrize("labels", [(0, 1), ("a", "b", "c")])
def test_flip_changes_exactly_the_asked_share(
    n: int, fraction: float, labels: tuple[int | str, ...]
) -> None:
    rows = labels_of(n, *labels)
    flipped = flip_labels(rows, fraction, seed=3)
    changed = [a.content != b.content for a, b in zip(rows, flipped, strict=True)]
    assert sum(changed) == round(fraction * n)
    assert [row.corrupted for row in flipped] == changed
    assert {row.content["label"] for row in flipped} <= set(labels)
    assert [(r.id, r.content["text"]) for r in flipped] == [(r.id, r.content["text"]) for r in rows]
    assert all(row.corrupted is None for row in rows)


def test_flip_is_fixed_by_its_seed_and_reaches_all_rows_and_labels() -> None:
    rows = labels_of(40, "a", "b", "c")
    assert flip_labels(rows, 0.25, seed=1) == flip_labels(rows, 0.25, seed=1)
    picks = [flip_labels(rows, 0.25, seed=s) for s in range(60)]
    hits = Counter(row.id for pick in picks for row in pick if row.corrupted)
    # 600 draws over 40 rows: 15 each, standard deviation 3.4.
    assert len(hits) == 40
    assert max(hits.values()) < 35
    moves = Counter(
        (old.content["label"], new.content["label"])
        for pick in picks
        for old, new in zip(rows, pick, strict=True)
        if new.corrupted
    )
    assert len(moves) == 6
    assert min(moves.values()) > 60


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (labels_of(4, 0, 1), 1.5, r"in \[0, 1\], but is 1.5"),
        (labels_of(4, 0, 1), -0.1, r"in \[0, 1\]"),
        (labels_of(4, 0, 1), float("nan"), r"in \[0, 1\]"),
        (labels_of(4, 0), 0.5, "at least two labels, but there is 1"),
        ([asked("x", "p", "a")], 0.0, "row x has no label"),
        ([asked("y", "p", label=1, corrupted=True)], 0.0, "row y has no label, or a corrupted one"),
    ],
)
def test_flip_refuses_what_it_cannot_do(rows: list[Row], fraction: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        flip_labels(rows, fraction, seed=0)


def test_a_model_that_names_its_labels_decides_their_order() -> None:
    from types import SimpleNamespace

    from hyperinf_kernels.workloads.classification import class_order

    model = SimpleNamespace(config=SimpleNamespace(label2id={"positive": 0, "negative": 1}))
    assert class_order(model, ["negative", "positive"]) == ["positive", "negative"]
    assert class_order(model, ["no", "yes"]) == ["no", "yes"]
    assert class_order(SimpleNamespace(), ["b", "a"]) == ["b", "a"]

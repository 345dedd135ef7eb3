"""InfluenceScores: ranking, reordering, and the files it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import hyperinf_kernels as hk
from hyperinf_kernels.attribution.scores import DensePanel, TopKPanel
from hyperinf_kernels.store.files import atomic, write_json


def scores(per_block: bool = False, **options: object) -> hk.InfluenceScores:
    generator = torch.Generator().manual_seed(0)
    train = {b: torch.randn(9, 2, 3, generator=generator) for b in ("a", "b")}
    query = {b: torch.randn(2, 2, 3, generator=generator) for b in ("a", "b")}
    return hk.influence(
        train, query, train_ids=[f"t{i}" for i in range(9)], query_ids=["x", "y"],
        per_block=per_block, **options,
    )  # fmt: skip


def test_proponents_are_the_most_negative_and_opponents_the_largest() -> None:
    s = scores()
    for q in range(2):
        order = sorted(range(9), key=lambda k: float(s.values[q, k]))
        assert s.proponents(3).ids[q] == [f"t{k}" for k in order[:3]]
        assert s.opponents(3).ids[q] == [f"t{k}" for k in order[::-1][:3]]
    assert s.proponents(99).values.shape == (2, 9)


def test_ties_go_to_the_earlier_example_however_the_stream_was_cut() -> None:
    values = torch.tensor([[1.0, -2.0, 1.0, -2.0, 0.0, 1.0, -2.0]])
    ids = list("abcdefg")
    dense = DensePanel(1)
    dense.add(ids, values)
    for cuts in ((7,), (1, 6), (3, 3, 1), (1,) * 7):
        panel = TopKPanel(1, 2)
        start = 0
        for size in cuts:
            panel.add(ids[start : start + size], values[:, start : start + size])
            start += size
        kept = panel.finish()
        assert kept["ids"] == [["b", "d"]]
        assert kept["harmful"].ids == [["a", "c"]]


def test_aligned_reorders_rows_columns_and_blocks() -> None:
    s = scores(per_block=True)
    order = [f"t{i}" for i in (4, 0, 8, 2, 1, 3, 5, 7, 6)]
    moved = s.aligned(order, ["y", "x"])
    for q, name in ((0, "y"), (1, "x")):
        for k, train_id in enumerate(order):
            want = s.values[s.query_ids.index(name), s.ids.index(train_id)]
            assert moved.values[q, k] == want
    total = sum(moved.per_block.values())
    assert torch.allclose(total, moved.values, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="no train row is called 'nobody'"):
        s.aligned(["nobody"], ["x"])


def test_parquet_holds_every_score_and_the_split(tmp_path: Path) -> None:
    s = scores(per_block=True)
    s.to_parquet(tmp_path / "s.parquet")
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    assert len(rows) == 18
    for row in rows:
        q, k = s.query_ids.index(row["query_id"]), s.ids.index(row["train_id"])
        assert row["influence"] == float(s.values[q, k])
        assert row["a"] + row["b"] == pytest.approx(row["influence"], rel=1e-4, abs=1e-5)


def test_parquet_of_top_k_holds_both_ends_once(tmp_path: Path) -> None:
    dense, kept = scores(), scores(top_k=6)
    kept.to_parquet(tmp_path / "s.parquet")
    rows = pq.read_table(tmp_path / "s.parquet").to_pylist()
    # 6 helpful and 6 harmful of 9 overlap, so every example is there, none twice
    assert len(rows) == 18
    assert len({(r["query_id"], r["train_id"]) for r in rows}) == 18
    for row in rows:
        q, t = dense.query_ids.index(row["query_id"]), dense.ids.index(row["train_id"])
        want = dense.values[q, t]
        assert row["influence"] == float(want)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"method": "grad_dot"}], ids=str)
def test_html_is_one_page_that_needs_nothing_else(tmp_path: Path, options: dict) -> None:
    scores(**options).to_html(tmp_path / "r.html", title="A title of my own")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "A title of my own" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_certificate_counts_blocks_and_names_the_first_that_missed() -> None:
    fine = scores().certificate()
    assert fine["certified"] is True
    assert 0 < fine["worst_residual"] < 1e-5
    missed = scores(method="lissa", iterations=1).certificate()
    assert missed["certified"] is False
    assert "2 did not converge, first a" in missed["summary"]
    assert scores(method="grad_dot").certificate()["certified"] is None


def write_half(path: Path) -> None:
    with atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError("stop")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"new": float("nan")})
    with pytest.raises(OSError, match="stop"):
        write_half(path)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]

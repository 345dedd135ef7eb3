"""The offline tuner keeps what fits and is fastest, and writes a table that reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hyperinf_kernels.errors import InputError
from hyperinf_kernels.ops.triton import configs, tune
from hyperinf_kernels.ops.triton.configs import Config

ROW = Config("product", 90, "tf32", None, {"BLOCK": 64, "BLOCK_K": 32}, 4, 3)


def test_candidates_start_with_the_shipped_row_and_are_distinct() -> None:
    for row in configs.shipped():
        found = list(tune.candidates(row))
        assert found[0] == row
        assert len({repr(c) for c in found}) == len(found)
        assert all(c[:4] == row[:4] and set(c.blocks) == set(row.blocks) for c in found)
        if row.precision != "ieee" and "ROWS" in row.blocks:
            assert min(c.blocks["ROWS"] for c in found) >= 16


def test_the_fastest_candidate_that_neither_spills_nor_overflows_wins() -> None:
    def compiled(row: Config) -> list[dict[str, int]]:
        big = row.blocks["BLOCK"] * row.blocks["BLOCK_K"] * row.num_stages * 8
        return [{"spill_bytes": 4 if row.num_warps == 8 else 0, "shared_bytes": big}]

    # larger is faster: the largest one that fits without spilling must come out
    (best,) = tune.tuned([ROW], compiled, lambda r: 1 / (r.blocks["BLOCK"] * r.num_stages), print)
    assert (best.blocks["BLOCK"], best.num_stages, best.num_warps) == (128, 4, 4)
    with pytest.raises(RuntimeError, match="compiles without spilling"):
        tune.tuned([ROW], lambda row: [{"spill_bytes": 4, "shared_bytes": 0}], lambda row: 1.0)


def test_a_written_table_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "PATH", tmp_path / "configs.json")
    configs.write(configs.shipped(), configs.PATH)
    assert configs.shipped.__wrapped__() == configs.shipped()


def test_trial_rows_serve_only_inside_the_block() -> None:
    arguments = ("product", 90, "tf32", 2000)
    before = configs.choose(*arguments)
    trial = ROW._replace(num_warps=1)
    with configs.serving((trial,)):
        assert configs.choose(*arguments) is trial
    assert configs.choose(*arguments) == before != trial


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="needs a CUDA device"):
        tune.tune_here(write=False)

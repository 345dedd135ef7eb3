"""The computed roofline: formulas against hand counts, and what `auto` may conclude from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hyperinf_kernels.ops import costs, roofline
from hyperinf_kernels.ops.roofline import DEVICES, schulz
from hyperinf_kernels.ops.triton.launch import l2_share
from hyperinf_kernels.ops.triton.raster import order


def test_a_floor_is_the_slower_of_memory_and_arithmetic() -> None:
    device = roofline._device("toy", 80, 1.0, 1, 2.0, 6.0, 8.0)
    slow_memory = roofline.floor("op", device, "ours", 4e12, 2e12, 1, "ieee")
    assert (slow_memory.seconds, slow_memory.bound) == (4.0, "memory")
    slow_products = roofline.floor("op", device, "ours", 1e12, 8e12, 1, "tf32x3")
    assert (slow_products.seconds, slow_products.bound) == (4.0, "tf32x3 arithmetic")


def test_on_chip_chains_count_by_hand() -> None:
    # condition 50, target 1e-6: degrees (9, 9), 5 + 5 products, 2 of them free, 1 for the residual
    row = schulz(DEVICES["H100"], 64, 10, 50.0)
    assert row.flop == 10 * 9 * 2 * 64**3
    assert row.bytes == 10 * 2 * 64 * 64 * 4
    assert row.launches == 1


def test_products_beyond_the_cache_read_one_operand_per_group() -> None:
    d, matrix = 128 * 20, (128 * 20) ** 2 * 4
    assert roofline.product_bytes(d, 128, 2 * matrix) == 3 * matrix
    assert roofline.product_bytes(d, 128, matrix) == (1 + 3 + 1) * matrix
    assert roofline.product_bytes(d, 128, 2 * matrix, terms=2, outputs=2) == 6 * matrix


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_auto_inverts_as_the_floors_say(
    device: roofline.Device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HYPERINF_RATES", str(tmp_path / "not calibrated"))
    for d in (8, 16, 32, 64, 128, 256, 1024, 4096):
        for batch in (1, 32, 4096):
            for condition in (10.0, 1e3, 1e6):
                ours = schulz(device, d, batch, condition).seconds
                lower = "direct" if cholesky(device, d, batch, condition) <= ours else "schulz"
                assert lower == "direct"
                assert costs.cheaper_inverse(d, batch, condition, dtype, "cuda") == lower


def cholesky(device: roofline.Device, d: int, batch: int, condition: float) -> float:
    return roofline.cholesky_inverse(device, d, batch, condition).seconds


def test_the_comparison_can_go_the_other_way() -> None:
    wishful = roofline._device("wishful", 90, 100.0, 50, 1.0, 1000.0, 1000.0)
    assert schulz(wishful, 128, 1000, 10.0).seconds < cholesky(wishful, 128, 1000, 10.0)


@pytest.mark.parametrize("device", DEVICES.values(), ids=list(DEVICES))
def test_writing_the_gradients_of_a_large_gfim_costs_less_than_a_tenth(
    device: roofline.Device,
) -> None:
    # the smallest side whose sum leaves a third of L2, from where slices pass through memory
    d = math.isqrt(l2_share(device.arch) // 4) + 1
    assert 4 * d * d > l2_share(device.arch)
    written = 4 * d / device.memory
    summed = d * d / device.flops["tf32x3"]
    assert written < 0.1 * summed


@pytest.mark.parametrize(
    ("rows", "cols", "symmetric"),
    [(1, 1, False), (5, 7, False), (17, 3, False), (1, 1, True), (19, 19, True)],
)
def test_the_raster_visits_every_tile_once(rows: int, cols: int, symmetric: bool) -> None:
    walked = order(rows, cols, symmetric)
    wanted = {(i, j) for i in range(rows) for j in range(cols) if not symmetric or i <= j}
    assert len(walked) == len(wanted)
    assert set(walked) == wanted


def test_the_table_names_its_source_and_has_a_rival_for_every_row() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hyperinf_kernels.ops.roofline", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = json.loads(done.stdout)
    assert {row["source"] for row in rows} == {"computed"}
    assert {row["device"] for row in rows} == {d.name for d in DEVICES.values()}
    providers: dict[tuple[str, str], int] = {}
    for row in rows:
        providers[row["op"], row["device"]] = providers.get((row["op"], row["device"]), 0) + 1
        assert row["seconds"] > 0
        assert row["launches"] >= 1
    assert set(providers.values()) == {2}

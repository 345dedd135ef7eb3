"""Every shipped Triton configuration, compiled for every architecture without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hyperinf_kernels.ops.triton import aot
from hyperinf_kernels.ops.triton.configs import ARCHS, Config, table
from tests.triton_cases import TRITON

pytestmark = pytest.mark.skipif(not TRITON, reason="triton is not installed: pip install triton")
# tiles too small for the warpgroup instructions of sm_90 and sm_100
SMALL_TILES = {"rows_dots", "rows_sum", "per_sample", "grad"}
# cards of capability 8.6, 8.9 and 12.x run sm_80's configurations with this much shared memory
SMALLEST_SHARED = 99 << 10
LARGEST_COMPILE_S = 5.0


def in_a_child(*words: str) -> str:
    """Output of Python in a process of its own, where kernels are compiled, not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return json.loads(in_a_child("-m", "hyperinf_kernels.ops.triton.aot", "--json"))


def described(row: dict[str, Any]) -> str:
    return f"{row['kernel']} {row['arch']} {row['config']}"


def test_the_table_has_every_configuration_and_its_keys(rows: list[dict[str, Any]]) -> None:
    shipped = {(c.kernel, f"sm_{c.arch}", c.precision, c.up_to) for c in table()}
    compiled = {
        (r["kernel"], r["arch"], r["config"]["precision"], r["config"]["up_to"]) for r in rows
    }
    assert compiled == shipped
    assert {r["arch"] for r in rows} == {f"sm_{arch}" for arch in ARCHS}
    keys = {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "compile_s",
            "instructions", "occupancy"}  # fmt: skip
    assert all(keys <= set(row) for row in rows)


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    spilled = [f"{described(r)}: {r['spill_bytes']} bytes" for r in rows if r["spill_bytes"]]
    assert spilled == []
    assert not [described(r) for r in rows if "STL" in r["instructions"]]


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        arch = int(row["arch"].removeprefix("sm_"))
        limit = min(aot.SHARED_LIMIT[arch], SMALLEST_SHARED if arch == 80 else 1 << 30)
        assert row["shared_bytes"] <= limit, described(row)
        assert 0 < row["occupancy"] <= 1, described(row)


def test_each_compiles_within_five_seconds(rows: list[dict[str, Any]]) -> None:
    slow = [
        f"{described(r)}: {r['compile_s']} s" for r in rows if r["compile_s"] > LARGEST_COMPILE_S
    ]
    assert slow == []


def test_tensor_cores_exactly_where_the_precision_says_so(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        arch = int(row["arch"].removeprefix("sm_"))
        if row["config"]["precision"] == "ieee":
            assert row["matrix"] == [], described(row)
        elif row["kernel"] in SMALL_TILES:
            assert row["matrix"], described(row)
        else:
            assert row["matrix"] == [aot.EXPECTED[arch]], described(row)


def test_batch_offsets_are_64_bit(rows: list[dict[str, Any]]) -> None:
    assert [described(r) for r in rows if r["wide_products"] == 0] == []


def test_three_passes_cost_three_times_the_matrix_instructions(rows: list[dict[str, Any]]) -> None:
    """tf32x3 is told from tf32 by nothing but its instructions."""
    counts = {
        r["config"]["precision"]: r["instructions"]["HMMA"] / r["config"]["PANEL"]
        for r in rows
        if (r["kernel"], r["arch"], r["config"]["up_to"]) == ("resident", "sm_80", 128)
        and r["config"]["precision"].startswith("tf32")
    }
    assert counts["tf32x3"] == 3 * counts["tf32"]


PROBE = """
import json, sys
import triton, triton.language as tl
from hyperinf_kernels.ops.triton import aot, signatures
from hyperinf_kernels.ops.triton.configs import Config

@triton.jit
def narrow(X, n, stride_b, D: tl.constexpr):
    at = X + tl.program_id(0) * stride_b + tl.arange(0, D)
    tl.store(at, tl.load(at) + n)

signatures.KERNELS["narrow"] = narrow
signatures.WIDE.clear()
spilling = Config("resident", 80, "tf32x3", 128, dict(D=128, PANEL=128, BLOCK_K=16), 8, 2)
plain = Config("narrow", 80, "ieee", None, dict(D=128), 4, 1)
print(json.dumps(list(aot.rows([plain, spilling]))))
"""


def test_a_kernel_with_32_bit_offsets_and_one_that_spills_are_both_noticed(tmp_path: Path) -> None:
    file = tmp_path / "probe.py"
    file.write_text(PROBE, encoding="utf-8")
    narrow, spilling = json.loads(in_a_child(str(file)))
    assert narrow["wide_products"] == 0
    assert spilling["spill_bytes"] > 0
    assert spilling["instructions"]["STL"] > 0


ONES = """
import json
from hyperinf_kernels.ops.triton import aot, signatures
from hyperinf_kernels.ops.triton.configs import table

first = {}
for config in table():
    first.setdefault((config.kernel, config.up_to), config)
print(json.dumps(list(aot.rows(list(first.values()), signatures.with_ones))))
"""


def test_sizes_of_one_which_a_launch_turns_into_constants_compile_too(tmp_path: Path) -> None:
    file = tmp_path / "ones.py"
    file.write_text(ONES, encoding="utf-8")
    found = json.loads(in_a_child(str(file)))
    assert {row["kernel"] for row in found} == {config.kernel for config in table()}
    assert [described(row) for row in found if row["spill_bytes"]] == []


COUSINS = """
import json, sys
from hyperinf_kernels.ops.triton import aot
from hyperinf_kernels.ops.triton.configs import table

cousins = (86, 120)
aot.SHARED_TOTAL.update(dict.fromkeys(cousins, 100 << 10))
largest = [c for c in table() if c.arch == 80 and c.kernel in ("product", "accumulate")
           and c.precision == "tf32"]
print(json.dumps(list(aot.rows([c._replace(arch=a) for c in largest for a in cousins]))))
"""


def test_the_largest_rows_fit_the_smaller_cards_that_share_them(tmp_path: Path) -> None:
    """Capability 8.6 and 12.0 take sm_80's rows; the compiler gives 12.0 other pipelines."""
    file = tmp_path / "cousins.py"
    file.write_text(COUSINS, encoding="utf-8")
    found = json.loads(in_a_child(str(file)))
    assert {row["arch"] for row in found} == {"sm_86", "sm_120"}
    assert max(row["shared_bytes"] for row in found) >= 48 << 10
    assert [described(r) for r in found if r["shared_bytes"] > SMALLEST_SHARED] == []
    assert [described(r) for r in found if r["spill_bytes"]] == []


def test_compiling_beside_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1 turns the compiler off"):
        next(aot.rows())


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(32, 0, 4, 1.0), (255, 0, 8, 0.125), (128, 0, 8, 0.25), (32, 160 << 10, 4, 0.062),
     (64, 40 << 10, 4, 0.25)],
)  # fmt: skip
def test_occupancy(registers: int, shared: int, warps: int, expected: float) -> None:
    assert aot.occupancy(80, registers, shared, warps) == pytest.approx(expected, abs=1e-3)


def test_configurations_are_chosen_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperinf_kernels.ops.triton import configs

    invented = tuple(Config("k", 90, "tf32", up_to, {"BLOCK": b}, 4, 2)
                     for up_to, b in ((64, 16), (512, 64), (None, 128)))  # fmt: skip
    monkeypatch.setattr(configs, "table", lambda: invented)
    choose = configs.choose.__wrapped__
    assert [choose("k", 90, "tf32", n).blocks["BLOCK"] for n in (1, 64, 65, 512, 9999)] == [
        16, 16, 64, 64, 128,
    ]  # fmt: skip
    with pytest.raises(LookupError, match=r"no k configuration for sm_80, tf32, size 3 .*none"):
        choose("k", 80, "tf32", 3)
    assert [configs.rows_of(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))] == [
        80, 80, 90, 100, 80,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"capability 8\.0, this device has 7\.5"):
        configs.rows_of(7, 5)

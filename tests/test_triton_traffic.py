"""Bytes that the Triton kernels move, counted load by load in the interpreter.

Every access goes through a model of L2: 32-byte sectors, least recently used first out, written
back when they leave. Programs run one after another, which for the caches is the case of a wave of
programs in step. Caches and problems are scaled down together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperinf_kernels.ops import roofline
from hyperinf_kernels.ops.triton import entry as face
from hyperinf_kernels.ops.triton import factors
from tests.triton_cases import INTERPRETING, on_device, random, spd

pytestmark = [
    *on_device(),
    pytest.mark.skipif(
        not INTERPRETING, reason="counts accesses in the interpreter: set TRITON_INTERPRET=1"
    ),
]
SECTOR = 32
MOST = 1.1


class L2:
    """Sectors that move between this cache and device memory."""

    def __init__(self, size: int) -> None:
        self.lines: OrderedDict[int, bool] = OrderedDict()
        self.capacity = size // SECTOR
        self.read = self.written = 0

    def touch(self, addresses: np.ndarray, store: bool) -> None:
        for sector in np.unique(addresses // SECTOR).tolist():
            dirty = self.lines.pop(sector, None)
            # a store of a whole sector reads nothing
            self.read += dirty is None and not store
            self.lines[sector] = bool(dirty) or store
            if len(self.lines) > self.capacity:
                self.written += self.lines.popitem(last=False)[1]

    def bytes(self) -> int:
        """Moved so far, with what still waits to be written."""
        return (self.read + self.written + sum(self.lines.values())) * SECTOR


@contextmanager
def counted(size: int) -> Iterator[L2]:
    from triton.runtime import interpreter

    builder, cache = interpreter.InterpreterBuilder, L2(size)
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        cache.touch(np.ravel(ptrs.data)[np.ravel(mask.data).astype(bool)], store=False)
        return load(self, ptrs, mask, *rest)

    def counting_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        cache.touch(np.ravel(ptrs.data)[np.ravel(mask.data).astype(bool)], store=True)
        return store(self, ptrs, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield cache
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store


def size_of(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_the_model_counts_what_it_should() -> None:
    cache = L2(4 * SECTOR)
    sectors = np.arange(4) * SECTOR
    cache.touch(sectors, store=False)
    cache.touch(sectors, store=False)
    assert cache.bytes() == 4 * SECTOR
    cache.touch(sectors[:1] + 4 * SECTOR, store=True)
    assert cache.bytes() == 5 * SECTOR
    cache.touch(sectors[:1], store=False)
    assert cache.bytes() == 6 * SECTOR


@pytest.mark.parametrize("queries", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sherman_morrison_reads_every_row_once(
    queries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperinf_kernels.ops.triton import sherman_morrison as module

    # the cache holds three chunks; V and the sums are small beside G, as they are at full size
    G, V = random(640, 256, dtype=dtype, seed=1), random(queries, 256)
    size = 3 * 32 * 256 * G.element_size() + 6 * size_of(V)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 32)
    monkeypatch.setattr(module, "MULTIPROCESSORS", dict.fromkeys((80, 90, 100), 4))
    with counted(size) as cache:
        W = face.sherman_morrison(V, G, torch.tensor(0.5))
    assert cache.bytes() <= MOST * size_of(G, V, W)
    # with chunks larger than the cache the second read comes from memory: the count has teeth
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 640)
    with counted(size) as cache:
        face.sherman_morrison(V, G, torch.tensor(0.5))
    assert cache.bytes() > 1.9 * size_of(G)


def test_a_chunk_and_its_second_read_fit_in_the_cache() -> None:
    from hyperinf_kernels.ops.triton.launch import L2_BYTES, chunk_rows

    for arch, l2 in L2_BYTES.items():
        for columns in (1024, 16384, 65536):
            rows = chunk_rows(columns, 4, arch, 16)
            assert rows % 16 == 0
            assert rows * columns * 4 <= max(l2 / 3, 16 * columns * 4)


def small_tiles(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    from hyperinf_kernels.ops.triton.configs import Config

    row = Config("product", 80, "ieee", None, {"BLOCK": 16, "BLOCK_K": 16}, 4, 2)
    monkeypatch.setattr(module, "choose", lambda *_: row)


@pytest.mark.parametrize("terms", [0, 1])
def test_a_product_reads_its_operands_once_when_they_fit(
    terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperinf_kernels.ops.triton import product as module

    small_tiles(monkeypatch, module)
    A, X = random(2, 96, 96), random(2, 96, 96, seed=1)
    extra = [random(2, 96, 96, seed=2)] * terms
    with counted(4 * 96 * 96 * 4) as cache:
        outs, _ = module.product(A, X, [[1.0, -1.0, *[1.0] * terms]], extra, precision="ieee")
    assert cache.bytes() <= MOST * size_of(A, X, *extra, *outs)


def test_a_product_beyond_the_cache_re_reads_what_the_raster_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperinf_kernels.ops.triton import product as module
    from hyperinf_kernels.ops.triton.raster import GROUP

    small_tiles(monkeypatch, module)
    d = 12 * 16
    A, X = random(1, d, d), random(1, d, d, seed=1)
    # room for one group of rows of A, a few columns of X and the tiles being written
    room = (GROUP + 4) * 16 * d * 4
    with counted(room) as cache:
        module.product(A, X, [[1.0, -1.0]], precision="ieee")
    modelled = roofline.product_bytes(d, 16, room)
    assert 0.9 * modelled <= cache.bytes() <= MOST * modelled
    # without groups every row of tiles would read all of X again
    assert modelled < 0.5 * (12 + 2) * d * d * 4


def test_a_mirrored_product_reads_and_writes_no_more_than_a_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperinf_kernels.ops.triton import product as module

    small_tiles(monkeypatch, module)
    A, R2 = random(2, 96, 96), random(2, 96, 96, seed=1)
    # tiles below the diagonal are never read: half of each term
    extra = random(2, 96, 96, seed=2)
    weights = [[1.0, -1.0, 1.0], [0.5, 1.0, 0.0]]
    with counted(6 * 96 * 96 * 4) as cache:
        outs, _ = module.product(A, R2, weights, [extra], precision="ieee", symmetric=True)
    tiles = 96 // 16
    above = (tiles + 1) / (2 * tiles)
    assert cache.bytes() <= MOST * (size_of(A, R2, *outs) + above * size_of(extra))


@pytest.mark.parametrize("condition", [3.0, 50.0, 1e3, 1e5])
def test_a_chain_takes_the_launches_that_the_roofline_counts(
    condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyperinf_kernels.ops.triton import schulz as module
    from tests.test_triton_schulz import plan

    calls = []

    def counting(left: Tensor, right: Tensor, weights: Any, terms: Any = (), **_: Any) -> Any:
        calls.append((len(terms), len(weights)))
        return [right for _ in weights], torch.ones(len(left))

    monkeypatch.setattr(module, "product", counting)
    monkeypatch.setattr(face, "LARGEST_ONCHIP", 0)
    start, steps = plan(2, condition)
    _, products = face.schulz(spd(2, 8, 3.0), start, steps)
    chain = [step.degree for step in steps]
    expected = roofline.chain_launches(chain)
    # the first residual and a first step of degree 2 are elementwise
    assert sorted(calls) == sorted(expected)
    assert products == len(calls)


@pytest.mark.parametrize("d", [32, 64])
def test_chains_on_chip_read_a_and_write_x_once(d: int) -> None:
    from hyperinf_kernels.ops.triton import schulz as module
    from tests.test_triton_schulz import plan

    A = spd(6, d, 10.0)
    start, steps = plan(6, 10.0)
    programs = module.RESIDENT_PROGRAMS * 108
    scratch = min(6, programs) * 6 * d * d * 4 if d > 32 else 0
    # the scratch of all programs stays in L2 and is written back once at the end, if at all
    with counted(scratch + 4 * d * d * 4) as cache:
        X, _ = face.schulz(A, start, steps)
    assert cache.bytes() - scratch <= MOST * size_of(A, X)


def test_the_scratch_of_resident_programs_fits_in_l2() -> None:
    from hyperinf_kernels.ops.triton.launch import L2_BYTES, MULTIPROCESSORS
    from hyperinf_kernels.ops.triton.resident import SLOTS
    from hyperinf_kernels.ops.triton.schulz import resident_programs

    for arch, l2 in L2_BYTES.items():
        for side in (64, 128):
            programs = resident_programs(10**6, side, arch)
            assert programs * SLOTS.value * side * side * 4 <= l2
            # and nearly every multiprocessor has one
            assert programs >= 0.98 * MULTIPROCESSORS[arch]
        assert resident_programs(3, 64, arch) == 3


def test_gfim_reads_the_gradients_once_and_the_partial_sums_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperinf_kernels.ops.triton import accumulate as module

    monkeypatch.setattr(module, "LEAST_DEPTH", 1024)
    grads, C = random(1024, 4, 64), torch.zeros(64, 64)
    with counted(1 << 20) as cache:
        face.gfim_accumulate_(C, grads, side="cols", alpha=1.0)
    # read and write C; four partial sums of one tile come on top
    assert cache.bytes() <= MOST * (size_of(grads) + 2 * size_of(C))


def test_gfim_of_the_rows_side_reads_the_gradients_once() -> None:
    grads, C = random(24, 4, 512), torch.zeros(4, 4)
    with counted(1 << 16) as cache:
        face.gfim_accumulate_(C, grads, side="rows", alpha=1.0)
    # a product per sample is written; torch adds them up
    assert cache.bytes() <= MOST * (size_of(grads) + 24 * size_of(C))


def test_scoring_reads_delta_and_act_once_and_writes_no_gradient() -> None:
    delta, act = random(6, 128, 8), random(6, 128, 256, seed=1)
    V = random(4, 8, 256, seed=2)
    # V and a few samples fit, all samples do not
    with counted(2 * size_of(V) + size_of(act) // 2) as cache:
        dots = factors.per_sample_dot(delta, act, V, False)
    assert cache.bytes() <= MOST * size_of(delta, act, V, dots)
    assert cache.written * SECTOR <= MOST * 2 * 108 * size_of(dots)


TOKENS, RANK, COLUMNS = 24, 4, 64
# gradients of 8 samples, and their factors
SLICE = 8 * RANK * COLUMNS * 4
FACTORS = 8 * TOKENS * (RANK + COLUMNS) * 4
CACHE = (SLICE + FACTORS) * 3 // 2


@pytest.fixture
def formed_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    from hyperinf_kernels.ops.triton import launch

    for module in (launch, face):
        monkeypatch.setattr(module, "l2_share", lambda arch: CACHE // 3)
    monkeypatch.setattr(launch, "MULTIPROCESSORS", dict.fromkeys((80, 90, 100), 2))


def many_samples() -> tuple[Tensor, Tensor]:
    """Nine slices, of which the cache of the tests below holds one."""
    return random(72, TOKENS, RANK), random(72, TOKENS, COLUMNS, seed=1)


@pytest.mark.usefixtures("formed_in_slices")
def test_gfim_of_factors_reads_them_once_and_leaves_the_gradients_in_the_cache() -> None:
    delta, act = many_samples()
    C = torch.zeros(COLUMNS, COLUMNS)
    with counted(CACHE) as cache:
        face.gfim_accumulate_(C, delta, act, side="cols", alpha=1.0)
    # one slice is written back at the end, C is read and written
    assert cache.bytes() - SLICE <= MOST * (size_of(delta, act) + 2 * size_of(C))


@pytest.mark.usefixtures("formed_in_slices")
def test_the_factored_sum_reads_the_factors_once() -> None:
    delta, act = many_samples()
    V = random(3, RANK, COLUMNS, seed=2)
    with counted(CACHE) as cache:
        W = factors.sherman_morrison_factored(V, delta, act, torch.tensor(0.5))
    assert cache.bytes() - SLICE <= MOST * size_of(delta, act, V, W)


@pytest.mark.usefixtures("formed_in_slices")
def test_many_queries_score_with_one_read_of_the_factors() -> None:
    delta, act = many_samples()
    V = random(12, RANK, COLUMNS, seed=2)
    with counted(CACHE) as cache:
        dots = factors.per_sample_dot(delta, act, V, False)
    # dots are zeroed, read and written
    assert cache.bytes() - SLICE <= MOST * (size_of(delta, act, V) + 3 * size_of(dots))


def test_slices_larger_than_the_cache_come_from_memory_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The counts above have teeth: the same sums with one slice of everything fail them."""
    from hyperinf_kernels.ops.triton import launch

    monkeypatch.setattr(launch, "l2_share", lambda arch: 3 * CACHE)
    delta, act = many_samples()
    V = random(3, RANK, COLUMNS, seed=2)
    with counted(CACHE) as cache:
        W = factors.sherman_morrison_factored(V, delta, act, torch.tensor(0.5))
    assert cache.bytes() - SLICE > 1.2 * size_of(delta, act, V, W)


def test_gradients_are_written_once() -> None:
    delta, act = random(6, 32, 8), random(6, 32, 256, seed=1)
    with counted(size_of(act)) as cache:
        grads = factors.per_sample_grad(delta, act)
    assert cache.bytes() <= MOST * size_of(delta, act, grads)


@pytest.mark.parametrize("k", [20, 100])
def test_topk_reads_every_score_once(k: int) -> None:
    from hyperinf_kernels.ops.topk import topk_empty

    scores = random(1, 1000)
    kept = topk_empty(1, k)
    with counted(1 << 16) as cache:
        face.topk_merge_(*kept, scores, 0, False)
    assert cache.bytes() <= MOST * (size_of(scores) + 2 * size_of(*kept))


@pytest.fixture
def instead_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a GPU has, so that the code that measures one runs once before it meets one."""
    from benchmarks import gpu
    from hyperinf_kernels.ops.triton import tune

    for module in (gpu, tune):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
        monkeypatch.setattr(module, "INNER", 1)
    monkeypatch.setattr(gpu, "REPEATS", 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "_compiled", lambda function: function)


@pytest.mark.usefixtures("instead_of_a_gpu")
def test_the_gpu_benchmark_checks_every_provider_and_names_its_floor() -> None:
    from benchmarks import gpu

    rows = [
        *gpu._inverse(20, 2, 10.0),
        *gpu._inverse(40, 1, 10.0),
        *gpu._sherman_morrison(20, 64, 2, 2),
        *gpu._gfim(64, 40, 4),
        *gpu._scoring(2, 5, 4, 40, 2),
        *gpu._factored(3, 5, 4, 40, 2),
        *gpu._gfim_factors(3, 5, 4, 40),
    ]
    assert sum(row.provider == gpu.OURS for row in rows) == 7
    assert all(row.error is not None and row.error < 1e-5 for row in rows)
    assert all("of the computed floor" in row.note for row in rows if row.provider == gpu.OURS)


@pytest.mark.usefixtures("instead_of_a_gpu")
def test_the_tuner_has_a_problem_for_every_row_of_the_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hyperinf_kernels.ops.triton import configs, tune

    sizes = {"BATCH": 2, "SIDE": 64, "DEPTH": 1024, "COLUMNS": 256, "SAMPLES": 2, "TOKENS": 8,
             "STREAMS": 2}  # fmt: skip
    for name, value in sizes.items():
        monkeypatch.setattr(tune, name, value)
    # a trial row that cannot be launched shows that the problem launches this very row
    for row in configs.shipped():
        if row.arch == 80 and (row.up_to or 0) < 128:
            tune.problem(row)()
            broken = [r._replace(blocks={}) if r == row else r for r in configs.shipped()]
            with configs.serving(tuple(broken)), pytest.raises((KeyError, TypeError, RuntimeError)):
                tune.problem(row)()

"""Times candidate configurations on the GPU at hand and rewrites its rows of configs.json.

`hyperinf bench --tune [--write]`. Offline only: nothing is tuned at run time.
A candidate that spills or exceeds the architecture's shared memory is never timed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ...errors import InputError
from ..topk import topk_empty
from . import aot, configs
from .configs import Config
from .entry import LARGEST_K

# what each kernel may be launched with: values of its blocks, warps, stages
SEARCH: dict[str, tuple[dict[str, tuple[int, ...]], tuple[int, ...], tuple[int, ...]]] = {
    "registers": ({}, (1, 2, 4), (1,)),
    "resident": ({"PANEL": (32, 64), "BLOCK_K": (16, 32)}, (4, 8), (2, 3)),
    "product": ({"BLOCK": (64, 128), "BLOCK_K": (16, 32, 64)}, (4, 8), (2, 3, 4)),
    "accumulate": ({"BLOCK": (64, 128), "BLOCK_K": (32, 64)}, (4, 8), (2, 3, 4)),
    "rows_dots": ({"ROWS": (8, 16, 32), "COLUMNS": (64, 128, 256)}, (4, 8), (2, 3, 4)),
    "rows_sum": ({"ROWS": (8, 16, 32), "COLUMNS": (64, 128, 256)}, (4, 8), (2, 3, 4)),
    "per_sample": ({"COLUMNS": (32, 64, 128), "TOKENS": (16, 32, 64)}, (4, 8), (2, 3)),
    "grad": ({"ROWS": (16, 64), "COLUMNS": (64, 128, 256), "TOKENS": (16, 32, 64)}, (4, 8), (2, 3)),
}
LEAST_TENSOR_ROWS = 16
REPEATS, INNER = 7, 20
# the problems that are timed
DEVICE = torch.device("cuda")
BATCH, SIDE, DEPTH, COLUMNS, SAMPLES, TOKENS, STREAMS = 2048, 2048, 32768, 16384, 256, 128, 64


def candidates(row: Config) -> Iterator[Config]:
    """The row itself first, then every other setting its kernel may have."""
    yield row
    blocks, warps, stages = SEARCH.get(row.kernel, ({}, (), ()))
    for values in itertools.product(*blocks.values(), warps, stages):
        *sizes, num_warps, num_stages = values
        chosen = {**row.blocks, **dict(zip(blocks, sizes, strict=True))}
        if row.precision != "ieee" and chosen.get("ROWS", LEAST_TENSOR_ROWS) < LEAST_TENSOR_ROWS:
            continue
        new = row._replace(blocks=chosen, num_warps=num_warps, num_stages=num_stages)
        if new != row:
            yield new


def fits(facts: Sequence[Mapping[str, Any]], arch: int) -> bool:
    """No variant spills or needs more shared memory than the architecture has."""
    return all(f["spill_bytes"] == 0 and f["shared_bytes"] <= aot.SHARED_LIMIT[arch] for f in facts)


def tuned(
    rows: Sequence[Config],
    compiled: Callable[[Config], Sequence[Mapping[str, Any]]],
    seconds: Callable[[Config], float],
    say: Callable[[str], None] = print,
) -> tuple[Config, ...]:
    """The fastest fitting candidate of every row.

    Args:
        rows: of one architecture.
        compiled: facts of a candidate's variants, as `aot.rows`.
        seconds: time of one launch with a candidate.
    """
    best = []
    for row in rows:
        times = {}
        for number, candidate in enumerate(candidates(row)):
            if fits(compiled(candidate), row.arch):
                times[number] = (seconds(candidate), candidate)
        if not times:
            raise RuntimeError(f"no candidate of {row} compiles without spilling")
        fastest, winner = times[min(times, key=lambda n: (times[n][0], n))]
        now = f"{times[0][0] / fastest:.2f}x of the shipped one" if 0 in times else "replaces one"
        say(f"{row.kernel} {row.precision} up to {row.up_to}: {1e6 * fastest:.1f} us, {now}: "
            f"{winner.blocks}, {winner.num_warps} warps, {winner.num_stages} stages")  # fmt: skip
        best.append(winner)
    return tuple(best)


def problem(row: Config) -> Callable[[], object]:
    """One launch of the row's kernel on tensors of a size it serves, on the current GPU."""
    from .accumulate import accumulate_
    from .grad import per_sample_grad_
    from .launch import QUERIES
    from .per_sample import per_sample
    from .product import product
    from .schulz import schulz_onchip
    from .sherman_morrison import sherman_morrison
    from .topk import topk_merge_

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE).to(dtype)

    kind = {"bf16": torch.bfloat16, "tf32": torch.float16}.get(row.precision, torch.float32)
    if row.kernel in ("registers", "resident"):
        d = row.up_to or 128
        A = torch.eye(d, device=DEVICE).expand(BATCH, d, d).contiguous()
        # a start away from the inverse, or every matrix would stop at once
        start, coefficients = torch.full((BATCH,), 0.5, device=DEVICE), random(3, BATCH, 8) / 8
        degrees = torch.full((3,), 9, dtype=torch.int32, device=DEVICE)
        return lambda: schulz_onchip(A, start, coefficients, degrees, 0.0, row.precision)
    if row.kernel == "product":
        side = row.up_to or SIDE
        X = random(4, side, side)
        return lambda: product(X, X, [[1.0, -1.0, 1.0]], (X,), precision=row.precision)
    if row.kernel in ("accumulate", "reduce"):
        L = random(1, DEPTH, SIDE // 2, dtype=kind)
        C = torch.zeros(1, SIDE // 2, SIDE // 2, device=DEVICE)
        precision = row.precision if row.kernel == "accumulate" else "tf32x3"
        return lambda: accumulate_(C, L, L, 1.0, precision, True)
    if row.kernel in ("rows_dots", "rows_sum"):
        V, G = random(1, 1 if row.up_to == 1 else QUERIES, COLUMNS), random(1, DEPTH // 8, COLUMNS)
        lam = torch.ones(1, device=DEVICE)
        return lambda: sherman_morrison(V, G, lam)
    if row.kernel == "topk":
        kept = topk_empty(STREAMS, row.up_to or LARGEST_K, device=DEVICE)
        scores = random(STREAMS, DEPTH // 8)
        return lambda: topk_merge_(*kept, scores, 0, False)
    rows = 64 if row.kernel == "grad" and row.up_to is None else 16
    delta, act = (random(SAMPLES, TOKENS, n, dtype=kind) for n in (rows, COLUMNS // 4))
    if row.kernel == "per_sample":
        W = random(8, 16, COLUMNS // 4)
        return lambda: per_sample(delta, act, W)
    out = random(SAMPLES, rows, COLUMNS // 4)
    return lambda: per_sample_grad_(out, delta, act)


def seconds_on_gpu(others: Sequence[Config]) -> Callable[[Config], float]:
    """Median time of a launch with a candidate, the other kernels as in `others`."""

    def seconds(candidate: Config) -> float:
        key = candidate[:4]
        rows = tuple(candidate if row[:4] == key else row for row in others)
        with configs.serving(rows):
            run = problem(candidate)
            for _ in range(3):
                run()
            times = []
            for _ in range(REPEATS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(INNER):
                    run()
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end) / 1e3 / INNER)
        return statistics.median(times)

    return seconds


def tune_here(write: bool) -> None:
    """Tune the current GPU's rows, print the best, and with `write` replace them in configs.json.

    Raises:
        InputError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise InputError(
            "tuning needs a CUDA device, and none is visible; the table stays as it is"
        )
    arch = configs.rows_of(*torch.cuda.get_device_capability())
    rows = configs.shipped()
    mine = [row for row in rows if row.arch == arch]
    best = tuned(mine, lambda row: list(aot.rows([row])), seconds_on_gpu(rows))
    if write:
        chosen = {row[:4]: row for row in best}
        configs.write(tuple(chosen.get(row[:4], row) for row in rows))
        print(f"wrote {configs.PATH}; run the tests of the table before committing it")

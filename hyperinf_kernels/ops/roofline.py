"""Computed, never measured: what each GPU op must move and multiply, and the least time for it.

A floor is max(bytes / memory rate, flop / arithmetic rate); launches and the dependence between
steps come on top. `python -m hyperinf_kernels.ops.roofline` prints the table for A100, H100 and
B200, with what cuBLAS or cuSOLVER would have to do for the same job beside it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .schedule import FREE_FIRST_STEP, PRODUCTS, cheapest_chain, degree_for
from .triton.configs import choose
from .triton.launch import QUERIES, chunk_rows, slice_samples
from .triton.raster import GROUP

WORD = 4  # bytes of fp32


@dataclass(frozen=True)
class Device:
    """Data-sheet rates of one GPU, dense: bytes/s, and flop/s per precision."""

    name: str
    arch: int
    memory: float
    l2_bytes: int
    flops: dict[str, float]


def _device(
    name: str, arch: int, memory: float, l2_mb: int, fp32: float, tf32: float, bf16: float
) -> Device:
    """Rates in TB/s and Tflop/s; tf32x3 is three tf32 products."""
    rates = {"ieee": fp32, "tf32x3": tf32 / 3, "tf32": tf32, "bf16": bf16}
    return Device(name, arch, memory * 1e12, l2_mb << 20, {k: v * 1e12 for k, v in rates.items()})


DEVICES = {
    "A100": _device("A100 SXM 80 GB", 80, 2.04, 40, 19.5, 156, 312),
    "H100": _device("H100 SXM", 90, 3.35, 50, 66.9, 494, 989),
    "B200": _device("B200", 100, 8.0, 126, 75, 1100, 2250),
}


@dataclass(frozen=True)
class Floor:
    """The least one op can cost on one device. Times in seconds."""

    op: str
    device: str
    provider: str
    bytes: float
    flop: float
    launches: int
    seconds: float
    bound: str


def floor(
    op: str, device: Device, provider: str, moved: float, flop: float, launches: int,
    precision: str, forming: float = 0.0,
) -> Floor:  # fmt: skip
    """Whichever of memory and arithmetic takes longer; `forming` is further flop in bf16."""
    memory = moved / device.memory
    arithmetic = flop / device.flops[precision] + forming / device.flops["bf16"]
    bound = "memory" if memory >= arithmetic else f"{precision} arithmetic"
    seconds = max(memory, arithmetic)
    return Floor(op, device.name, provider, moved, flop + forming, launches, seconds, bound)


def product_bytes(d: int, block: int, l2_bytes: int, terms: int = 0, outputs: int = 1) -> float:
    """Device traffic of one d x d product with `terms` added matrices, as the raster orders tiles.

    Everything is read once where both operands fit in L2. Otherwise the rows of a group are read
    once and the other operand once per group.
    """
    matrix = d * d * WORD
    once = 2 * matrix <= l2_bytes
    groups = 1 if once else math.ceil(math.ceil(d / block) / GROUP)
    return matrix * (1 + groups + terms + outputs)


# degree: (terms, outputs) of each launch of a step after the residual's, as `ops.triton.schulz`
LAUNCHES = {
    2: ((1, 1),),
    3: ((1, 1), (1, 1)),
    5: ((1, 2), (0, 1), (0, 1)),
    9: ((1, 2), (2, 2), (3, 1), (0, 1)),
}


def chain_launches(chain: Sequence[int]) -> list[tuple[int, int]]:
    """(terms, outputs) of every product of a chain, the free ones of the first step left out."""
    first = LAUNCHES[chain[0]][:-1]
    later = [shape for q in chain[1:] for shape in ((0, 1), *LAUNCHES[q])]
    return [*first, *later]


def schulz(
    device: Device, d: int, batch: int, condition: float, precision: str = "tf32x3",
    target: float = 1e-6,
) -> Floor:  # fmt: skip
    """The cheapest chain for this condition number, on chip up to d = 128."""
    chain = cheapest_chain(degree_for(condition, target))
    products = sum(PRODUCTS[q] for q in chain) - FREE_FIRST_STEP
    flop = 2.0 * d**3 * batch * products
    op = f"inverse of {batch} x {d} x {d}, condition {condition:.0e}"
    if d <= 128:
        precision = "ieee" if d <= 32 else precision
        flop += 2.0 * d**3 * batch
        moved = 2.0 * batch * d * d * WORD
        return floor(op, device, "Schulz, Triton", moved, flop, 1, precision)
    launches = chain_launches(chain)
    block = 64 if device.arch == 80 else 128
    moved = sum(product_bytes(d, block, device.l2_bytes, *shape) for shape in launches)
    # the first residual is elementwise: A is read and R written
    moved = batch * (moved + 2 * d * d * WORD)
    return floor(op, device, "Schulz, Triton", moved, flop, len(launches) + 2, precision)


def cholesky_inverse(device: Device, d: int, batch: int, condition: float) -> Floor:
    """potrf and potri: d^3 flop in fp32, A read and X written once."""
    op = f"inverse of {batch} x {d} x {d}, condition {condition:.0e}"
    moved = 2.0 * batch * d * d * WORD
    return floor(op, device, "Cholesky, cuSOLVER", moved, float(batch) * d**3, 2, "ieee")


def sherman_morrison(device: Device, rows: int, columns: int, queries: int, width: int) -> Floor:
    """G of `width` bytes a number read once."""
    padded = 1 if queries == 1 else math.ceil(queries / QUERIES) * QUERIES
    precision = "ieee" if queries == 1 else "tf32x3"
    block = choose("rows_dots", device.arch, precision, min(padded, QUERIES)).blocks["ROWS"]
    chunks = math.ceil(rows / chunk_rows(columns, width, device.arch, block))
    moved = rows * columns * width + 2.0 * queries * columns * WORD
    flop = 2.0 * rows * columns * (2 * padded + 1)
    launches = 2 * chunks * math.ceil(padded / QUERIES)
    op = f"sherman_morrison {rows} x {columns}, m={queries}, {8 * width} bit"
    return floor(op, device, "Triton", moved, flop, launches, precision)


def sherman_morrison_products(
    device: Device, rows: int, columns: int, queries: int, width: int
) -> Floor:
    """Two cuBLAS products and a norm: G read three times."""
    moved = 3.0 * rows * columns * width + 2.0 * queries * columns * WORD
    op = f"sherman_morrison {rows} x {columns}, m={queries}, {8 * width} bit"
    flop = 2.0 * rows * columns * (2 * queries + 1)
    return floor(op, device, "two products, cuBLAS", moved, flop, 6, "ieee")


def gfim(device: Device, rows: int, d: int, width: int, ours: bool) -> Floor:
    """C += G^T G: half the tiles in tensor cores, or one cuBLAS product in fp32 or bf16."""
    low = {2: "bf16", 4: "tf32x3" if ours else "ieee"}[width]
    flop = (1.0 if ours else 2.0) * rows * d * d
    moved = rows * d * width + 2.0 * d * d * WORD
    name = f"gfim_accumulate_ {rows} x {d}, {8 * width} bit"
    return floor(name, device, "Triton" if ours else "cuBLAS", moved, flop, 2 if ours else 1, low)


def scoring(
    device: Device, samples: int, tokens: int, rows: int, columns: int, queries: int, ours: bool
) -> Floor:
    """<V_q, delta^T act> from bf16 factors; cuBLAS writes and reads the fp32 gradients between."""
    factors = samples * tokens * (rows + columns) * 2.0
    gradients = samples * rows * columns * WORD
    moved = factors + queries * rows * columns * WORD + samples * queries * WORD
    flop = 2.0 * samples * rows * columns * (tokens + queries)
    name = f"per_sample_dot {samples} x {tokens} tokens, {rows} x {columns}, m={queries}"
    if ours:
        return floor(name, device, "Triton", moved, flop, 2, "bf16")
    return floor(name, device, "products, cuBLAS", moved + 2 * gradients, flop, 2, "bf16")


def slices(device: Device, samples: int, tokens: int, rows: int, columns: int) -> int:
    """In which gradients of bf16 factors are formed so that they stay in L2."""
    return math.ceil(samples / slice_samples(tokens, rows, columns, 2, device.arch))


def factored(
    device: Device, samples: int, tokens: int, rows: int, columns: int, queries: int, ours: bool
) -> Floor:
    """DataInf on bf16 factors; cuBLAS writes fp32 gradients and reads them three times."""
    numbers = samples * rows * columns
    moved = samples * tokens * (rows + columns) * 2.0 + 2.0 * queries * rows * columns * WORD
    name = f"sherman_morrison of {samples} x {tokens} tokens, {rows} x {columns}, m={queries}"
    forming, padded = 2.0 * numbers * tokens, queries if queries == 1 else QUERIES
    if ours:
        precision = "ieee" if queries == 1 else "tf32x3"
        groups = math.ceil(queries / padded)
        flop = 2.0 * numbers * (2 * groups * padded + 1)
        launches = (1 + 2 * groups) * slices(device, samples, tokens, rows, columns)
        return floor(name, device, "Triton", moved, flop, launches, precision, forming)
    flop = 2.0 * numbers * (2 * queries + 1)
    return floor(
        name, device, "products, cuBLAS", moved + 4.0 * numbers * WORD, flop, 7, "ieee", forming
    )


def gfim_factors(
    device: Device, samples: int, tokens: int, rows: int, columns: int, ours: bool
) -> Floor:
    """C += sum g^T g on bf16 factors, C in L2; cuBLAS writes and reads fp32 gradients between."""
    numbers = samples * rows * columns
    moved = samples * tokens * (rows + columns) * 2.0 + 2.0 * columns * columns * WORD
    name = f"gfim_accumulate_ of {samples} x {tokens} tokens, {rows} x {columns}"
    forming, flop = 2.0 * numbers * tokens, (1.0 if ours else 2.0) * numbers * columns
    if ours:
        launches = 3 * slices(device, samples, tokens, rows, columns)
        return floor(name, device, "Triton", moved, flop, launches, "tf32x3", forming)
    return floor(
        name, device, "products, cuBLAS", moved + 2.0 * numbers * WORD, flop, 2, "ieee", forming
    )


INVERSES = ((16, 4096, 1e2), (64, 512, 1e3), (128, 128, 1e3), (1024, 32, 1e3), (1024, 32, 1e5),
            (4096, 4, 1e3))  # fmt: skip
ROWS = ((4500, 16384, 1, 4), (4500, 16384, 8, 4), (4500, 16384, 8, 2))
SUMS = ((72000, 1024, 4), (72000, 4096, 2))
SCORED = (256, 128, 16, 4096, 8)
FACTORED = (1000, 128, 16, 4096, 8)
SUMMED = (1000, 128, 16, 1024)


def table(devices: Sequence[Device] = tuple(DEVICES.values())) -> list[Floor]:
    """Every op on every device, our kernel first, then the rival's floor."""
    found = []
    for device in devices:
        for inverse in INVERSES:
            found += [schulz(device, *inverse), cholesky_inverse(device, *inverse)]
        for rows in ROWS:
            found += [sherman_morrison(device, *rows), sherman_morrison_products(device, *rows)]
        for sums in SUMS:
            found += [gfim(device, *sums, ours=True), gfim(device, *sums, ours=False)]
        for ours in (True, False):
            found.append(scoring(device, *SCORED, ours=ours))
        for ours in (True, False):
            found.append(factored(device, *FACTORED, ours=ours))
        for ours in (True, False):
            found.append(gfim_factors(device, *SUMMED, ours=ours))
    return found


def main() -> None:
    """Print the table as text, as Markdown (--markdown) or as JSON (--json)."""
    rows = table()
    if "--json" in sys.argv:
        print(json.dumps([{"source": "computed", **asdict(row)} for row in rows]))
        return
    head = ("op", "device", "provider", "MB", "Gflop", "launches", "us, computed", "bound")
    cells: list[tuple[str, ...]] = [head]
    cells += [
        (r.op, r.device, r.provider, f"{r.bytes / 1e6:.1f}", f"{r.flop / 1e9:.1f}", f"{r.launches}",
         f"{r.seconds * 1e6:.1f}", r.bound)
        for r in rows
    ]  # fmt: skip
    if "--markdown" in sys.argv:
        cells.insert(1, ("---",) * len(cells[0]))
        print("\n".join(f"| {' | '.join(row)} |" for row in cells))
        return
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    main()

"""The compiled CPU kernels against the same operations in tuned torch, and against the memory.

Every provider of a case works on the same tensors, interleaved. Errors are against fp64. The note
of a `sherman_morrison` row is its share of the read rate of a plain sum over the same bytes, which
is the roofline of an op that has to read every row once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.ops import native

from .registry import Measurement, benchmark, interleaved, measurements

REPEATS = 9
OURS = "hyperinf_kernels"
# how much of a large product is checked against fp64
CHECKED_ROWS = 128


@benchmark("native-sums")
def sums(quick: bool) -> Iterator[Measurement]:
    """DataInf operator, Gram and GFIM sums."""
    need_kernels()
    rows, columns = (500, 4096) if quick else (4500, 16384)
    for dtype in (torch.float32, torch.bfloat16):
        for queries in (1, 8):
            yield from _sherman_morrison(queries, rows, columns, dtype)
    yield from _gfim(4000 if quick else 72000, 256 if quick else 1024)
    yield from _gram(rows // 4 if quick else rows, columns)
    yield from _gfim64(512 if quick else 4096, 256 if quick else 1024)


def need_kernels() -> None:
    """Stop with the reason where there is nothing to measure."""
    if native.missing():
        raise SystemExit(f"nothing to measure: {native.missing()}")


def _sherman_morrison(
    queries: int, rows: int, columns: int, dtype: torch.dtype
) -> Iterator[Measurement]:
    G, V = torch.randn(rows, columns).to(dtype), torch.randn(queries, columns)
    wide = G.float()
    damping = 0.1

    def two_products() -> Tensor:
        weights = (V @ wide.mT) / (damping + wide.square().sum(-1))
        return (V - weights @ wide / rows) / damping

    words = G.view(torch.float32)
    providers: dict[str, Callable[[], object]] = {
        "torch, two products in fp32": two_products,
        OURS: lambda: hk.sherman_morrison(V, G, damping),
        "sum over the same bytes": lambda: words.sum(),
    }
    truth = _datainf(V, G, damping)
    errors = {"torch, two products in fp32": error_of(two_products(), truth),
              OURS: error_of(hk.sherman_morrison(V, G, damping), truth)}  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    case = f"sherman_morrison, {rows} x {columns} {name}, m={queries}"
    gigabytes = G.numel() * G.element_size() / 1e9
    times = times_of(providers)
    found = list(measurements(case, times, next(iter(providers)), errors, gigabytes, "GB"))
    reading = found[-1].median
    for row in found:
        note = f"{reading / row.median:.0%} of plain reading" if row.provider == OURS else ""
        yield replace(row, note=note)


def _datainf(V: Tensor, G: Tensor, damping: float) -> Tensor:
    """In fp64, a few rows at a time."""
    total = torch.zeros(V.shape, dtype=torch.float64)
    v = V.double()
    for part in G.split(256):
        g = part.double()
        total += (v @ g.mT / (damping + g.square().sum(-1))) @ g
    return (v - total / len(G)) / damping


def _onednn(X: Tensor, Y: Tensor) -> Tensor:
    """X Y^T at the processor's full width, which torch.mm does not use everywhere."""
    return torch.ops.mkldnn._linear_pointwise(X, Y, None, "none", [], "")


def _gfim64(rows: int, side: int) -> Iterator[Measurement]:
    X = torch.randn(rows, side)
    C = torch.zeros(side, side, dtype=torch.float64)
    truth = X[:, :CHECKED_ROWS].double().mT @ X.double()
    # the baseline accumulates in place; its first call starts from zero, as ours does
    providers = {
        "torch.mm": lambda: C.addmm_(X.double().mT, X.double()),
        OURS: lambda: hk.gfim_accumulate_(C, X.unsqueeze(1)),
    }
    case = f"gfim_accumulate_ in fp64, {rows} x {side} fp32"
    yield from _product(case, providers, C, truth, rows)


def _gfim(rows: int, side: int) -> Iterator[Measurement]:
    X = torch.randn(rows, side)
    C = torch.zeros(side, side)
    truth = X[:, :CHECKED_ROWS].double().mT @ X.double()
    providers = {
        "torch.mm": lambda: torch.mm(X.mT, X),
        "oneDNN product": lambda: _onednn(X.mT, X.mT),
        OURS: lambda: hk.gfim_accumulate_(C, X.unsqueeze(1)),
    }
    yield from _product(f"gfim_accumulate_, {rows} x {side}", providers, C, truth, rows)


def _gram(rows: int, columns: int) -> Iterator[Measurement]:
    G = torch.randn(rows, columns)
    K = torch.zeros(rows, rows)
    truth = torch.cat(
        [G[:CHECKED_ROWS].double() @ part.double().mT for part in G.split(512)], dim=1
    )
    providers = {
        "torch.mm": lambda: torch.mm(G, G.mT),
        "oneDNN product": lambda: _onednn(G, G),
        OURS: lambda: hk.gram_accumulate_(K, G),
    }
    yield from _product(f"gram_accumulate_, {rows} x {columns}", providers, K, truth, columns)


def _product(
    case: str, providers: Mapping[str, Callable[[], Tensor]], total: Tensor, truth: Tensor,
    depth: int,
) -> Iterator[Measurement]:  # fmt: skip
    """Rates count the multiplications of one triangle for every provider."""
    errors = {}
    for name, call in providers.items():
        total.zero_()
        errors[name] = error_of(call()[: len(truth)], truth)
    gigaflop = len(total) * (len(total) + 1) * depth / 1e9
    yield from measurements(case, times_of(providers), "torch.mm", errors, gigaflop, "GFLOP")


def times_of(providers: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    for call in providers.values():
        call()
    return interleaved(providers, REPEATS)


def error_of(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())

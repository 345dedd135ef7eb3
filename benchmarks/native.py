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


@benchmark("native")
def compiled(quick: bool) -> Iterator[Measurement]:
    """DataInf operator, Gram and GFIM sums, batched inverses."""
    if native.missing():
        raise SystemExit(f"nothing to measure: {native.missing()}")
    rows, columns = (500, 4096) if quick else (4500, 16384)
    for dtype in (torch.float32, torch.bfloat16):
        for queries in (1, 8):
            yield from _sherman_morrison(queries, rows, columns, dtype)
    yield from _gfim(4000 if quick else 72000, 256 if quick else 1024)
    yield from _gram(rows // 4 if quick else rows, columns)
    for side, batch in ((16, 4096), (32, 2048), (64, 512), (128, 128)):
        yield from _spd_inverse(side, batch // 8 if quick else batch)


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
    errors = {"torch, two products in fp32": _error(two_products(), truth),
              OURS: _error(hk.sherman_morrison(V, G, damping), truth)}  # fmt: skip
    name = str(dtype).removeprefix("torch.")
    case = f"sherman_morrison, {rows} x {columns} {name}, m={queries}"
    gigabytes = G.numel() * G.element_size() / 1e9
    times = _times(providers)
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


def _gfim(rows: int, side: int) -> Iterator[Measurement]:
    X = torch.randn(rows, side)
    C = torch.zeros(side, side)
    truth = X[:, :CHECKED_ROWS].double().mT @ X.double()
    providers = {
        "torch.mm": lambda: torch.mm(X.mT, X),
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
        "oneDNN product": lambda: torch.ops.mkldnn._linear_pointwise(G, G, None, "none", [], ""),
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
        errors[name] = _error(call()[: len(truth)], truth)
    gigaflop = len(total) * (len(total) + 1) * depth / 1e9
    yield from measurements(case, _times(providers), "torch.mm", errors, gigaflop, "GFLOP")


def _spd_inverse(side: int, batch: int) -> Iterator[Measurement]:
    basis = torch.linalg.qr(torch.randn(batch, side, side, dtype=torch.float64))[0]
    A = ((basis * torch.logspace(0, -3, side, dtype=torch.float64)) @ basis.mT).float()
    A = (A + A.mT) / 2
    truth = torch.linalg.inv(A.double())
    direct = native_inverse(A)
    baseline = "torch.cholesky_inverse"
    providers: dict[str, Callable[[], Tensor]] = {
        baseline: lambda: torch.cholesky_inverse(torch.linalg.cholesky(A)),
        "torch.linalg.inv": lambda: torch.linalg.inv(A),
        OURS: direct,
        f"{OURS}, with its checks": lambda: hk.spd_inverse(A),
    }
    errors = {name: _error(call(), truth) for name, call in providers.items()}
    case = f"spd_inverse, {batch} of {side} x {side}"
    gigaflop = batch * side**3 / 1e9
    yield from measurements(case, _times(providers), baseline, errors, gigaflop, "GFLOP")


def native_inverse(A: Tensor) -> Callable[[], Tensor]:
    """The kernel without the face's test of symmetry and finiteness, which the rivals lack too."""

    def run() -> Tensor:
        inverse, info = torch.ops.hyperinf.spd_inverse(A)
        if info.any():
            raise ValueError("a matrix is not positive definite")
        return inverse

    return run


def _times(providers: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    for call in providers.values():
        call()
    return interleaved(providers, REPEATS)


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())

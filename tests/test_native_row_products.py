"""The compiled row_dots, span and span_dots against fp64, within the rounding that they state."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hyperinf_kernels.ops import row_dots, span, span_dots
from hyperinf_kernels.ops.row_products import rounding_of
from tests.native_cases import needs_kernels, on_cpu_kernels, random, shifted, threads

pytestmark = [needs_kernels, pytest.mark.usefixtures("isa")]
BOTH = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
OPS = ("row_dots", "span", "span_dots")


def assert_within(rows: list[Tensor], V: Tensor, B: Tensor, a: float) -> None:
    """Every number is within the stated bounds of exact arithmetic, norms included."""
    P, v, b = torch.cat(rows).double(), V.double(), B.double()
    with on_cpu_kernels(*OPS):
        dots, norms_sq = row_dots(rows, V)
        W, sizes_sq = span(rows, V, B, a)
        S, same = span_dots(rows, V, B, a)
    eta = rounding_of(rows, V)
    lengths, sizes = P.norm(dim=1), v.norm(dim=1)
    assert bool(((dots - P @ v.mT).abs() <= eta.dot * lengths[:, None] * sizes).all())
    assert bool(((norms_sq - lengths.square()).abs() <= eta.dot * lengths.square()).all())
    exact = a * v + b.mT @ P
    off = eta.sum * (b.abs().mT @ P.abs()) + eta.unit * exact.abs()
    assert bool(((W.double() - exact).abs() <= off * (1 + 1e-6)).all())
    torch.testing.assert_close(sizes_sq, W.double().square().sum(1), rtol=1e-12, atol=0)
    torch.testing.assert_close(same, sizes_sq, rtol=1e-12, atol=0)
    gap = (S - P @ W.double().mT).abs()
    assert bool((gap <= eta.dot * lengths[:, None] * W.double().norm(dim=1) * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 64, 255, 256, 257, 1000, 1025, 2100, 5000])
def test_any_number_of_columns(columns: int, dtype: torch.dtype) -> None:
    rows = [random(21, columns, dtype=dtype), random(2, columns, dtype=dtype, seed=3)]
    assert_within(rows, random(7, columns, seed=1), random(23, 7, seed=2), 0.5)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("queries", [*range(1, 18), 31, 32, 33, 40, 65, 100])
def test_any_number_of_queries(queries: int, dtype: torch.dtype) -> None:
    rows = [random(19, 300, dtype=dtype)]
    assert_within(rows, random(queries, 300, seed=1), random(19, queries, seed=2), -2.0)


@pytest.mark.parametrize("cuts", [(0, 1), (0, 5, 12, 13), (0, 31, 64), (0, 300, 301), (0, 1000)])
def test_any_number_of_rows_in_any_parts(cuts: tuple[int, ...]) -> None:
    P = random(cuts[-1], 700)
    rows = [P[i:j] for i, j in pairwise(cuts)]
    V, B = random(3, 700, seed=1), random(len(P), 3, seed=2)
    assert_within(rows, V, B, 1.0)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_all_terms_of_one_sign(scale: float) -> None:
    """Nothing cancels, so every rounding counts: the bound is in reach and holds."""
    rows = [scale * (1 + random(600, 4096).abs())]
    assert_within(rows, 1 + random(2, 4096, seed=1).abs(), random(600, 2, seed=2).abs(), 1.0)


def test_no_queries_give_the_norms_alone() -> None:
    rows = random(30, 500)
    dots, norms_sq = row_dots([rows], rows.new_empty(0, 500))
    assert tuple(dots.shape) == (30, 0)
    torch.testing.assert_close(norms_sq, rows.double().square().sum(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay(bad: float) -> None:
    for place in (0, 16, 299):
        rows = random(30, 300)
        rows[7, place] = bad
        norms_sq = row_dots([rows], rows[:0])[1]
        assert torch.nonzero(~norms_sq.isfinite()).flatten().tolist() == [7]


@pytest.mark.parametrize("queries", [1, 5, 33])
def test_threads_views_and_parts_change_no_bit(queries: int) -> None:
    P, V, B = random(130, 3000), random(queries, 3000, seed=1), random(130, queries, seed=2)

    def found(rows: list[Tensor], V: Tensor) -> list[Tensor]:
        return [*row_dots(rows, V), *span(rows, V, B, 0.7), *span_dots(rows, V, B, 0.7)]

    with threads(1):
        alone = found([P], V)
    wide = torch.full((130, 3100), float("nan"))
    wide[:, 50:3050] = P
    for count in (2, 3):
        with threads(count):
            for rows in ([P], [shifted(P)], [wide[:, 50:3050]]):
                for one, other in zip(alone, found(rows, shifted(V)), strict=True):
                    assert torch.equal(one, other)


def test_shapes_that_do_not_fit_are_refused() -> None:
    P, V = random(5, 8), random(2, 8)
    with pytest.raises(ValueError, match="share D"):
        row_dots([P], V[:, :7])
    with pytest.raises(ValueError, match="one dtype"):
        row_dots([P, P.double()], V)
    with pytest.raises(ValueError, match="n = 5"):
        span([P], V, random(4, 2), 1.0)
    with pytest.raises(ValueError, match="at least one"):
        row_dots([], V)

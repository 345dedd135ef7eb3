"""What tf32, three tf32 passes and bf16 do to a Schulz chain, by rounding operands in torch.

Triton's interpreter multiplies in fp32 whatever it is asked, and the compiled instruction only
proves which arithmetic runs. This is what that arithmetic can reach.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from hyperinf_kernels.ops.rounding import ROUNDOFF
from tests import oracle

D = 96


def tf32(x: Tensor) -> Tensor:
    """Rounded to 10 explicit bits, halves away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def one_pass(rounded: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: rounded(a) @ rounded(b)


def three_passes(a: Tensor, b: Tensor) -> Tensor:
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


PRODUCTS = {
    "ieee": torch.matmul,
    "tf32x3": three_passes,
    "tf32": one_pass(tf32),
    "bf16": one_pass(lambda x: x.bfloat16().float()),
}


def residual(condition: float, product: Callable[[Tensor, Tensor], Tensor]) -> float:
    """||I - A X||_F / sqrt(d) after plain steps from the safe start 1 / ||A||_inf."""
    A = torch.from_numpy(oracle.spd(np.logspace(0, -np.log10(condition), D), seed=0)).float()
    eye = torch.eye(D)
    X = eye / A.abs().sum(1).max()
    for _ in range(int(np.ceil(np.log2(condition))) + 8):
        X = product(X, 2 * eye - product(A, X))
    return float(oracle.inverse_residual(A, X))


def test_rounding_to_tf32_keeps_ten_bits() -> None:
    x = torch.randn(1000)
    assert ((tf32(x) - x).abs() <= x.abs() * 2.0**-11).all()
    assert (tf32(tf32(x)) == tf32(x)).all()
    half = torch.randn(1000).half().float()
    assert torch.equal(tf32(half), half), "either half is exact in tf32"
    assert torch.equal(tf32(half.bfloat16().float()), half.bfloat16().float())


@pytest.mark.parametrize("condition", [1e2, 1e4])
def test_three_passes_are_as_exact_as_fp32(condition: float) -> None:
    plain = residual(condition, PRODUCTS["ieee"])
    assert residual(condition, PRODUCTS["tf32x3"]) <= 2 * plain
    assert residual(condition, PRODUCTS["tf32"]) > 20 * plain


@pytest.mark.parametrize(("precision", "reaches"), [("tf32", 0.2), ("bf16", 0.5)])
def test_one_pass_contracts_up_to_its_largest_condition_and_not_far_beyond(
    precision: str, reaches: float
) -> None:
    largest = 1 / ROUNDOFF[precision]
    assert residual(largest, PRODUCTS[precision]) <= reaches
    beyond = residual(64 * largest, PRODUCTS[precision])
    assert not beyond <= reaches


def test_a_low_start_ends_as_exact_as_fp32_after_a_few_steps_of_it() -> None:
    condition = 200.0
    A = torch.from_numpy(oracle.spd(np.logspace(0, -np.log10(condition), D), seed=0)).float()
    eye = torch.eye(D)
    low = PRODUCTS["bf16"]
    X = eye / A.abs().sum(1).max()
    for _ in range(14):
        X = low(X, 2 * eye - low(A, X))
    assert oracle.inverse_residual(A, X) > 1e-3
    for _ in range(4):
        X = X @ (2 * eye - A @ X)
    assert oracle.inverse_residual(A, X) <= 2 * residual(condition, PRODUCTS["ieee"])

"""The types with which each kernel is compiled ahead of time, one variant per code path.

As a launch would infer them: batch strides in 64 bits, pointers and strides aligned to 16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .accumulate import _accumulate_kernel, _reduce_kernel
from .configs import Config
from .grad import _grad_kernel
from .launch import FUSED_QUERIES, QUERIES
from .per_sample import _per_sample_kernel
from .product import _product_kernel
from .registers import _schulz_registers_kernel
from .resident import _schulz_resident_kernel
from .sherman_morrison import _dots_kernel, _sum_kernel
from .topk import _topk_kernel

KERNELS = {
    "registers": _schulz_registers_kernel,
    "resident": _schulz_resident_kernel,
    "product": _product_kernel,
    "accumulate": _accumulate_kernel,
    "reduce": _reduce_kernel,
    "rows_dots": _dots_kernel,
    "rows_sum": _sum_kernel,
    "per_sample": _per_sample_kernel,
    "grad": _grad_kernel,
    "topk": _topk_kernel,
}
INT32_POINTERS = {"DEGREES", "STEPS_DONE", "ORDER"}
FLOATS = {"tol", "alpha", "sign"}
# strides over batch or samples, whose products leave 32 bits
WIDE = {"stride_ab", "stride_lb", "stride_rb", "stride_cb", "stride_vb", "stride_gb", "stride_ob",
        "stride_db", "stride_wq"}  # fmt: skip
ROWS_OF = {"bf16": "*bf16", "tf32": "*fp16", "tf32x3": "*fp32", "ieee": "*fp32"}


class Variant(NamedTuple):
    """One compilation: the kernel, its argument types, its constants, and what tells it apart."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]
    label: dict[str, Any]


def variants(config: Config) -> Iterator[Variant]:
    """Every variant that the launchers can start with this configuration."""
    constants: dict[str, Any] = dict(config.blocks)
    kernel = KERNELS[config.kernel]
    if "PRECISION" in kernel.arg_names:
        constants["PRECISION"] = config.precision
    rows = ROWS_OF[config.precision]
    if config.kernel == "product":
        for symmetric in (False, True):
            yield _variant(kernel, {**constants, "SYMMETRIC": symmetric}, {}, symmetric=symmetric)
    elif config.kernel == "accumulate":
        types = {"L": rows, "R": rows}
        # rows of L are summed over (GFIM) or along (Gram)
        yield _variant(kernel, {**constants, "SYMMETRIC": True, "stride_lm": 1}, types, op="gfim")
        gram = {**constants, "SYMMETRIC": False, "stride_lk": 1, "stride_rk": 1}
        yield _variant(kernel, gram, types, op="gram")
    elif config.kernel == "reduce":
        yield _variant(kernel, {**constants, "BLOCK": 128, "SYMMETRIC": True}, {})
    elif config.kernel in ("rows_dots", "rows_sum"):
        constants["QUERIES"] = 1 if config.up_to == 1 else QUERIES
        for kind in ("*fp32", "*bf16"):
            yield _variant(kernel, constants, {"G": kind}, rows=kind[1:])
    elif config.kernel == "per_sample":
        yield _variant(
            kernel,
            {**constants, "EXACT": "tf32x3", "QUERIES": FUSED_QUERIES},
            {"DELTA": rows, "ACT": rows},
        )
    elif config.kernel == "grad":
        yield _variant(kernel, constants, {"DELTA": rows, "ACT": rows})
    elif config.kernel == "topk":
        yield _variant(kernel, constants, {"POSITIONS": "*i64"})
    else:
        yield _variant(kernel, constants, {})


def _variant(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], **label: Any
) -> Variant:
    if "stride_rk" in kernel.arg_names:
        unit = {"stride_cn"} | ({"stride_rn"} if "stride_lm" in constants else set())
        constants = {**constants, **dict.fromkeys(unit, 1)}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name in INT32_POINTERS:
            signature[name] = "*i32"
        elif name.isupper() or name[:-1].isupper():
            signature[name] = "*fp32"
        elif name in FLOATS:
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name in WIDE else "i32"
    sizes = {"d", "rows", "cols", "columns", "depth", "per_split"}
    aligned = frozenset(
        n for n, kind in signature.items()
        if kind != "constexpr" and (kind.startswith("*") or n.startswith("stride_") or n in sizes)
    )  # fmt: skip
    return Variant(kernel, signature, constants, aligned, label)


def with_ones(variant: Variant) -> Variant:
    """The variant in which every size is 1, which a launch compiles as a constant of its own."""
    ones = {
        name: 1
        for name, kind in variant.signature.items()
        if kind == "i32" and not name.startswith("stride_")
    }
    return variant._replace(
        signature=variant.signature | dict.fromkeys(ones, "constexpr"),
        constants=variant.constants | ones,
        aligned=variant.aligned - set(ones),
    )

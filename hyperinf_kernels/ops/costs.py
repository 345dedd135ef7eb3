"""What dense algebra costs on a device: rates, and the choices that follow from them.

A rate is peak * size / (size + half): `half` is the size at which half the peak is reached. The
shipped figures are a fallback; `hyperinf bench --calibrate` measures this machine's.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import InputError
from .schedule import chain_products

FORMAT = 1
SMALLEST = 16.0  # size below which no rate is measured and the law is not trusted
# operations by what limits them; the suffix is the dtype of the arithmetic. `gfim` adds fp32 rows
# in fp64, `gram` in fp32, both symmetric but counted as full products
OPERATIONS = ("gemm_fp32", "gemm_fp64", "factor_fp64", "inverse_fp32", "inverse_fp64",
              "thin_fp64", "gfim", "gram")  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Flop per second of one operation: `peak`, reached by half at size `half`."""

    peak: float
    half: float

    def seconds(self, flop: float, size: float) -> float:
        return flop * (size + self.half) / (self.peak * size)


@dataclass(frozen=True)
class Rates:
    """The rates of one kind of device, and where they are from."""

    device: str
    source: str
    table: Mapping[str, Rate]

    def seconds(self, operation: str, flop: float, size: float) -> float:
        """Seconds of `flop` operations on matrices of about `size` on a side."""
        return self.table[operation].seconds(flop, max(SMALLEST, size))


def _rates(device: str, source: str, **table: tuple[float, float]) -> Rates:
    return Rates(device, source, {name: Rate(*figures) for name, figures in table.items()})


SHIPPED = {
    "cpu": _rates(
        "cpu", "shipped: calibrated with compiled kernels on 2 cores of an AMD EPYC, AVX-512",
        gemm_fp32=(2.1e11, 25), gemm_fp64=(1.03e11, 38), factor_fp64=(4.5e10, 370),
        inverse_fp32=(5.7e10, 5), inverse_fp64=(3.0e10, 355), thin_fp64=(7.2e10, 19),
        gfim=(4.0e11, 93), gram=(8.1e11, 265),
    ),
    "cuda": _rates(
        "cuda", "shipped: assumed from data sheets of data-centre GPUs, not measured",
        gemm_fp32=(4e13, 500), gemm_fp64=(3e13, 500), factor_fp64=(2e12, 4000),
        # a batch of inverses at its computed floor (`hyperinf_kernels.roofline`), which is below
        # every chain's; what cuSOLVER reaches of it is for a calibration to say
        inverse_fp32=(1.5e13, 500), inverse_fp64=(1e13, 500), thin_fp64=(5e11, 500),
        gfim=(3e13, 500), gram=(4e13, 500),
    ),
}  # fmt: skip


def rates_path() -> Path:
    """Where calibrated rates live: HYPERINF_RATES, else the user's cache folder."""
    given = os.environ.get("HYPERINF_RATES")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hyperinf_kernels" / "rates.json"


def rates_of(device: str | torch.device = "cpu") -> Rates:
    """The rates of this kind of device: calibrated ones where there are any, else the shipped.

    Raises:
        InputError: the calibrated file is damaged.
    """
    kind = torch.device(device).type
    path = rates_path()
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return SHIPPED.get(kind, SHIPPED["cuda"])
    found = _read(path, stamp)
    return found.get(kind, SHIPPED.get(kind, SHIPPED["cuda"]))


@functools.lru_cache(maxsize=8)
def _read(path: Path, stamp: int) -> Mapping[str, Rates]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']} instead of {FORMAT}")
        return {
            device: Rates(
                device,
                entry["source"],
                {name: _rate(name, entry["rates"][name]) for name in OPERATIONS},
            )
            for device, entry in document["devices"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: no usable rates ({type(error).__name__}: {error}); delete it or run "
            "hyperinf bench --calibrate"
        ) from None


def _rate(name: str, entry: Mapping[str, Any]) -> Rate:
    rate = Rate(float(entry["peak"]), float(entry["half"]))
    if not (0 < rate.peak < math.inf and 0 <= rate.half < math.inf):
        raise ValueError(f"{name} is {entry}")
    return rate


def as_document(found: Rates) -> dict[str, Any]:
    """What `rates_path()` holds after a calibration of one device."""
    table = {name: asdict(rate) for name, rate in found.table.items()}
    return {"format": FORMAT, "devices": {found.device: {"source": found.source, "rates": table}}}


def with_rates(path: Path, found: Rates) -> dict[str, Any]:
    """`as_document`, with the other devices that a good file at `path` already holds."""
    document = as_document(found)
    try:
        others = _read(path, path.stat().st_mtime_ns)
    except (OSError, InputError):
        return document
    for device, entry in others.items():
        if device != found.device:
            document["devices"] |= as_document(entry)["devices"]
    return document


def inverse_seconds(
    d: int, batch: int = 1, condition: float = 1e4, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu", rates: Rates | None = None,
) -> dict[Literal["direct", "schulz"], float]:  # fmt: skip
    """Predicted seconds of inverting `batch` SPD matrices of `d` on a side, by both routes.

    Direct is a Cholesky inverse, d^3 flop; Schulz the cheapest chain to the dtype's roundoff at
    this condition, one finishing step, and the fp64 products that measure its residual.
    """
    found = rates_of(device) if rates is None else rates
    suffix = "fp64" if dtype == torch.float64 else "fp32"
    product = 2.0 * d**3 * batch
    steps = chain_products(condition, max(torch.finfo(dtype).eps, 1e-8)) + 1
    schulz = found.seconds(f"gemm_{suffix}", steps * product, d)
    schulz += found.seconds("gemm_fp64", 2 * product, d)
    return {
        "direct": found.seconds(f"inverse_{suffix}", product / 2, d),
        "schulz": schulz,
    }


def cheaper_inverse(
    d: int, batch: int = 1, condition: float = 1e4, dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Literal["direct", "schulz"]:  # fmt: skip
    """The faster route for inverting SPD matrices, as predicted by `inverse_seconds`."""
    seconds = inverse_seconds(d, batch, condition, dtype, device)
    return min(seconds, key=seconds.__getitem__)

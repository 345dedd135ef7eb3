"""bergson's dense inverse of p^2 x p^2 Grams against our fp64 inverse of the same matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hyperinf_kernels import spd_inverse

from ..registry import Measurement, interleaved, measurements

from bergson.hessians.inversion import invert_psd_matrix  # isort: skip


def measure(quick: bool) -> Iterator[Measurement]:
    """One module at p = 16 and p = 32, and the p x p GFIM that HyperINF inverts instead."""
    for p in (8,) if quick else (16, 32):
        torch.manual_seed(0)
        rows = torch.randn(4 * p * p, p * p)
        H = rows.mT @ rows / len(rows)
        exact = torch.linalg.inv(_damped(H.double()))
        G = rows.view(-1, p, p)
        C = torch.einsum("nij,nik->jk", G, G).double() / len(G)
        times = interleaved(
            {
                "stock": lambda H=H: invert_psd_matrix(H, inversion="damped_inverse"),
                "drop-in": lambda H=H: spd_inverse(_damped(H.double())),
                "HyperINF's p x p": lambda C=C: spd_inverse(_damped(C)),
            },
            3 if quick else 7,
        )
        stock = invert_psd_matrix(H, inversion="damped_inverse")
        errors = {
            "stock": float((stock.double() - exact).norm() / exact.norm()),
            "drop-in": float((spd_inverse(_damped(H.double())) - exact).norm() / exact.norm()),
        }
        yield from measurements(f"dense inverse, p={p} ({p * p} x {p * p})", times, "stock", errors)


def _damped(H: torch.Tensor) -> torch.Tensor:
    size = H.shape[-1]
    return H + 0.1 * H.diagonal().mean() * torch.eye(size, dtype=H.dtype)

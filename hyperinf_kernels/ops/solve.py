"""What every inverse and solve shares: checks, the measured residual, the info, the refusals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import checks
from .dispatch import explain

PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")
COARSE = 0.1  # residual at which thin refinement takes over from dense products

Check = Literal["off", "bound", "full"]
CHECKS: tuple[Check, ...] = ("off", "bound", "full")
# how a residual is known, as `SolveInfo.known` counts them and as the compiled kernels do
KNOWN = ("nothing", "bound", "estimate from 4 probes", "measured")
NOTHING, BOUND, ESTIMATE, MEASURED = range(len(KNOWN))
# four probes show less than a tenth of an error of rank one twice in 10,000 times
OF_ESTIMATE = 10.0


@dataclass(frozen=True)
class SolveInfo:
    """What a solve did. Tensors hold one entry per matrix of the batch.

    Attributes:
        method: "schulz" or "direct".
        backend: the backend of the dense products.
        precision: the lowest arithmetic a chain ran in (asking is a permission; Triton's
            kernels up to d = 32 multiply in fp32).
        products: dense d x d products, the certifying one included, of the costliest matrix.
        iterations: Schulz steps, or thin refinements added to them, of the same.
        residual: ||I - A X||_F / ||I||_F or ||V - W A||_F / ||V||_F, known as `known` says; None
            with `check="off"`, which claims nothing.
        converged: residual, 10 times an estimate, within `tol`, or within the dtype's floor when
            `tol` is None; None with `check="off"`.
        fallback: None, or why (some) matrices were solved directly in fp64 instead.
        replaced: True where that direct result was returned.
        lowered: True where the chain ran in `precision` rather than in the matrix's own dtype.
        known: how each residual is known, as an index into `KNOWN`: a rigorous bound that rounding
            cannot pass, an estimate from 4 random vectors, or measured in fp64.
    """

    method: str
    backend: str
    precision: str
    products: int
    iterations: int
    residual: Tensor | None
    converged: Tensor | None
    fallback: str | None
    replaced: Tensor
    lowered: Tensor
    known: Tensor | None = None

    @property
    def residual_by(self) -> str | None:
        """`known` in words, all that occur; None where nothing is claimed."""
        if self.known is None or self.residual is None:
            return None
        return " and ".join(KNOWN[i] for i in self.known.unique().tolist())


def checked_shape(
    A: Tensor, tol: float | None = None, precision: str = "ieee", max_products: int = 64,
    check: str = "bound",
) -> Tensor:  # fmt: skip
    """A in its accumulation dtype, once its shape and the options are fit; no value is read."""
    checks.floating(A=A)
    checks.at_least(2, "(..., d, d)", A=A)
    checks.agree(A.shape[-1] == A.shape[-2], "A must hold square matrices (..., d, d)", A=A)
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if check not in CHECKS:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
    if max_products < 2:
        raise ValueError(f"max_products must be at least 2, got {max_products}")
    A = A.to(checks.accumulation_dtype(A))
    eps = torch.finfo(A.dtype).eps
    if tol is not None and not eps / 2 <= tol < 1:
        raise ValueError(
            f"tol must lie in [{eps / 2:.1e}, 1) for {A.dtype}, got {tol}; "
            f"no {A.dtype} result has a smaller residual, whatever the condition number"
        )
    return A


def refuse_unfit(A: Tensor) -> None:
    """Raise ValueError if a matrix is not finite, not symmetric, or has a diagonal not positive."""
    checks.finite_matrices("A", A)
    if A.numel():
        unfit = (A.diagonal(dim1=-2, dim2=-1) <= 0).any(-1)
        refuse_indefinite(unfit, "it has a diagonal entry that is not positive")
        size = A.abs().amax((-2, -1))
        skew = (A - A.mT).abs().amax((-2, -1))
        if bool((skew > 1e-3 * size).any()):
            raise ValueError("A must be symmetric; the largest |A - A^T| is over 1e-3 of max |A|")


def refuse_indefinite(bad: Tensor, why: str) -> None:
    """Raise ValueError naming the first bad matrix."""
    if bool(bad.any()):
        index = ", ".join(map(str, torch.nonzero(bad)[0].tolist()))
        name = f"A[{index}]" if index else "A"
        raise ValueError(f"{name} is not positive definite: {why}; add damping")


def cholesky_inverse64(A: Tensor, chosen: Tensor) -> Tensor:
    """fp64 inverses of the chosen matrices of the batch.

    Raises:
        ValueError: one of them is not positive definite, by its index.
    """
    factor, info = torch.linalg.cholesky_ex(A[chosen].double())
    failed = torch.zeros_like(chosen)
    failed[chosen] = info > 0
    refuse_indefinite(failed, "Cholesky fails in fp64")
    return torch.cholesky_inverse(factor)


def inverse_floor(A: Tensor, X: Tensor) -> Tensor:
    """The residual that rounding leaves in an inverse of this condition number, per matrix."""
    # a sum of what fp32 holds may leave it
    condition = _largest_row(A) * _largest_row(X)
    return (8 * torch.finfo(A.dtype).eps * condition).clamp_max(COARSE)


def _largest_row(A: Tensor) -> Tensor:
    return A.abs().sum(-1, dtype=torch.float64).amax(-1)


def refuse_overflow(X: Tensor, what: str = "the inverse of", remedy: str = "rescale A") -> None:
    """Raise ValueError naming the first matrix whose result left the range of its dtype."""
    bad = ~torch.isfinite(X).flatten(-2).all(-1)
    if bool(bad.any()):
        index = ", ".join(map(str, torch.nonzero(bad)[0].tolist()))
        name = f"A[{index}]" if index else "A"
        raise ValueError(f"{what} {name} overflows {X.dtype}; {remedy}")


def frobenius(M: Tensor) -> Tensor:
    """Frobenius norm per matrix."""
    return M.square().sum((-2, -1)).sqrt()


def inverse_residual(A: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    """I - A X in fp64, and its norm relative to I per matrix."""
    R = torch.eye(A.shape[-1], dtype=torch.float64, device=A.device) - A.double() @ X.double()
    return R, (frobenius(R) / A.shape[-1] ** 0.5).nan_to_num(torch.inf)


def within(residual: Tensor, known: Tensor, limit: Tensor | float) -> Tensor:
    """Where a residual is known to be within the limit."""
    return torch.where(known == ESTIMATE, OF_ESTIMATE * residual, residual) <= limit


def solve_info(
    A: Tensor,
    method: str,
    products: int,
    iterations: int,
    residual: Tensor,
    known: Tensor,
    tol: float | None,
    floor: Tensor,
    check: str,
    fallback: str | None = None,
    *,
    backend: str | None = None,
    precision: str = "ieee",
    replaced: Tensor | None = None,
    lowered: Tensor | None = None,
) -> SolveInfo:
    """The info of a finished solve of the batch of A; `floor` counts where `tol` is None."""
    lead = A.shape[:-2]
    residual, known, floor = (t.reshape(lead) for t in (residual, known, floor))
    reached = within(residual, known, tol if tol is not None else floor)
    if tol is not None and check != "off" and not bool(reached.all()):
        note = f"{A.dtype} attains about {float(residual[~reached].max()):.1e} here"
        fallback = f"{fallback}; {note}" if fallback else note
    nowhere = torch.zeros(lead, dtype=torch.bool, device=A.device)
    claims = check != "off"
    return SolveInfo(
        method=method,
        backend=explain("schulz", A).backend if backend is None else backend,
        precision=precision,
        products=products,
        iterations=iterations,
        residual=residual if claims else None,
        converged=reached if claims else None,
        fallback=fallback,
        replaced=nowhere if replaced is None else replaced.reshape(lead),
        lowered=nowhere if lowered is None else lowered.reshape(lead),
        known=known if claims else None,
    )


def no_info(A: Tensor, method: str, check: str) -> SolveInfo:
    """The info of an empty batch."""
    nothing = torch.zeros(A.shape[:-2], dtype=torch.float64, device=A.device)
    known = torch.full_like(nothing, MEASURED, dtype=torch.int8)
    return solve_info(A, method, 0, 0, nothing, known, None, nothing, check)

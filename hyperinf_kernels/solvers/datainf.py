"""DataInf: swap mean and inverse, then invert each rank-1 term by Sherman and Morrison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import explain, row_dots, span, span_dots
from ..ops.row_products import rounding_of
from .closed_form import Bounded, Certificate, certified, probed, probes
from .flat import FlatSolver
from .gram import MARGIN, REFINE_ABOVE, Seen, rooted, worst_ratio
from .planning import GRAM_PAYS
from .report import RESIDUAL_LIMIT, Outcome, angle, precision_of
from .rows import GradientRows
from .scaling import SAFE


class Weights(NamedTuple):
    """W = (V - C^T P) / lambda of one block, and what its rounding follows from."""

    C: Tensor  # (n, m): w_i (v.g_i) / n with w_i = 1 / (lambda + ||g_i||^2)
    dots: Tensor  # (n, m): v.g_i
    norms_sq: Tensor  # (n,): ||g_i||^2
    share: float  # mean_i w_i ||g_i||^2, below 1


class DataInf(FlatSolver):
    """W = V mean_i (g_i g_i^T + lambda I)^-1 on flattened gradients (arXiv 2310.00902).

    A closed form in two readings of the rows: their dot products with the queries and their norms,
    then their weighted sum, whose dot products with the rows are taken while these are in cache.
    The certificate is the relative error of the worst query against the same formula in exact
    arithmetic: a rigorous bound from norms that the formula has at hand; where that says too
    little, an estimate from 4 probes in fp64; queries that fail it are done again in fp64. How far
    the swap of mean and inverse is from the exact method is not in it; run `method="exact"` to see.
    Few rows beside the queries (n < 4 m) go by K = P P^T, judged by a sketch of P.
    """

    method = "datainf"
    takes_dots = True

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        flat = V.flatten(1)

        def estimate(X: Tensor, W: Tensor) -> Tensor:
            Z = probes(X.shape[1], X.device)
            return probed(W, Z, X, self._directions_of(name, Z).rows)

        W, known = certified(lambda X: self._directions_of(name, X), estimate, flat, self.check)
        outcome = self._outcome(name, flat, known, residual=known.error, residual_by=known.by)
        return W.view_as(V), outcome

    def _scores(
        self, name: str, V: Tensor, seen: Seen | None
    ) -> tuple[Tensor, Outcome, float | None]:
        rows, lam = self.rows[name], self.lambdas[name]
        few = rows.n < min(rows.width, GRAM_PAYS * len(V)) and self.check == "bound"
        if few and seen is None and (taken := self._taken(name, V)) is not None:
            seen = Seen(rows, V, taken[0].mT.to(V.dtype).contiguous())
        if seen is not None or few or not len(V):
            return super()._scores(name, V, seen)
        dots: list[Tensor] = []

        def formula(X: Tensor) -> Bounded:
            weights, eta = self._weights(name, X), rounding_of(rows.parts(), X)
            S, sizes_sq = span_dots(rows.parts(), X, weights.C / -lam, 1 / lam)
            dots.append(weights.dots)
            off = self._rounding(name, X, weights, sizes_sq) + eta.dot * sizes_sq.sqrt()
            off = off * weights.norms_sq.sum().sqrt()
            bound = off / torch.linalg.vector_norm(S, dim=0) + eta.unit
            return Bounded((-S.mT).to(X.dtype).contiguous(), bound.masked_fill_(off == 0, 0.0))

        def estimate(X: Tensor, S: Tensor) -> Tensor:
            signs = probes(rows.n, X.device)
            return probed(S, signs, X, -self._directions_of(name, rows.combine(signs)).rows)

        S, known = certified(formula, estimate, V, self.check)
        outcome = self._outcome(
            name, V, known, residual=known.error, residual_by=known.by,
            score_error=known.error, score_error_by=known.by,
        )  # fmt: skip
        return S, outcome, angle(-dots[0].mT, S)

    def _directions_of(self, name: str, V: Tensor) -> Bounded:
        """W (m, D) of V (m, D) in its dtype, and the bound of each row's relative error."""
        rows, lam = self.rows[name].parts(), self.lambdas[name]
        weights = self._weights(name, V)
        W, sizes_sq = span(rows, V, weights.C / -lam, 1 / lam)
        off = self._rounding(name, V, weights, sizes_sq)
        return Bounded(W, (off / sizes_sq.sqrt()).masked_fill_(off == 0, 0.0))

    def _weights(self, name: str, V: Tensor) -> Weights:
        rows, lam = self.rows[name], self.lambdas[name]
        dots, norms_sq = self._taken(name, V) or row_dots(rows.parts(), V)
        w = 1 / (rows.n * (lam + norms_sq))
        return Weights(dots * w[:, None], dots, norms_sq, float(w @ norms_sq))

    def _taken(self, name: str, V: Tensor) -> tuple[Tensor, Tensor] | None:
        """What `row_dots` gives, where it was taken while the rows arrived."""
        if self._foreseen is None or self.blocks[name].exponent:
            return None
        return self._foreseen.dots(name, V, self.rows[name].n)

    def _rounding(self, name: str, V: Tensor, weights: Weights, sizes_sq: Tensor) -> Tensor:
        """A bound of ||dW_q||, (m,); infinite where fp32 may have lost small numbers.

        With eta of dot products and eta_n of sums of rows: (eta share ||v|| + (eta_n + 2 eta + 3 u)
        sum_i |c_i| ||g_i|| + u ||v||) / lambda + u ||w||. Worst cases of every step, so nothing
        grows with n.
        """
        eta, lam = rounding_of(self.rows[name].parts(), V), self.lambdas[name]
        size = torch.linalg.vector_norm(V, dim=1, dtype=torch.float64)
        spread = weights.norms_sq.sqrt() @ weights.C.abs()
        off = (eta.dot * weights.share + eta.unit) * size
        off = (off + (eta.sum + 2 * eta.dot + 3 * eta.unit) * spread) / lam
        off += eta.unit * sizes_sq.sqrt()
        if V.dtype == torch.float64:
            return off
        squares = torch.stack([size.square(), sizes_sq])
        safe = ((squares > 1 / SAFE) & (squares < SAFE)).all(0)
        return off.masked_fill_(~(safe | (size == 0)), torch.inf)

    def _outcome(self, name: str, V: Tensor, known: Certificate, **figures: object) -> Outcome:
        return Outcome(
            backend=explain("row_dots", V, *self.rows[name].parts()).backend,
            precision=known.precision,
            condition_bound=self._condition_bound(name),
            converged=known.converged,
            **figures,  # type: ignore[arg-type]
        )

    def _half(self, name: str, V: Tensor) -> Tensor:
        # the mean of the inverses is (I - R^T R) / lambda, R = diag(sqrt(weights)) P
        rows, lam, gram = self.rows[name], self.lambdas[name], self.gram(name, fine=True)
        scale = (rows.n * (lam + gram.norms_sq)).rsqrt()
        c, U = torch.linalg.eigh(scale[:, None] * gram.whole() * scale)
        gain = -1 / (1 + (1 - c.clamp(0, 1)).sqrt())
        return (rooted(rows, V.flatten(1).double(), scale[:, None] * U, gain) / lam**0.5).to(
            V.dtype
        )

    def _in_gram_space(self, rows: GradientRows) -> bool:
        # W minus what it loses along the rows would cancel, whatever n is
        return True

    def _gram_scores(self, name: str, seen: Seen) -> tuple[Tensor, Outcome]:
        rows, lam, dtype, L = self.rows[name], self.lambdas[name], seen.V.dtype, seen.L
        few = rows.n < GRAM_PAYS * len(seen.V)
        by_gram = rows.n < rows.width and (name in self._grams or few)
        gram = self.gram(name) if by_gram else None
        # rounded norms would be no error that the check could see
        weights = 1 / (rows.n * (lam + rows.squares()))
        B = L.double() * weights
        image = rows.image(B.to(dtype)) if gram is None else gram.image(B)
        S = ((image - L.double()) / lam).to(dtype)
        precision = precision_of(dtype)
        if self.check == "off":
            return S, self._unchecked(name, 0, precision)
        error = self._error(name, seen, L, S, weights)
        if not error <= REFINE_ABOVE:
            # fp32 cancels where the damping is small beside the gradients
            L = seen.fine
            S = ((rows.image(L * weights) - L) / lam).to(dtype)
            error = self._error(name, seen, L, S, weights)
            precision = "fp64"
        return S, Outcome(
            backend=explain("gram_accumulate_", S, seen.V).backend,
            precision=precision,
            condition_bound=self._condition_bound(name),
            residual=error,
            residual_by="estimate",
            score_error=error,
            score_error_by="estimate",
            converged=MARGIN * error <= RESIDUAL_LIMIT,
        )

    def _error(self, name: str, seen: Seen, L: Tensor, S: Tensor, weights: Tensor) -> float:
        """The worst query's relative error of S against the formula, through the sketch of P.

        ((L diag(w)) K X - L X) / lambda is exact but for L diag(w), where the rounded L serves;
        what its rounding (known through X) does there is added as that of independent errors.
        """
        sketch, lam, L = self.sketch(name), self.lambdas[name], L.double()
        LX = seen.through(sketch)
        weighted = weights[:, None] * sketch.image
        gap = S.double() @ sketch.X - (L @ weighted - LX) / lam
        rounding = (L @ sketch.X - LX).square().sum(1)
        rounding = rounding * weighted.square().sum() / sketch.X.square().sum() / lam**2
        total = (gap.square().sum(1) + rounding) / sketch.X.shape[1]
        return worst_ratio(total.sqrt()[:, None], S)

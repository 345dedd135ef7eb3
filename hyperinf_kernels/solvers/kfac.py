"""K-FAC: the Fisher of a block as the Kronecker product of its two sides' second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops import gfim_accumulate_
from .base import Solver
from .directions import Direction, Sight, norms, rounded
from .gram import worst_ratio
from .inputs import Gradients
from .report import RESIDUAL_LIMIT, Outcome
from .rows import squares
from .scaling import exponent_for

EPS64 = torch.finfo(torch.float64).eps
ROUNDING = 8 * EPS64  # of fp64 products of long rows, generously
SLICE_NUMBERS = 1 << 20  # of gradients that are copied at a time

Tokens = Mapping[str, Sequence[tuple[Tensor, Tensor]]]
"""{block: [(left (t, r), right (t, d)), ...]}: the factors whose outer products, summed over one
sample's tokens, are its gradient (r, d); only tokens that the loss depends on."""


@dataclass
class Factors:
    """Sums over the training data: `rows` (r, r), `cols` (d, d) in fp64, and their normaliser.

    From tokens: sums of l l^T and of c c^T, and `weight` the number of tokens. From gradients
    alone: sums of g g^T and g^T g, and `weight` the sum of ||g||^2. Either way the Kronecker model
    of the mean outer product of gradients is rows (x) cols / (n weight), all in the units of the
    block, to which l takes what c does not: c is taken x 2^`right`. `lent` says that a saved state
    has the same tensors.
    """

    rows: Tensor
    cols: Tensor
    weight: float
    tokens: bool
    lent: bool = False
    right: int = 0

    def writable(self) -> Factors:
        """Itself, with sums that may grow in place."""
        if self.lent:
            self.rows, self.cols, self.lent = self.rows.clone(), self.cols.clone(), False
        return self


@dataclass(frozen=True)
class Basis:
    """Eigenvectors of both factors and the model's eigenvalues E (r, d), all fp64."""

    rows: Tensor
    cols: Tensor
    eigenvalues: Tensor

    def into(self, V: Tensor) -> Tensor:
        """Q_r^T V Q_c per sample, in V's dtype."""
        return self.rows.to(V.dtype).mT @ V @ self.cols.to(V.dtype)

    def out_of(self, V: Tensor) -> Tensor:
        """The way back."""
        return self.rows.to(V.dtype) @ V @ self.cols.to(V.dtype).mT


class KFAC(Solver):
    """W = V F^-1 with F = R (x) C + lambda I (arXiv 1503.05671), R (r, r) and C (d, d).

    When a model is attributed, g = sum_t delta_t a_t^T and the factors are sums over the tokens
    that the loss depends on: C the mean of a a^T over tokens, R the sum of delta delta^T over a
    sample's tokens, averaged over samples (for LoRA B, which is stored transposed, the other way
    round). On plain gradients there are no tokens, and the factors are C = mean g^T g and
    R = mean g g^T over their common trace mean ||g||^2; with one token per sample and either side
    of constant length both forms agree.

    The result is a closed form in the eigenvectors of both factors, evaluated in fp64; the report's
    residual is what rounding it to the dtype of the queries costs the worst of them. How far
    R (x) C is from the Fisher is not in it; `ekfac` comes closer, `exact` has no such gap.
    """

    method = "kfac"

    def reset(self) -> None:
        super().reset()
        self.factors: dict[str, Factors] = {}
        self._bases: dict[str, tuple[int, Basis]] = {}

    def update(self, grads: Gradients, *, copy: bool = True, tokens: Tokens | None = None) -> None:
        """Add a batch of per-sample training gradients.

        Args:
            grads, copy: as `Solver.update`.
            tokens: the token factors of the same batch, for every block; None: take both factors
                from the gradients. The same choice in every call.

        Raises:
            InputError: as `Solver.update`; a block without tokens, or tokens in some calls only.
        """
        given = [f.tokens for f in self.factors.values()]
        if given and given[0] != (tokens is not None):
            raise InputError("either every update has the tokens of its batch or none has")
        missing = sorted(set(grads) - set(tokens)) if tokens is not None else []
        if missing:
            raise InputError(f"block {missing[0]}: no tokens were given for it")
        super().update(grads, copy=copy)
        for name, batch in grads.items():
            if len(batch):
                self._accumulate(name, batch, None if tokens is None else tokens[name])

    def _accumulate(
        self, name: str, batch: Tensor, pairs: Sequence[tuple[Tensor, Tensor]] | None
    ) -> None:
        r, d = batch.shape[1:]
        batch = self.scaled(name, batch)
        if name not in self.factors:
            self.factors[name] = Factors(
                torch.zeros(r, r, dtype=torch.float64, device=batch.device),
                torch.zeros(d, d, dtype=torch.float64, device=batch.device),
                0.0,
                pairs is not None,
            )
        held = self.factors[name].writable()
        if pairs is None:
            # stacked by columns they are copied, so a few at a time
            for part in batch.split(max(1, SLICE_NUMBERS // (r * d))):
                gfim_accumulate_(held.rows, part, side="rows")
            gfim_accumulate_(held.cols, batch, side="cols")
            held.weight = self.blocks[name].sum_square
            return
        for left, right in pairs:
            if len(left):
                top = float(squares(right).max())
                if (exponent := exponent_for(top, held.right)) != held.right:
                    shift, held.right = exponent - held.right, exponent
                    held.rows, held.cols = held.rows * 4.0**-shift, held.cols * 4.0**shift
                whole = self.blocks[name].exponent - held.right
                gfim_accumulate_(held.rows, (left * 2.0**whole if whole else left).unsqueeze(1))
                if held.right:
                    right = right * 2.0**held.right
                gfim_accumulate_(held.cols, right.unsqueeze(1))
                held.weight += len(left)

    def _rescale(self, name: str, shift: int) -> None:
        held, unit = self.factors[name], 4.0**shift
        self.factors[name] = replace(
            held,
            rows=held.rows * unit,
            cols=held.cols if held.tokens else held.cols * unit,
            weight=held.weight if held.tokens else held.weight * unit,
            lent=False,
        )

    def _fit_block(self, name: str, lam: float) -> None:
        E = self.basis(name).eigenvalues
        # the trace rule means the model's own eigenvalues; for EK-FAC their mean is that of F
        self.lambdas[name] = lam = self._lambda(name, float(E.mean()))
        if lam + float(E.min()) <= 1e-12 * float(E.max()):
            raise InputError(
                f"block {name}: the damping ({self.damping}) resolves to {lam:g}, but the "
                "Kronecker factors are singular; increase the damping"
            )

    def basis(self, name: str) -> Basis:
        """Eigenvectors and undamped eigenvalues of one block."""
        return self.kronecker(name)

    def kronecker(self, name: str) -> Basis:
        """Eigenvectors of both factors and K-FAC's eigenvalues, once per set of rows."""
        n = self.blocks[name].n
        if name not in self._bases or self._bases[name][0] != n:
            held = self.factors[name]
            (rows, Q_r), (cols, Q_c) = torch.linalg.eigh(held.rows), torch.linalg.eigh(held.cols)
            E = torch.outer(rows.clamp_min(0), cols.clamp_min(0)) / max(n * held.weight, 1e-300)
            self._bases[name] = (n, Basis(Q_r, Q_c, E))
        return self._bases[name][1]

    def _direction(self, name: str, V: Tensor) -> Direction:
        basis, V64 = self.basis(name), V.double()
        E = basis.eigenvalues + self.lambdas[name]
        wide = basis.out_of(basis.into(V64) / E)
        W, lost = rounded(wide, V.dtype)
        outcome = Outcome(
            precision="fp64", condition_bound=float(E.max() / E.min()), products=1, converged=None
        )
        if self.check == "off":
            return Direction(W, outcome, lost)
        off = EPS64 if lost is None else worst_ratio(lost.flatten(1), wide.flatten(1))
        outcome = replace(
            outcome, residual=off, residual_by="measured", converged=off <= RESIDUAL_LIMIT
        )

        def doubt(sight: Sight) -> Tensor:
            whole = W.double() if lost is None else W.double() + lost
            return self._doubt(name, V64, whole, sight.image)

        return Direction(W, outcome, lost, doubt)

    def _doubt(self, name: str, V: Tensor, W: Tensor, image: Tensor) -> Tensor:
        """How far scores of W in fp64 are off because it is not V F^-1 to the last digit, (m,)."""
        held, basis, lam = self.factors[name], self.basis(name), self.lambdas[name]
        weight = max(self.blocks[name].n * held.weight, 1e-300)
        solved = basis.out_of(basis.into(image) / (basis.eigenvalues + lam))
        gap = V - (held.rows @ W @ held.cols / weight + lam * W)
        seen = gap.flatten(1) @ solved.flatten(1).mT
        return torch.hypot(norms(seen) / len(image) ** 0.5, self._hidden(name, V, W, image))

    def _hidden(self, name: str, V: Tensor, W: Tensor, image: Tensor) -> Tensor:
        """What fp64 rounding does to these scores, (m,): of the rotations there and back."""
        basis, lam = self.basis(name), self.lambdas[name]
        solved = basis.into(image) / (basis.eigenvalues + lam)
        sizes = norms(V) * float(solved.norm()) + norms(W) * float(image.norm())
        return ROUNDING * sizes / len(image) ** 0.5

    def _half(self, name: str, V: Tensor) -> Tensor:
        basis = self.basis(name)
        root = (basis.eigenvalues + self.lambdas[name]).rsqrt()
        return (basis.into(V.double()) * root).flatten(1).to(V.dtype)

    def self_influence(self, grads: Gradients) -> Tensor:
        # one rotation, no way back
        return self._squared_half(grads)

    def _merge(self, other: Self) -> None:
        for name, theirs in other.factors.items():
            mine = self.factors.get(name)
            if mine is None:
                copies = theirs.rows.clone(), theirs.cols.clone()
                self.factors[name] = replace(theirs, rows=copies[0], cols=copies[1], lent=False)
                continue
            if mine.tokens != theirs.tokens:
                raise InputError(f"block {name}: one solver has factors of tokens, the other none")
            mine = mine.writable()
            unit = 4.0 ** (mine.right - theirs.right)
            mine.rows += theirs.rows.to(mine.rows.device) / unit
            mine.cols += theirs.cols.to(mine.cols.device) * unit
            mine.weight += theirs.weight
        self._bases = {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state()
        meta["factors"] = {
            name: {"weight": f.weight, "tokens": f.tokens, "right": f.right}
            for name, f in self.factors.items()
        }
        return tensors, meta

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().restore(tensors, meta)
        for name, saved in meta["factors"].items():
            rows, cols = (tensors[f"{name}/{side} factor"] for side in ("row", "column"))
            self.factors[name] = Factors(rows, cols, **saved, lent=True)
            parts = [tensors[f"{name}/{part}"] for part in ("rows", "columns", "eigenvalues")]
            self._restore_basis(name, Basis(*parts))

    def _restore_basis(self, name: str, basis: Basis) -> None:
        self._bases[name] = (self.blocks[name].n, basis)

    def _tensors(self) -> dict[str, Tensor]:
        out = {}
        for name, held in self.factors.items():
            basis, held.lent = self.basis(name), True
            out[f"{name}/row factor"], out[f"{name}/column factor"] = held.rows, held.cols
            out[f"{name}/rows"], out[f"{name}/columns"] = basis.rows, basis.cols
            out[f"{name}/eigenvalues"] = basis.eigenvalues
        return out

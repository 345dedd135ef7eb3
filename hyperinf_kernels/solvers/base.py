"""What all solvers share: update(batch) -> fit() -> apply(V) -> report()."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import InputError
from ..ops.ambient import shielded
from ..ops.checks import accumulation_dtype
from .damping import DEFAULT_DAMPING, Damping, as_damping
from .directions import Direction, Sight, norms, spread
from .foreseen import Foreseen
from .inputs import Gradients, check_shapes, not_finite, row_squares
from .merging import check_mergeable
from .planning import SolvePlan
from .report import CHECKS, BlockReport, Check, Outcome, angle, precision_of, worse
from .rows import GradientRows, squares
from .scaling import SAFE, Scaled, check_range, deliver, exponent_for, hidden, scaled_rows

SOLVED = 4  # gradients of a call of self_influence by `half` that are solved and judged


@dataclass
class BlockState:
    """Running statistics of one block's training gradients, (n, r, d).

    What is kept of the block is that of its gradients x 2^exponent (see `scaling`), `sum_square`
    and the solver's lambda too; `top` is the largest squared norm of a gradient as given. `hidden`:
    some count as zeros only because they are so small.
    """

    shape: tuple[int, int]
    sum_square: float = 0.0
    n: int = 0
    top: float = 0.0
    exponent: int = 0
    hidden: bool = False

    @property
    def unit(self) -> float:
        """What a square of the given gradients counts here."""
        return 4.0**self.exponent

    @property
    def mean_square(self) -> float:
        return self.sum_square / (self.n * self.shape[0] * self.shape[1])


@shielded
class Solver:
    """Base of the influence methods: W = V A^-1 per block, with A from the training gradients.

    Subclasses keep what they need of each batch (`_keep`), and solve one block (`_solve`).
    `update` may be called any number of times with batches of any size; `fit` resolves the damping
    and may be called again after further updates; `apply` certifies what it returns.

    Args:
        damping: a `Damping`, or a number for `AbsoluteDamping`.
        check: what the certificate may cost: "off", "bound" or "full", see `report.Check`.
    """

    method: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]] = ()
    needs_damping: ClassVar[bool] = True
    closed_form: ClassVar[bool] = False  # `residual` is the relative error of W itself
    scale_free: bool = True  # whether a block's scale cancels, so that it may be worked on in range
    takes_dots: ClassVar[bool] = False  # scores follow from the rows' dots with the queries
    second_pass: bool = False  # whether fit needs every training gradient once more, by `revisit`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        shielded(cls)

    def __init__(
        self, damping: Damping | float = DEFAULT_DAMPING, *, check: Check = "bound"
    ) -> None:
        if check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
        self.damping, self.check = as_damping(damping), check
        self.reset()

    def reset(self) -> None:
        """Forget all gradients and reports; keep the options."""
        self.blocks: dict[str, BlockState] = {}
        self.lambdas: dict[str, float] = {}  # in the units of the block; reports have the true ones
        self._reports: dict[str, BlockReport] = {}
        self._foreseen: Foreseen | None = None

    def foresee(self, queries: Gradients | None) -> None:
        """Queries {block: (m, r, d)} that will be scored against the rows of the updates to come.

        Methods that need dot products of the two take them in the reading that checks the rows.
        None: forget them again.
        """
        self._foreseen = Foreseen(queries) if queries is not None and self.takes_dots else None

    def options(self) -> dict[str, Any]:
        """The constructor's options besides damping, as plain values."""
        return {name: getattr(self, name) for name in self.option_names}

    @property
    def n(self) -> int:
        """Training samples seen so far."""
        return next(iter(self.blocks.values())).n if self.blocks else 0

    def update(self, grads: Gradients, *, copy: bool = True) -> None:
        """Add a batch of per-sample training gradients.

        Args:
            grads: {block: (B, r, d)}, the same blocks and shapes in every call, one B per call.
            copy: whether a method that keeps the gradients copies them. False: the caller does not
                change them later.

        Raises:
            InputError: block names or shapes that do not fit, NaN or inf (block and row named), or
                no room in `folder`; nothing of the batch is kept then.
        """
        check_shapes(grads, {name: s.shape for name, s in self.blocks.items()}, "train")
        # all blocks are checked before any of them is taken in
        seen = self._foreseen
        sizes = {
            name: row_squares(
                name, batch, "train", self.n, None if seen is None else seen.take(name, batch)
            )
            for name, batch in grads.items()
        }
        # what is kept must not keep the graph that it came from
        grads = {name: batch.detach() for name, batch in grads.items()}
        self.lambdas = {}
        with self._all_or_nothing():
            for name, batch in grads.items():
                r, d = int(batch.shape[1]), int(batch.shape[2])
                state = self.blocks.setdefault(name, BlockState((r, d)))
                if len(batch):
                    total, top = torch.stack([sizes[name].sum(), sizes[name].max()]).tolist()
                    self._enter(name, state, max(top, state.top))
                    scaled = self.scaled(name, batch)
                    # zeros are rare, and where numbers are scaled up a few may be lost
                    if total == 0 or state.exponent > 0:
                        state.hidden |= bool(hidden(batch, None if total == 0 else scaled).any())
                    self._keep(name, scaled, copy and scaled is batch)
                    state.sum_square += total * state.unit
                    state.n += len(batch)

    def scaled(self, name: str, batch: Tensor) -> Tensor:
        """Gradients in the units of their block: the batch itself, unless its scale is extreme."""
        exponent = self.blocks[name].exponent
        return batch * 2.0**exponent if exponent else batch

    def _enter(self, name: str, state: BlockState, top: float) -> None:
        """Bring what is kept of a block to where gradients of squared norm `top` are in range."""
        exponent = exponent_for(top, state.exponent) if self.scale_free else 0
        if exponent != state.exponent:
            shift = exponent - state.exponent
            if state.n:
                self._rescale(name, shift)
            state.sum_square *= 4.0**shift
        state.top, state.exponent = top, exponent

    def revisit(self, grads: Gradients) -> None:
        """The second reading of a training batch, after all updates, where `second_pass` is True.

        Args:
            grads: {block: (B, r, d)}; all batches together the rows that `update` saw.
        """
        raise InputError(f"{self.method} reads the training gradients once; fit it directly")

    def fit(self) -> Self:
        """Resolve every block's damping.

        Raises:
            InputError: no training sample, a block whose gradients and damping are all zero, or
                a zero damping where the method needs one (HyperINF does not if its GFIM is
                regular).
        """
        if self.n == 0:
            raise InputError("there are no training gradients: update() was given zero rows")
        try:
            for name in self.blocks:
                self._resolve(name)
        except InputError:
            self.lambdas = {}  # not those of some blocks only
            raise
        self._reports = {}
        return self

    def apply(self, queries: Gradients) -> dict[str, Tensor]:
        """W = V A^-1 for every block.

        Args:
            queries: {block: (m, r, d)}, the fitted blocks, one m.

        Returns:
            {block: (m, r, d)} in fp32 (fp64 for fp64 input).

        Raises:
            InputError: names or shapes that do not fit, NaN or inf in queries or in the result.
        """
        if not self.lambdas:
            self.fit()
        solved = {}
        for name, direction in self.directions(queries):
            solved[name] = direction.W
            self.record(name, direction.outcome, direction.turn)
        return solved

    def directions(self, queries: Gradients) -> Iterator[tuple[str, Direction]]:
        """`apply` block by block, with what is known of its error and without a report."""
        for name, V, found in self.solved(queries):
            exponent = self.blocks[name].exponent
            # W = V A^-1, and A counts gradients twice
            W, outcome = self._delivered(name, found.W, V, 2 * exponent, found.outcome)
            if W is not found.W:
                found = found.scaled(W, outcome, 2.0**exponent, V.powers(exponent))
            yield name, replace(found, outcome=outcome, turn=angle(V.values, W))

    def solved(self, queries: Gradients) -> Iterator[tuple[str, Scaled, Direction]]:
        """(block, queries, their direction), all in the units of the block."""
        if not self.lambdas:
            self.fit()
        yield from self._applied(self.check_queries(queries))

    def deliver_scores(
        self, name: str, S: Tensor, V: Scaled, outcome: Outcome
    ) -> tuple[Tensor, Outcome]:
        """Scores (m, n) in the units of the block as they are for the gradients given."""
        return self._delivered(name, S, V, self.blocks[name].exponent, outcome)

    def foreseen_scores(self, name: str, V: Scaled) -> Tensor | None:
        """Scores (m, n) of all fitted rows, where they were taken while these arrived."""
        return None

    def scores_by_rows(
        self, name: str, V: Tensor, batches: Sequence[Tensor]
    ) -> tuple[Tensor, float] | None:
        """Scores (m, n) in fp64 of all fitted rows in a form in which nothing cancels, where there
        is one, and a bound of the worst query's relative error.
        """
        return None

    def finer(self, name: str, V: Tensor, batches: Sequence[Tensor]) -> Direction | None:
        """The direction once more after finer sums of all fitted rows, if that helps."""
        return None

    def _applied(self, queries: Mapping[str, Scaled]) -> Iterator[tuple[str, Scaled, Direction]]:
        for name, V in queries.items():
            if V.values.numel() == 0:
                yield name, V, Direction(torch.zeros_like(V.values), Outcome(residual=0.0))
            else:
                yield name, V, self._direction(name, V.values)

    def _direction(self, name: str, V: Tensor) -> Direction:
        """W (m, r, d) for V (m, r, d), m > 0, in a block's units."""
        W, outcome = self._solve(name, V)
        residual = outcome.residual
        if residual is None or not self.needs_damping:
            return Direction(W, outcome)

        def doubt(sight: Sight) -> Tensor:
            # what the residual is relative to: of a closed form W itself, else V
            if self.closed_form:
                return spread(residual * norms(W), sight.image.flatten(1))
            solved, _ = self._solve(name, sight.image.to(V.dtype))
            return spread(residual * norms(V), solved.double().flatten(1))

        return Direction(W, outcome, doubt=doubt)

    def check_queries(self, queries: Gradients) -> dict[str, Scaled]:
        """Queries in the range of fp32, in the dtype that their results have.

        Raises:
            InputError: names or shapes that were not fitted, NaN or inf.
        """
        check_shapes(queries, {name: s.shape for name, s in self.blocks.items()}, "query")
        found = {}
        for name, batch in queries.items():
            batch = batch.detach()
            sizes, dtype = row_squares(name, batch, "query"), accumulation_dtype(batch)
            found[name] = (
                scaled_rows(batch, sizes, dtype) if self.scale_free else Scaled(batch.to(dtype))
            )
        return found

    def _delivered(
        self, name: str, X: Tensor, V: Scaled, power: int, outcome: Outcome | None = None
    ) -> tuple[Tensor, Outcome]:
        """A result (m, ...) of queries V at their own scale; `power` brings it back from the block.

        What underflows in fp32 is not certified.

        Raises:
            InputError: NaN, inf, or beyond the range of fp32.
        """
        outcome = outcome or Outcome()
        X, bad, lost = deliver(X, V.powers(power))
        lost = lost if V.lost is None else lost | V.lost
        any_bad, any_lost = torch.stack([bad.any(), lost.any()]).tolist()
        if any_bad:
            raise not_finite(name, self.method, outcome.fallback)
        if any_lost:
            first = int(torch.nonzero(lost)[0])
            note = f"the result of query {first} is too small for {precision_of(X.dtype)}"
            converged = None if outcome.converged is None else False
            outcome = replace(outcome, converged=converged, fallback=note)
        return X, outcome

    def redamp(self, damping: Damping | float) -> Self:
        """Change the damping without a new pass over the training gradients.

        Scores and directions are those of a solver fitted with `damping` from the start. The report
        starts anew.

        Raises:
            InputError: a damping that this method or a block cannot take; the old one stays.
        """
        before, fitted = self.damping, bool(self.lambdas)
        self.damping = as_damping(damping)
        if not fitted:
            return self
        try:
            return self.fit()
        except InputError:
            self.damping = before
            self.fit()
            raise

    def merge(self, other: Self) -> Self:
        """Take over what another solver was updated with, as if this one had seen it afterwards.

        Sums are added and kept rows appended, so shards and ranks combine exactly (to the rounding
        of a sum in another order). `fit` again afterwards; `other` stays as it is.

        Raises:
            InputError: another method, option, damping, block or shape.
        """
        check_mergeable(self, other)
        if not other.blocks:
            return self
        with self._all_or_nothing():
            for name, theirs in other.blocks.items():
                mine = self.blocks.setdefault(name, BlockState(theirs.shape))
                self._enter(name, mine, max(mine.top, theirs.top))
                if theirs.n and theirs.exponent != mine.exponent:
                    other = other._twin()
                    other._rescale(name, mine.exponent - theirs.exponent)
            self._merge(other)
            for name, theirs in other.blocks.items():
                mine = self.blocks[name]
                mine.n += theirs.n
                mine.sum_square += theirs.sum_square * mine.unit / theirs.unit
                mine.hidden |= theirs.hidden
        self.lambdas, self._reports = {}, {}
        return self

    def plan(
        self, shapes: Mapping[str, tuple[int, int]], n: int, queries: int, device: str = "cpu"
    ) -> SolvePlan:
        """How every block would be solved, its predicted cost and memory, before anything runs.

        Args:
            shapes: {block: (r, d)}. n: training samples. queries: query gradients.
            device: whose rates to use, see `ops.costs`.

        Raises:
            InputError: a method without a cost model, or a size that is not at least 1.
        """
        raise InputError(f"{self.method} has no cost model, so no plan")

    def half(self, grads: Gradients) -> dict[str, Tensor]:
        """Embeddings whose dot products are influence: half(x) . half(y) = <x A^-1, y> per block.

        Args:
            grads: {block: (B, r, d)}, the fitted blocks.

        Returns:
            {block: (B, k)}; k is r d unless the method says otherwise. Influence is minus the sum
            of the blocks' dot products.

        Raises:
            InputError: a method without such a root (the message names those that have one), or
                what `apply` raises.
        """
        if type(self)._half is Solver._half:
            raise InputError(
                f"{self.method} has no half(), because it forms no symmetric root of its inverse; "
                f"methods that do: {', '.join(_with_half(Solver))}"
            )
        if not self.lambdas:
            self.fit()
        found = {}
        for name, V in self.check_queries(grads).items():
            root, bad, _ = deliver(self._half(name, V.values), V.powers(self.blocks[name].exponent))
            if bool(bad.any()):
                raise not_finite(name, f"{self.method}'s half()")
            found[name] = root
        return found

    def self_influence(self, grads: Gradients) -> Tensor:
        """-<g_k A^-1, g_k> summed over blocks, (B,), for given gradients; O(B r d) for `grad_dot`.

        What it costs per block beyond the dot products: one `apply` here, one rotation without the
        way back for `kfac` and `ekfac`. Methods that keep their training rows give the values of
        these rows from the Gram matrix alone by `own_influence`.

        Args:
            grads: {block: (B, r, d)}, the fitted blocks.

        Raises:
            InputError: as `apply`.
        """
        if not self.lambdas:
            self.fit()
        parts = []
        for name, V, direction in self._applied(self.check_queries(grads)):
            W, outcome = direction.W, direction.outcome
            own = -(W * V.values).sum((1, 2), keepdim=True)
            # none is lost for being small: what counts is its place among all
            own, bad, _ = deliver(own, V.powers(2 * self.blocks[name].exponent, 2))
            if bool(bad.any()):
                raise not_finite(name, self.method, outcome.fallback)
            parts.append(own.flatten())
            self.record(name, outcome, angle(V.values, W))
        return torch.stack(parts).sum(0)

    def _squared_half(self, grads: Gradients) -> Tensor:
        """`self_influence` of a method with a root: minus the squared length of `half`."""
        if not self.lambdas:
            self.fit()
        given = self.check_queries(grads)
        total, hardest = torch.zeros((), dtype=torch.float64, device="cpu"), {}
        for name, V in given.items():
            own = self._half(name, V.values).double().square().sum(1)
            # for the certificate, those of each block are solved all the way where most cancels
            sizes = squares(V.values.flatten(1))
            few = torch.where(sizes > 0, own / sizes, torch.inf).argsort()[:SOLVED]
            hardest[name] = V.some(few)
            powers = V.powers(2 * self.blocks[name].exponent, 2)
            total = total.to(own.device) - (own if powers is None else own * powers)
        for name, V, direction in self._applied(hardest):
            self.record(name, direction.outcome, angle(V.values, direction.W))
        total = total.to(accumulation_dtype(*grads.values()))
        if not bool(torch.isfinite(total).all()):
            raise InputError(
                f"{self.method} gave NaN or inf as self-influence "
                "(check damping and the scale of the gradients)"
            )
        return total

    @property
    def kept(self) -> Mapping[str, GradientRows] | None:
        """The training rows, of a method that keeps them."""
        return None

    def report(self) -> list[BlockReport]:
        """One entry per block, the worst over all `apply` and `scores` calls since `fit`."""
        return list(self._reports.values())

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Blocks and kept rows as before if adding to them fails, so that it can be tried again."""
        held = {key: dict(value) for key, value in vars(self).items() if isinstance(value, dict)}
        held["blocks"] = {name: replace(state) for name, state in self.blocks.items()}
        marks = {name: rows.mark() for name, rows in (self.kept or {}).items()}
        try:
            yield
        except BaseException:
            vars(self).update(held)
            for name, rows in (self.kept or {}).items():
                rows.back_to(marks[name])
            raise

    def _merge(self, other: Self) -> None:
        """Add what `other` kept; here for methods whose state is a set of sums."""
        mine = self._tensors()
        sums = {
            name: theirs.clone() if name not in mine else mine[name] + theirs.to(mine[name].device)
            for name, theirs in other._tensors().items()
        }
        self._take_tensors(mine | sums)

    def _twin(self) -> Self:
        """Another solver of what this one has seen, which may be rescaled by itself."""
        twin = copy.copy(self)
        for name, held in vars(self).items():
            if isinstance(held, dict):
                setattr(twin, name, dict(held))
        return twin

    def _rescale(self, name: str, shift: int) -> None:
        """Bring what is kept of a block to its gradients x 2^shift; no tensor changes in place."""

    def _half(self, name: str, V: Tensor) -> Tensor:
        """(B, k) for V (B, r, d)."""
        raise NotImplementedError

    def record(self, name: str, outcome: Outcome, collapse_angle: float | None) -> None:
        """Put how a block was solved into the report."""
        state = self.blocks[name]
        entry = BlockReport(
            block=name,
            method=self.method,
            n=state.n,
            shape=state.shape,
            damping=self.lambdas[name] / state.unit,
            collapse_angle=collapse_angle,
            **outcome.__dict__,
        )
        before = self._reports.get(name)
        self._reports[name] = entry if before is None else worse(before, entry)

    def _condition_bound(self, name: str) -> float | None:
        """1 + trace / lambda: the damping bounds the spectrum below, the trace above."""
        state, lam = self.blocks[name], self.lambdas[name]
        return 1 + state.sum_square / state.n / lam if lam > 0 else None

    def _mean_eigenvalue(self, state: BlockState) -> float:
        """trace / dimension of the flattened Fisher; the GFIM has its own."""
        return state.mean_square

    def _keep(self, name: str, batch: Tensor, copy: bool) -> None:
        """Keep what later steps need of a batch (B, r, d) in the block's units, B > 0; `copy`: not
        the tensor itself.
        """

    def _resolve(self, name: str) -> None:
        """Damping and preparation of one block."""
        state = self.blocks[name]
        if self.scale_free:
            check_range(name, state.top)
        if state.hidden and (state.top == 0 or state.exponent > 0):
            raise InputError(
                f"block {name}: its gradients hold numbers so small that they or their squares "
                "count as zeros; rescale the loss"
            )
        lam = self._lambda(name, self._mean_eigenvalue(state))
        self.lambdas[name] = lam
        if state.exponent and not lam <= SAFE:
            raise InputError(
                f"block {name}: the damping {lam / state.unit:.1e} is more than {SAFE:.0e} times "
                "the squares of its gradients, which play no part beside it; rescale the loss or "
                "the damping"
            )
        self._fit_block(name, lam)
        if state.sum_square == 0 and self.lambdas[name] == 0 and self.needs_damping:
            raise InputError(
                f"block {name}: every training gradient is zero, so its curvature is singular "
                f"and its damping ({self.damping}) is zero. An untrained LoRA adapter (B = 0) "
                "does this; train it, leave the block out, or add an absolute damping"
            )

    def _lambda(self, name: str, mean_eigenvalue: float) -> float:
        """The damping rule's value in the units of a block."""
        state = self.blocks[name]
        rule = replace(self.damping, absolute=self.damping.absolute * state.unit)
        return rule.value(state.mean_square, mean_eigenvalue)

    def _fit_block(self, name: str, lam: float) -> None:
        """Prepare one block once its damping is known."""

    def _solve(self, name: str, V: Tensor) -> tuple[Tensor, Outcome]:
        """W (m, r, d) for V (m, r, d), m > 0."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a saved solver consists of: tensors by name, and plain values for JSON."""
        meta = {name: {**vars(s), "shape": list(s.shape)} for name, s in self.blocks.items()}
        return self._tensors(), {"blocks": meta}

    def restore(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over a saved `state`, replacing everything seen so far."""
        self.reset()
        for name, saved in meta["blocks"].items():
            r, d = saved["shape"]
            self.blocks[name] = BlockState(**{**saved, "shape": (r, d)})
        self._take_tensors(tensors)

    def _tensors(self) -> dict[str, Tensor]:
        return {}

    def _take_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `_tensors`."""


def _with_half(kind: type[Solver]) -> list[str]:
    """Methods that define `_half` or `half` themselves, by name."""
    names = []
    for sub in kind.__subclasses__():
        has_root = sub._half is not Solver._half or sub.half is not Solver.half
        if has_root and "method" in vars(sub):
            names.append(sub.method)
        names += _with_half(sub)
    return sorted(set(names))

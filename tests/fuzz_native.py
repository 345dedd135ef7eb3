"""Hostile calls of the compiled ops: `python -m tests.fuzz_native [--cases 10000] [--seed 0]`.

Every case is one raw op on tensors of random shapes, strides, dtypes and values: NaN, inf, empty,
expanded to sizes beyond memory, overlapping, of the wrong rank or dtype. A case passes when
the op returns numbers of the right shape, or raises an error that names an argument. A crash ends
the process; build with sanitizers to see the rest (docs/cpu-kernels.md).
"""

from __future__ import annotations

import argparse
import collections
import random
import re
from collections.abc import Callable

import torch
from torch import Tensor

from hyperinf_kernels.ops import native

SIZES = (0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 65)
HUGE = (1 << 33, 1 << 40, (1 << 61) + 1)
DTYPES = (
    torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float64,
    torch.float16, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 3e38, -1e30)
# an error must name one of these, or say in torch's own words what is wrong with the tensor
NAMED = re.compile(
    r"\b(V|G|damping|C|X|Y|A|start|coefficients|degrees|delta|act|delta1|act1|delta2|act2)\b"
    r"|no memory for"
)


class Fuzzer:
    """Draws the arguments of every op from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def size(self) -> int:
        return self.random.choice(SIZES)

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Mostly of this shape and dtype; sometimes wrong in one respect."""
        wrong = self.random.random()
        sizes = list(shape)
        if wrong < 0.03:
            sizes = sizes[:-1]
        elif wrong < 0.06:
            sizes = [*sizes, 2]
        elif wrong < 0.16 and sizes:
            sizes[self.random.randrange(len(sizes))] = self.size()
        if 0.16 <= wrong < 0.22:
            dtype = self.random.choice(DTYPES)
        values = torch.randn(sizes, generator=self.generator)
        if self.chance(0.1) and values.numel():
            where = self.random.randrange(values.numel())
            values.view(-1)[where] = self.random.choice(SPECIAL)
        values = values.to(dtype)
        return self.layout(values)

    def layout(self, t: Tensor) -> Tensor:
        """The same shape at other addresses: strided, shifted, expanded, turned, of huge size."""
        kind = self.random.randrange(14)
        if t.ndim == 0 or kind < 6:
            return t
        axis = self.random.randrange(t.ndim)
        if kind == 6:
            return t.repeat_interleave(2, axis).narrow(axis, 0, 2 * t.shape[axis])[
                tuple(slice(None, None, 2) if i == axis else slice(None) for i in range(t.ndim))
            ]
        if kind == 7:
            return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
        if kind == 8 and t.shape[axis]:
            return t.narrow(axis, 0, 1).expand_as(t)
        if kind == 9 and t.ndim > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == 10 and t.ndim > 1:
            return t.movedim(0, -1).contiguous().movedim(-1, 0)
        if kind == 11 and t.numel():
            # rows that lie in each other
            return t.flatten().as_strided(t.shape, [1] * t.ndim) if sum(t.shape) < t.numel() else t
        if kind == 12 and t.shape[axis]:
            # more numbers than any memory holds, behind one: only an error can come of it
            sizes = list(t.shape)
            sizes[axis] = self.random.choice(HUGE)
            total = 1
            for size in sizes:
                total *= max(1, size)
            return t.narrow(axis, 0, 1).expand(sizes) if total < 1 << 62 else t
        return t

    def rows(self) -> torch.dtype:
        return self.random.choice((torch.float32, torch.float32, torch.bfloat16))

    def spd(self, batch: int, d: int) -> Tensor:
        if self.chance(0.3):
            return self.tensor(batch, d, d)
        A = torch.randn(batch, d, d, generator=self.generator)
        return self.layout(A @ A.mT + 0.1 * torch.eye(d))

    # --- one method per op: its arguments ------------------------------------------------------

    def sherman_morrison(self) -> tuple:
        b, m, n, d = self.size() % 5, self.size(), self.size(), self.size()
        G = self.tensor(b, n, d, dtype=self.rows())
        V, damping = self.tensor(b, m, d), self.tensor(b)
        if G.ndim == 3 and G.shape[1] >= HUGE[0]:
            # rows without end are fit to be summed, which would take as long
            V, G = V[..., :0], G[..., :0]
        return V, G, damping

    def gram_accumulate_(self) -> tuple:
        b, n1, n2, d = self.size() % 5, self.size(), self.size(), self.size()
        own = self.chance(0.5)
        total = self.random.choice((torch.float32, torch.float64))
        dtype = self.rows()
        X = self.tensor(b, n1, d, dtype=dtype)
        Y = None if own else self.tensor(b, n2, d, dtype=dtype)
        C = self.tensor(b, n1, n1 if own else n2, dtype=total)
        if X.ndim == 3 and X.shape[2] >= HUGE[0]:
            X = X[:, :0]
        if self.chance(0.1) and X.ndim == 3 and X.dtype == total and X.numel() < 1 << 20:
            # the sum in the memory of its rows
            storage = torch.zeros(X.numel() + C.numel() + 8, dtype=total)
            if C.ndim == 3 and C.numel() < 1 << 20:
                shift = self.random.randrange(X.numel() + 1)
                X = storage[: X.numel()].view(X.shape)
                C = storage[shift : shift + C.numel()].view(C.shape)
        return C, X, Y, self.random.choice((1.0, 0.5, 0.0, -3.0, float("nan"), 1e300))

    def factors(self) -> tuple[Tensor, Tensor]:
        b, t = self.size() % 9, self.size()
        dtype = self.rows()
        return (
            self.tensor(b, t, self.size(), dtype=dtype),
            self.tensor(b, t, self.size(), dtype=dtype),
        )

    def per_sample_grad(self) -> tuple:
        return self.factors()

    def per_sample_norm_sq(self) -> tuple:
        return *self.factors(), self.chance(0.5)

    def per_sample_dot(self) -> tuple:
        delta, act = self.factors()
        return delta, act, self.tensor(self.size() % 9, *_last(delta), *_last(act))

    def pairwise_dot(self) -> tuple:
        delta, act = self.factors()
        b, t = self.size() % 9, self.size()
        second = (self.tensor(b, t, *_last(f), dtype=delta.dtype if delta.is_floating_point()
                              else torch.float32) for f in (delta, act))  # fmt: skip
        return delta, act, *second, self.chance(0.5)

    def schulz(self) -> tuple:
        b, d, steps = self.size() % 9, self.random.choice((*SIZES, 127, 128, 129)), self.size() % 6
        degrees = [self.random.choice((2, 2, 3, 5, 9)) for _ in range(steps)]
        if self.chance(0.1):
            degrees = [self.random.choice((0, 1, -2, -(1 << 62), 1 << 62)), *degrees]
        return self.spd(b, d), self.tensor(b), self.tensor(b, len(degrees), 8), degrees

    def spd_inverse(self) -> tuple:
        A = self.spd(self.size(), self.random.choice((*SIZES, 127, 128, 129)))
        return A, self.chance(0.5)


OPS = [
    "sherman_morrison", "gram_accumulate_", "per_sample_grad", "per_sample_norm_sq",
    "per_sample_dot", "pairwise_dot", "schulz", "spd_inverse",
]  # fmt: skip


def _last(t: Tensor) -> tuple[int, ...]:
    """The last size, small enough to make a tensor of."""
    return (min(t.shape[-1], 65),) if t.ndim else (1,)


def run(op: str, seed: int) -> str:
    """One case: what became of it. Raises AssertionError when it is neither result nor error."""
    fuzzer = Fuzzer(seed)
    draw: Callable[[], tuple] = getattr(fuzzer, op)
    args = draw()
    try:
        out = getattr(torch.ops.hyperinf, op)(*args)
    except RuntimeError as error:
        if not NAMED.search(str(error).splitlines()[0]):
            raise AssertionError(f"{op} {seed}: this names no argument: {error}") from error
        return "refused"
    for t in out if isinstance(out, tuple) else (out,):
        assert t is None or t.dtype in (torch.float32, torch.int32), f"{op} {seed}: {t.dtype}"
        if t is not None and t.device.type == "cpu":
            t.double().sum().item()  # every number can be read
    return "computed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if native.missing():
        raise SystemExit(native.missing())
    torch.set_num_threads(2)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    for case in range(options.cases):
        op = OPS[case % len(OPS)]
        seen[op, run(op, options.seed + case)] += 1
    for (op, what), count in sorted(seen.items()):
        print(f"{op:20} {what:9} {count}")


if __name__ == "__main__":
    main()

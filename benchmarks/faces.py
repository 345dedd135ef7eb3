"""What the face of an op costs beside the kernel behind it: the same call on tiny tensors.

`face` is the public function as a caller writes it, `raw op` the compiled op on tensors that are
already as it wants them (for top-k, which has none, its lines of torch). What lies between is
checks, the choice of a backend and reshaping; the note gives it in microseconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import hyperinf_kernels as hk
from hyperinf_kernels.ops import reference
from hyperinf_kernels.ops.topk import topk_empty, topk_merge_

from .native import need_kernels
from .registry import Measurement, benchmark, interleaved, measurements

CALLS = 200  # per round, so that a round is long beside the clock's resolution
Providers = dict[str, Callable[[], object]]


@benchmark("faces")
def faces(quick: bool) -> Iterator[Measurement]:
    """Every public op that has a compiled kernel, on one thread."""
    need_kernels()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case, providers in _cases().items():
            times = interleaved({n: _many(f) for n, f in providers.items()}, 9 if quick else 45)
            times = {name: [t / CALLS for t in values] for name, values in times.items()}
            # the least of many rounds: what other programs add is never negative
            raw, face = (statistics.median(sorted(times[n])[:5]) for n in ("raw op", "face"))
            for row in measurements(case, times, "raw op"):
                note = f"{1e6 * (face - raw):.1f} us over the raw op"
                yield replace(row, note=note if row.provider == "face" else "")
    finally:
        torch.set_num_threads(threads)


def _many(call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(CALLS):
            call()

    calls()
    return calls


def _cases() -> dict[str, Providers]:
    raw = torch.ops.hyperinf
    V, G = torch.randn(1, 8), torch.randn(4, 8)
    delta, act = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    one = torch.randn(1, 4, 5)
    K, rows = torch.zeros(32, 32), torch.randn(32, 8)
    C, grads = torch.zeros(32, 32), torch.randn(2, 4, 32)
    flat = grads.flatten(0, 1)[None]
    A = torch.eye(4)[None]
    values, positions = topk_empty(2, 4)
    batch = torch.randn(2, 3)
    batches = V[None], G[None]

    return {
        "sherman_morrison, 1 query, 4 x 8": {
            "raw op": lambda: raw.sherman_morrison(*batches, torch.full((1,), 0.1)),
            "face": lambda: hk.sherman_morrison(V, G, 0.1),
        },
        "per_sample_grad, 2 x 3 tokens, 4 x 5": {
            "raw op": lambda: raw.per_sample_grad(delta, act),
            "face": lambda: hk.per_sample_grad(delta, act),
        },
        "per_sample_norm_sq, 2 x 3 tokens, 4 x 5": {
            "raw op": lambda: raw.per_sample_norm_sq(delta, act, False),
            "face": lambda: hk.per_sample_norm_sq(delta, act),
        },
        "per_sample_dot, 2 x 3 tokens, 4 x 5": {
            "raw op": lambda: raw.per_sample_dot(delta, act, one),
            "face": lambda: hk.per_sample_dot(delta, act, one),
        },
        "pairwise_dot, 2 x 3 tokens, 4 x 5": {
            "raw op": lambda: raw.pairwise_dot(delta, act, delta, act, False),
            "face": lambda: hk.pairwise_dot(delta, act, delta, act),
        },
        "gram_accumulate_, 32 x 8": {
            "raw op": lambda: raw.gram_accumulate_(K[None], rows[None], None, 1.0),
            "face": lambda: hk.gram_accumulate_(K, rows),
        },
        "gfim_accumulate_, 2 x 4 x 32": {
            "raw op": lambda: raw.gram_accumulate_(C[None], flat.mT, None, 1.0),
            "face": lambda: hk.gfim_accumulate_(C, grads),
        },
        "spd_inverse, 1 x 4 x 4": {
            "raw op": lambda: raw.spd_inverse(A, True),
            "face": lambda: hk.spd_inverse(A),
        },
        "topk_merge_, 2 x 4, plain torch": {
            "raw op": lambda: reference.topk_merge_(values, positions, batch, 0, False),
            "face": lambda: topk_merge_(values, positions, batch, 0),
        },
    }

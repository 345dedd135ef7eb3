"""Every door as a person calls it, defaults on, beside plain torch and beside the floor.

    python -m benchmarks doors doors-avx2

`doors-avx2` runs the same on what a processor without AVX-512 has, for us, for torch's own loops
and for its products alike. A ratio is plain torch's median over the door's; the note is the door's
multiple of the floor, which is bytes at the measured read rate plus operations at the measured rate
of the best product here. Errors are against fp64. Doors with a model inside are in `hooks` and
`job`, adapters of installed libraries in `python -m benchmarks.drop_in`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

import hyperinf_kernels as hk
from hyperinf_kernels.integrations.hyperinf import IFEngine

from . import floor, plain, published
from .registry import Measurement, benchmark, interleaved, measurements

PLAIN, OURS = "plain torch", "hyperinf_kernels"
AVX2 = {
    "HYPERINF_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}  # fmt: skip
Call = Callable[[], object]


@benchmark("doors")
def doors(quick: bool) -> Iterator[Measurement]:
    """All doors on the instruction set at hand."""
    rates = floor.measure()
    yield Measurement("this machine", "plain reading", 1e9 / rates.read, 0, 0, floor.TRIES, 1,
                      note=f"{rates.read / 1e9:.1f} GB/s")  # fmt: skip
    yield Measurement("this machine", "best fp32 product", 1e9 / rates.product, 0, 0, floor.TRIES,
                      1, note=f"{rates.product / 1e9:.0f} GFLOP/s")  # fmt: skip
    yield from _influence(rates, quick)
    yield from _released(quick)
    yield from _inverses(quick)
    yield from _sums(rates, quick)


@benchmark("doors-avx2")
def doors_avx2(quick: bool) -> Iterator[Measurement]:
    """The same in a process of its own, without AVX-512."""
    words = [sys.executable, "-m", "benchmarks.doors", *(["--quick"] if quick else [])]
    with subprocess.Popen(
        words, env={**os.environ, **AVX2}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield Measurement(**json.loads(line))
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")


def _influence(rates: floor.Floor, quick: bool) -> Iterator[Measurement]:
    """Three blocks of 1,500 x 16 x 1,024, and wide ones as of a 13B model."""
    n, r, d, blocks = (300, 8, 256, 2) if quick else (1500, 16, 1024, 3)
    train = _gradients(n, r, d, blocks)
    rows, width = train["b0"], r * d
    symmetric = {"hyperinf": n * r * d * d, "exact": n * n * width, "kfac": n * width * (r + d),
                 "ekfac": n * width * (r + d)}  # fmt: skip
    for method in plain.METHODS:
        for m in (1, 32, 100) if method == "datainf" else (1, 32):
            query = _gradients(m, r, d, blocks, seed=1)
            passes = {"grad_dot": (2, 1), "datainf": (3, 3)}.get(method, (1, 2))
            if method in symmetric:
                least = rates.products(blocks * symmetric[method])
                least += blocks * floor.cholesky(n if method == "exact" else d)
            else:
                least = max(
                    rates.reads(rows, times=blocks * passes[0]),
                    rates.products(blocks * passes[1] * 2.0 * m * n * width),
                )
            yield from _scored(method, train, query, least, 3 if method in symmetric else 9)
    n, r, d, blocks = (200, 8, 512, 2) if quick else (900, 8, 5120, 8)
    train = _gradients(n, r, d, blocks)
    for m in (1, 32):
        query = _gradients(m, r, d, blocks, seed=1)
        least = max(
            rates.reads(*train.values(), times=3), rates.products(blocks * 6.0 * m * n * r * d)
        )
        yield from _scored("datainf", train, query, least, 7)


def _scored(
    method: str,
    train: Mapping[str, Tensor],
    query: Mapping[str, Tensor],
    least: float,
    repeats: int,
) -> Iterator[Measurement]:
    providers: dict[str, Call] = {
        PLAIN: lambda: plain.influence(method, train, query),
        OURS: lambda: hk.influence(train, query, method),
        f"{OURS}, check='off'": lambda: hk.influence(train, query, method, check="off"),
    }
    truth = plain.influence(method, train, query, wide=True)
    scores = hk.influence(train, query, method)
    errors = {PLAIN: _worst(plain.influence(method, train, query), truth),
              OURS: _worst(scores.values, truth)}  # fmt: skip
    n, r, d = next(iter(train.values())).shape
    case = f"influence {method}, {len(train)} of {n} x {r} x {d}, m={len(truth)}"
    words = "certified" if scores.certificate()["certified"] else "not certified"
    yield from _beside_floor(case, providers, errors, least, repeats, words)


def _released(quick: bool) -> Iterator[Measurement]:
    """The released repositories' loops, whole calls on dictionaries: the mean of 50 queries."""
    n, r, d, blocks, queries = (60, 4, 64, 2, 5) if quick else (1500, 16, 1024, 3, 50)
    train, query = _gradients(n, r, d, blocks), _gradients(queries, r, d, blocks, seed=1)
    samples, asked = ([{k: t[i] for k, t in g.items()} for i in range(len(g["b0"]))]
                      for g in (train, query))  # fmt: skip
    mean = published.mean_sample(asked)
    for name, key, loop in (
        ("DataInf", "datainf", published.datainf_products),
        ("HyperINF", "iterative", published.hyperinf_products),
    ):

        def ours(key: str = key) -> object:
            engine = IFEngine()
            engine.preprocess_gradients(dict(enumerate(samples)), dict(enumerate(asked)))
            getattr(engine, f"compute_hvp_{key}")()
            engine.compute_IF()
            return engine.IF_dict[key]

        providers: dict[str, Call] = {
            "released loop": lambda loop=loop: published.scores(samples, loop(samples, mean)),
            "IFEngine, whole call": ours,
            "influence on the same rows": lambda key=key: hk.influence(
                train, {k: t.mean(0, keepdim=True) for k, t in query.items()},
                "hyperinf" if key == "iterative" else "datainf",
            ),
        }  # fmt: skip
        case = f"released {name}, {blocks} of {n} x {r} x {d}, mean of {queries}"
        times = interleaved(providers, 3)
        yield from measurements(case, times, "released loop")


def _inverses(quick: bool) -> Iterator[Measurement]:
    for side, batch in ((16, 4096), (32, 2048), (64, 512), (256, 32), (1024, 2)):
        A = _definite(batch // 8 or 1 if quick else batch, side)
        truth = torch.linalg.inv(A.double())
        found = hk.schulz_inverse(A)
        error = _worst(found.flatten(1), truth.flatten(1))
        steps = _steps_to(A, truth, error)
        loop = f"baddbmm loop, {steps} steps"
        V = torch.randn(len(A), 4, side)
        providers: dict[str, Call] = {
            loop: lambda A=A, steps=steps: plain.schulz(A, steps),
            "schulz_inverse": lambda A=A: hk.schulz_inverse(A),
            "schulz_inverse, check='off'": lambda A=A: hk.schulz_inverse(A, check="off"),
            "schulz_solve of 4 rows": lambda A=A, V=V: hk.schulz_solve(A, V),
        }
        reached = _worst(plain.schulz(A, steps).flatten(1), truth.flatten(1))
        yield from measurements(
            f"schulz, {len(A)} of {side} x {side}", interleaved(providers, 5), loop,
            {loop: reached, "schulz_inverse": error},
        )  # fmt: skip
        direct = "cholesky_inverse"
        providers = {
            direct: lambda A=A: plain.cholesky_inverse(A),
            "spd_inverse": lambda A=A: hk.spd_inverse(A),
            "spd_inverse, check='off'": lambda A=A: hk.spd_inverse(A, check="off"),
        }
        results = {direct: plain.cholesky_inverse(A), "spd_inverse": hk.spd_inverse(A)}
        errors = {name: _worst(X.flatten(1), truth.flatten(1)) for name, X in results.items()}
        case = f"spd_inverse, {len(A)} of {side} x {side}"
        yield from measurements(case, interleaved(providers, 9), direct, errors)


def _sums(rates: floor.Floor, quick: bool) -> Iterator[Measurement]:
    """The ops on rows and on factors (delta, act)."""
    n, width, m = (300, 2048, 8) if quick else (1500, 16384, 8)
    G, V, lam = torch.randn(n, width), torch.randn(m, width), 0.1
    K, C = torch.zeros(n, n), torch.zeros(1024, 1024)
    rows = G.view(-1, 1, 1024)
    delta, act = torch.randn(n // 10, 64, 16), torch.randn(n // 10, 64, 1024)
    W = torch.randn(m, 16, 1024)

    def two_products() -> Tensor:
        return (V - (V @ G.mT / (lam + G.square().sum(1))) @ G / n) / lam

    formed = lambda: delta.mT @ act  # noqa: E731
    factors, outer = (delta, act), 2.0 * delta.numel() * act.shape[-1]
    cases: tuple[tuple[str, Call, Call, float], ...] = (
        ("sherman_morrison", two_products, lambda: hk.sherman_morrison(V, G, lam),
         max(rates.reads(G), rates.products(4.0 * m * n * width))),
        ("gram_accumulate_", lambda: K.add_(G @ G.mT), lambda: hk.gram_accumulate_(K, G),
         rates.products(n * n * width)),
        ("gfim_accumulate_", lambda: C.add_(rows[:, 0].mT @ rows[:, 0]),
         lambda: hk.gfim_accumulate_(C, rows), rates.products(G.numel() * 1024.0)),
        ("per_sample_grad", formed, lambda: hk.per_sample_grad(delta, act),
         max(rates.products(outer), rates.reads(*factors))),
        ("per_sample_norm_sq", lambda: formed().square().sum((1, 2)),
         lambda: hk.per_sample_norm_sq(delta, act), rates.products(outer)),
        ("per_sample_dot, m=8", lambda: formed().flatten(1) @ W.flatten(1).mT,
         lambda: hk.per_sample_dot(delta, act, W), rates.products(outer)),
        ("pairwise_dot", lambda: formed().flatten(1) @ formed().flatten(1).mT,
         lambda: hk.pairwise_dot(delta, act, delta, act), rates.products(outer)),
    )  # fmt: skip
    for name, theirs, ours, least in cases:
        yield from _beside_floor(name, {PLAIN: theirs, OURS: ours}, {}, least, 9)


def _beside_floor(
    case: str, providers: dict[str, Call], errors: dict[str, float], least: float, repeats: int,
    words: str = "",
) -> Iterator[Measurement]:  # fmt: skip
    for call in providers.values():
        call()
    for row in measurements(case, interleaved(providers, repeats), PLAIN, errors):
        notes = [f"{row.median / least:.2f} x floor"]
        if words and row.provider == OURS:
            notes.append(words)
        yield replace(row, note=", ".join(notes))


def _gradients(n: int, r: int, d: int, blocks: int, seed: int = 0) -> dict[str, Tensor]:
    """Rows with columns of unequal size and a common direction, as gradients have."""
    draw = torch.Generator().manual_seed(seed)
    scale, common = torch.logspace(0, -2, d), torch.Generator().manual_seed(99)
    return {
        f"b{b}": (torch.randn(n, r, d, generator=draw) * scale).add_(
            torch.randn(r, d, generator=common) * scale, alpha=0.3
        )
        for b in range(blocks)
    }


def _definite(batch: int, side: int) -> Tensor:
    """Condition 1e3, eigenvalues evenly spread over the decades."""
    draw = torch.Generator().manual_seed(side)
    basis = torch.linalg.qr(torch.randn(batch, side, side, dtype=torch.float64, generator=draw))[0]
    A = (basis * torch.logspace(0, -3, side, dtype=torch.float64)) @ basis.mT
    return ((A + A.mT) / 2).float()


def _steps_to(A: Tensor, truth: Tensor, error: float) -> int:
    """The fewest plain steps that come as near as `error`, or rest."""
    last = float("inf")
    for steps in range(8, 64):
        reached = _worst(plain.schulz(A, steps).flatten(1), truth.flatten(1))
        if reached <= 1.1 * error or (reached < 0.5 and reached > 0.98 * last):
            return steps
        last = reached
    return steps


def _worst(got: Tensor, want: Tensor) -> float:
    """The worst row's relative error."""
    return float(((got.double() - want).norm(dim=1) / want.norm(dim=1)).max())


if __name__ == "__main__":
    torch.manual_seed(0)
    for row in doors("--quick" in sys.argv):
        print(json.dumps(asdict(row)), flush=True)

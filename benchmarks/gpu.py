"""The Triton kernels on a GPU against cuBLAS and cuSOLVER through torch, beside the computed floor.

Inputs are rotated so that no call finds its operands in L2. A time is the median of interleaved
samples, each of several launches between two synchronisations; errors are against fp64. The note of
our rows is the share of the computed floor (`hyperinf_kernels.ops.roofline`) that was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hyperinf_kernels.ops import dispatch, reference, roofline, schedule
from hyperinf_kernels.ops.dispatch import KERNELS
from hyperinf_kernels.ops.schedule import Step

from .registry import Measurement, benchmark, interleaved, measurements

REPEATS, INNER = 9, 10
L2_BYTES = 128 << 20
DEVICE = torch.device("cuda")
OURS = "hyperinf_kernels, Triton"
Provider = Callable[[Mapping[str, Tensor]], Tensor]


@benchmark("gpu")
def triton_kernels(quick: bool) -> Iterator[Measurement]:
    """Inverses, DataInf, GFIM and scoring of LoRA-sized blocks."""
    missing = dispatch.capability().missing.get("triton")
    if missing:
        raise SystemExit(f"nothing to measure: {missing}")
    for d, batch, condition in roofline.INVERSES:
        yield from _inverse(d, max(1, batch // 8) if quick else batch, condition)
    for rows, columns, queries, width in roofline.ROWS:
        yield from _sherman_morrison(rows // 8 if quick else rows, columns, queries, width)
    for rows, d, width in roofline.SUMS:
        yield from _gfim(rows // 16 if quick else rows, d, width)
    yield from _scoring(*roofline.SCORED)
    yield from _factored(*roofline.FACTORED)
    yield from _gfim_factors(*roofline.SUMMED)


def this_device() -> roofline.Device | None:
    """The data sheet of the GPU at hand, None for one that has none here."""
    name = torch.cuda.get_device_name()
    return next((sheet for key, sheet in roofline.DEVICES.items() if key in name), None)


def compared(
    case: str,
    make: Callable[[int], Mapping[str, Tensor]],
    providers: Mapping[str, Provider],
    truth: Callable[[Mapping[str, Tensor]], Tensor],
    floor: Callable[[roofline.Device], roofline.Floor],
) -> Iterator[Measurement]:
    """Check every provider against `truth`, then time them on rotated inputs."""
    first = make(0)
    size = sum(t.numel() * t.element_size() for t in first.values())
    inputs = [first, *(make(seed) for seed in range(1, min(INNER, 1 + L2_BYTES // size)))]
    want = truth(first)
    errors = {
        name: float((run(first).double() - want).norm() / want.norm())
        for name, run in providers.items()
    }

    def timed(run: Provider) -> Callable[[], object]:
        def several() -> None:
            for k in range(INNER):
                run(inputs[k % len(inputs)])
            torch.cuda.synchronize()

        return several

    calls = {name: timed(run) for name, run in providers.items()}
    for call in calls.values():
        call()
    times = interleaved(calls, REPEATS)
    each = {name: [t / INNER for t in values] for name, values in times.items()}
    device = this_device()
    least = floor(device) if device is not None else None
    for row in measurements(case, each, next(iter(providers)), errors):
        note = ""
        if least is not None and row.provider == OURS:
            note = f"{least.seconds / row.median:.0%} of the computed floor ({least.bound})"
        yield replace(row, note=note)


def _inverse(d: int, batch: int, condition: float) -> Iterator[Measurement]:
    def make(seed: int) -> Mapping[str, Tensor]:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        shape = {"device": DEVICE, "dtype": torch.float64, "generator": generator}
        basis = torch.linalg.qr(torch.randn(batch, d, d, **shape))[0]
        spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), d, device=DEVICE)
        A = (basis * spectrum.double()) @ basis.mT
        return {"A": ((A + A.mT) / 2).float()}

    start, steps = _chain(batch, condition)
    precisions = ("ieee", "tf32x3") if d > 32 else ("ieee",)
    providers: dict[str, Provider] = {
        "torch, cholesky_inverse": lambda x: torch.cholesky_inverse(torch.linalg.cholesky(x["A"])),
        "torch.linalg.inv": lambda x: torch.linalg.inv(x["A"]),
        "torch, the same chain": lambda x: reference.schulz(x["A"], start, steps)[0],
    }
    ours = KERNELS["schulz_rounded"]["triton"].run
    for precision in precisions:
        name = OURS if precision == precisions[-1] else f"{OURS}, {precision}"
        providers[name] = lambda x, p=precision: ours(x["A"], start, steps, p)[0]
    yield from compared(
        f"inverse, {batch} of {d} x {d}, condition {condition:.0e}", make, providers,
        lambda x: torch.linalg.inv(x["A"].double()),
        lambda device: roofline.schulz(device, d, batch, condition, precisions[-1]),
    )  # fmt: skip


def _chain(batch: int, condition: float) -> tuple[Tensor, Sequence[Step]]:
    lower = torch.full((batch,), 1 / condition, dtype=torch.float64, device=DEVICE)
    start, steps = schedule.plan_steps(lower, torch.ones_like(lower), 1e-6)
    return start.float(), [
        Step(s.degree, {k: c.float() for k, c in s.coefficients.items()}) for s in steps
    ]


def _sherman_morrison(rows: int, columns: int, queries: int, width: int) -> Iterator[Measurement]:
    lam = torch.tensor(0.1, device=DEVICE)

    def make(seed: int) -> Mapping[str, Tensor]:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        V, G = (
            torch.randn(n, columns, device=DEVICE, generator=generator) for n in (queries, rows)
        )
        return {"V": V, "G": G.bfloat16() if width == 2 else G}

    plain = reference.sherman_morrison
    ours = KERNELS["sherman_morrison"]["triton"].run
    yield from compared(
        f"sherman_morrison, {rows} x {columns}, m={queries}, {8 * width} bit", make,
        {"torch, two products": lambda x: plain(x["V"], x["G"], lam),
         "torch.compile": lambda x: _compiled(plain)(x["V"], x["G"], lam),
         OURS: lambda x: ours(x["V"], x["G"], lam)},
        lambda x: plain(x["V"].double(), x["G"].double(), lam.double()),
        lambda device: roofline.sherman_morrison(device, rows, columns, queries, width),
    )  # fmt: skip


def _gfim(rows: int, d: int, width: int) -> Iterator[Measurement]:
    C = torch.zeros(d, d, device=DEVICE)

    def make(seed: int) -> Mapping[str, Tensor]:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        G = torch.randn(rows, 1, d, device=DEVICE, generator=generator)
        return {"G": G.bfloat16() if width == 2 else G}

    ours = KERNELS["gfim_accumulate_"]["triton"].run
    yield from compared(
        f"gfim_accumulate_, {rows} x {d}, {8 * width} bit", make,
        {"torch.mm": lambda x: x["G"][:, 0].mT @ x["G"][:, 0],
         OURS: lambda x: ours(C.zero_(), x["G"], side="cols", alpha=1.0)},
        lambda x: x["G"][:, 0].double().mT @ x["G"][:, 0].double(),
        lambda device: roofline.gfim(device, rows, d, width, ours=True),
    )  # fmt: skip


def _made(seed: int, **shapes: tuple[int, ...]) -> Mapping[str, Tensor]:
    """Random tensors by name: V in fp32, factors in bf16."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    drawn = {
        name: torch.randn(shape, device=DEVICE, generator=generator)
        for name, shape in shapes.items()
    }
    return {name: t if name == "V" else t.bfloat16() for name, t in drawn.items()}


def _wide(x: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(x[name].double() for name in ("V", "delta", "act") if name in x)


def _scoring(
    samples: int, tokens: int, rows: int, columns: int, queries: int
) -> Iterator[Measurement]:
    def make(seed: int) -> Mapping[str, Tensor]:
        return _made(seed, delta=(samples, tokens, rows), act=(samples, tokens, columns),
                     V=(queries, rows, columns))  # fmt: skip

    def truth(x: Mapping[str, Tensor]) -> Tensor:
        V, delta, act = _wide(x)
        return plain(delta, act, V, False)

    plain = reference.per_sample_dot
    ours = KERNELS["per_sample_dot"]["triton"].run
    yield from compared(
        f"per_sample_dot, {samples} x {tokens} tokens, {rows} x {columns}, m={queries}", make,
        {"torch, gradients formed": lambda x: plain(x["delta"], x["act"], x["V"], False),
         OURS: lambda x: ours(x["delta"], x["act"], x["V"], False)},
        truth,
        lambda device: roofline.scoring(
            device, samples, tokens, rows, columns, queries, ours=True
        ),
    )  # fmt: skip


def _factored(
    samples: int, tokens: int, rows: int, columns: int, queries: int
) -> Iterator[Measurement]:
    lam = torch.tensor(0.1, device=DEVICE)

    def make(seed: int) -> Mapping[str, Tensor]:
        return _made(seed, delta=(samples, tokens, rows), act=(samples, tokens, columns),
                     V=(queries, rows, columns))  # fmt: skip

    plain = reference.sherman_morrison_factored
    ours = KERNELS["sherman_morrison_factored"]["triton"].run
    yield from compared(
        f"sherman_morrison of {samples} x {tokens} tokens, {rows} x {columns}, m={queries}", make,
        {"torch, gradients formed": lambda x: plain(x["V"], x["delta"], x["act"], lam),
         OURS: lambda x: ours(x["V"], x["delta"], x["act"], lam)},
        lambda x: plain(*_wide(x), lam.double()),
        lambda device: roofline.factored(
            device, samples, tokens, rows, columns, queries, ours=True
        ),
    )  # fmt: skip


def _gfim_factors(samples: int, tokens: int, rows: int, columns: int) -> Iterator[Measurement]:
    def make(seed: int) -> Mapping[str, Tensor]:
        return _made(seed, delta=(samples, tokens, rows), act=(samples, tokens, columns))

    def summed(kernel: Callable[..., Tensor], *factors: Tensor) -> Tensor:
        C = torch.zeros(columns, columns, device=DEVICE, dtype=torch.float32)
        C = C.double() if factors[0].dtype == torch.float64 else C
        return kernel(C, *factors, side="cols", alpha=1.0)

    plain = reference.gfim_accumulate_
    ours = KERNELS["gfim_accumulate_"]["triton"].run
    yield from compared(
        f"gfim_accumulate_ of {samples} x {tokens} tokens, {rows} x {columns}", make,
        {"torch, gradients formed": lambda x: summed(plain, x["delta"], x["act"]),
         OURS: lambda x: summed(ours, x["delta"], x["act"])},
        lambda x: summed(plain, *_wide(x)),
        lambda device: roofline.gfim_factors(device, samples, tokens, rows, columns, ours=True),
    )  # fmt: skip


_graphs: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return _graphs.setdefault(function, torch.compile(function))

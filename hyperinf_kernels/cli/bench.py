"""`hyperinf bench`: rates of this machine, the GPU kernels as compiled, their settings tuned."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError

SHOWN = ((16, 256), (64, 256), (256, 97), (1024, 97), (1024, 1), (4096, 1))


def bench(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine and keep the result.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to keep it in (HYPERINF_RATES to use it)."),
    ] = None,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot",
            help="Compile every Triton kernel for sm_80, sm_90 and sm_100, and "
            "list it beside the CUDA kernels: registers, spills, shared memory.",
        ),
    ] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Time settings of the Triton kernels on this GPU.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="With --tune: keep the best in the shipped table.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")] = "cpu",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON document.")
    ] = False,
) -> None:
    """Rates of dense algebra here, and which inverse they make cheaper; --aot or --tune instead."""
    if calibrate + aot + tune > 1:
        raise InputError("choose one of --calibrate, --aot and --tune")
    if write and not tune:
        raise InputError("--write goes with --tune")
    # only now: these import torch's linear algebra
    from ..ops import costs
    from ..ops.calibration import calibrate as measure
    from ..store.files import write_json
    from .command import check_device
    from .terminal import Bars

    check_device(device)
    if output is not None and not calibrate:
        raise InputError("--output goes with --calibrate")
    if tune:
        from ..ops.triton.tune import tune_here

        tune_here(write)
        return
    if aot:
        from .aot_table import show

        show(as_json)
        return
    path = None
    if calibrate:
        path = output or costs.rates_path()
        with Bars() as bars:
            found = measure(device, progress=bars.advance)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, costs.with_rates(path, found))
    else:
        found = costs.rates_of(device)
    choices = [_choice(d, batch, found) for d, batch in SHOWN]
    entry = costs.as_document(found)["devices"][found.device]
    if as_json:
        print(json.dumps({"format": 1, "device": found.device, **entry, "inverses": choices}))
    _table(found, choices, path)


def _choice(d: int, batch: int, found: Any) -> dict[str, Any]:
    from ..ops.costs import inverse_seconds

    seconds = inverse_seconds(d, batch, 1e4, rates=found)
    cheaper = min(seconds, key=lambda route: seconds[route])
    times = {str(route): value for route, value in seconds.items()}
    return {"d": d, "batch": batch, "condition": 1e4, **times, "cheaper": cheaper}


def _table(found: Any, choices: list[dict[str, Any]], path: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, markup=False)
    table = Table(title=f"Rates: {found.source}", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("operation", "peak Gflop/s", "half of it at size"):
        table.add_column(head, justify="right")
    for name, rate in found.table.items():
        table.add_row(name, f"{rate.peak / 1e9:.3g}", f"{rate.half:.3g}")
    console.print(table)
    table = Table(
        title="Predicted seconds of SPD inverses, fp32, condition 1e4", title_justify="left",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for head in ("matrices", "direct", "Schulz", "cheaper"):
        table.add_column(head, justify="right")
    for c in choices:
        size = f"{c['batch']} x {c['d']} x {c['d']}"
        table.add_row(size, f"{c['direct']:.2g}", f"{c['schulz']:.2g}", c["cheaper"])
    console.print(table)
    if path is not None:
        console.print(f"kept in {path}", soft_wrap=True)

"""`hyperinf converge`: the published convergence simulation, as a table and a figure."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError


def converge(
    cell: Annotated[
        list[str], typer.Option("--cell", help="N,d of one cell, as 200,512. Repeat for several.")
    ] = [],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="Only N=200, d=512.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="All 16 published cells; d=4096 takes many minutes.")
    ] = False,
    iterations: Annotated[
        int, typer.Option("--iterations", help="Steps of the released iteration and of LiSSA.")
    ] = 40,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New folder for the figure, the CSV and the JSON."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random matrices.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON document.")
    ] = False,
) -> None:
    """How many dense products the inverse takes: released iteration, Schulz, ours and the rest."""
    # only now: these import torch's linear algebra and matplotlib
    from ..experiments import convergence
    from ..experiments.convergence_figure import draw, pyplot
    from ..jobs.output import check_output, output_folder
    from ..store.files import atomic, write_json
    from .terminal import Bars

    if quick + every + bool(cell) > 1:
        raise InputError("choose one of --cell, --quick and --all")
    chosen: Any = tuple(map(_cell, cell)) or convergence.DEFAULT_CELLS
    chosen = convergence.QUICK_CELLS if quick else chosen
    chosen = tuple(convergence.PUBLISHED) if every else chosen
    if iterations < 1:
        raise InputError(f"--iterations must be at least 1, got {iterations}")
    if output is not None:
        pyplot()
        check_output(output)
    with Bars() as bars:
        cells = [convergence.simulate(n, d, seed, iterations, bars.advance) for n, d in chosen]
    document = convergence.document(cells, seed)
    if output is not None:
        with output_folder(output) as folder:
            draw(cells, folder / "convergence.png")
            with atomic(folder / "convergence.csv") as path:
                path.write_text(convergence.as_csv(cells), encoding="utf-8")
            write_json(folder / "convergence.json", document)
    if as_json:
        print(json.dumps(document, allow_nan=False))
    _table(document["cells"], output)


def _cell(text: str) -> tuple[int, int]:
    try:
        samples, d = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--cell {text}: give N,d as two whole numbers, such as 200,512") from None
    if samples < 1 or d < 2:
        raise InputError(f"--cell {text}: N must be at least 1 and d at least 2")
    return samples, d


def _table(cells: list[dict[str, Any]], output: Path | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title="Dense products until the released iteration's floor, and relative errors of A^-1 v",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    heads = ("N, d", "released", "plain", "ours", "and\nproven", "chain", "proven", "refined",
             "Cholesky", "LiSSA", "DataInf")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for c in cells:
        errors = ("chain", "certified", "refined", "cholesky", "lissa", "datainf")
        table.add_row(
            f"{c['N']}, {c['d']}",
            *(str(c[f"products_{k}"] or "-") for k in ("released", "plain", "ours", "certified")),
            *(f"{c[f'relative_{k}']:.1e}" for k in errors),
        )
    console = Console(stderr=True, markup=False)
    if not console.is_terminal:
        console.width = 110
        console.print()  # the bars end without a line break there
    console.print(table)
    for c in cells:
        if c["published_floor"] is not None:
            console.print(
                f"N={c['N']}, d={c['d']}: floor {c['floor']:.3g} here, {c['published_floor']:.3g} "
                f"published; LiSSA {c['lissa']:.5g}, {c['published_lissa']:.5g} published"
            )
    if output is not None:
        console.print(f"figure: {output / 'convergence.png'}", soft_wrap=True)

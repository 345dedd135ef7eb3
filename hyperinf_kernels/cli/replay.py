"""`hyperinf replay`: a finished run once more, and which scores differ."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .command import Json


def replay(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Keep the new run in this new folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a finished run again from its report.json; exit code 1 where a score differs."""
    from .command import follow

    document = follow("replay", lambda job, progress: job.run(folder, output, progress), as_json)
    _lines(document)
    if any(entry["differing"] for entry in document["scores"]):
        raise typer.Exit(1)


def _lines(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(stderr=True, markup=False, highlight=False)
    for change in document["changed"]:
        console.print(change, soft_wrap=True)
    for entry in document["scores"]:
        said = f"all {entry['pairs']} scores are the same"
        if entry["differing"]:
            said = (
                f"{entry['differing']} of {entry['pairs']} scores differ, by at most "
                f"{entry['largest']:.3g} ({entry['relative']:.1e} of the largest)"
            )
        if entry["missing"]:
            said += f"; {entry['missing']} are in one of the runs only"
        console.print(f"{entry['file']}: {said}", soft_wrap=True)

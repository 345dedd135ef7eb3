"""The commands of `hyperinf` as typer definitions; the jobs themselves are in `jobs`."""

import json

import typer

from ..ops.info import as_text, collect
from .attribute import fit, plan, score, self_influence
from .bench import bench
from .converge import converge
from .experiments import demo, identify, mislabeled, select
from .options import Json
from .show import show

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Which training examples made a LoRA-tuned model behave as it does.",
)


def info(as_json: Json = False) -> None:
    """Versions, extras, and which backends each op has here, with the reason for every no."""
    print(json.dumps(collect(), indent=1) if as_json else as_text())


app.command()(demo)
app.command()(score)
app.command()(fit)
app.command("self-influence")(self_influence)
app.command()(plan)
app.command()(identify)
app.command()(mislabeled)
app.command()(select)
app.command()(converge)
app.command()(show)
app.command()(bench)
app.command()(info)

"""Commands made of the options of a `Request`: the one way from a command to its job."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import InputError
from ..jobs.request import OPTIONS, Request
from .plan_table import plan_table
from .terminal import Bars, closing_table, fitted_lines, quiet_libraries, rows_seen

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
REQUIRED = ("model", "train", "query")
TYPES = get_type_hints(Request, localns={"Progress": Any})


def job_command(
    name: str, options: Sequence[str], defaults: Mapping[str, Any]
) -> Callable[..., None]:
    """A typer command that fills a request from its options and runs the job of its name."""

    def command(as_json: bool, **values: Any) -> None:
        del values["config"]
        given: Any = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        request = Request(**given)
        check_device(request.device)
        document = follow(
            name, lambda job, advance: job.run(replace(request, progress=advance)), as_json
        )
        if name == "plan":
            plan_table(document)
        elif name == "fit":
            fitted_lines(document)
        elif name == "show":
            rows_seen(document, as_json)
        else:
            closing_table(document, given["output"])

    parameters = [_parameter(option, defaults) for option in options]
    parameters += [
        _keyword("config", Annotated[Path | None, typer.Option(
            "--config", is_eager=True, callback=_configure,
            help="YAML file of options by name; what is typed here wins.")], None),
        _keyword("as_json", Json, False),
    ]  # fmt: skip
    command.__name__ = name.replace("-", "_")
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def follow(job: str, start: Callable[[Any, Any], dict[str, Any]], as_json: bool) -> dict[str, Any]:
    """The document of a job that `start` runs, given its module and where its progress goes.

    Its progress shows as bars; the document is printed as JSON where that was asked for.
    """
    quiet_libraries()
    # only now: these import libraries that read their environment when first imported
    from ..ops import BackendError

    module = importlib.import_module(f"hyperinf_kernels.jobs.{job.replace('-', '_')}")
    try:
        with Bars() as bars:
            document = start(module, bars.advance)
    except BackendError as error:
        raise InputError(str(error)) from error
    except KeyboardInterrupt:
        # said here, since what typer makes of it depends on its version
        print("interrupted; nothing was written", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        # ASCII goes through a pipe of any encoding
        print(json.dumps(document, allow_nan=False))
    return document


def check_device(name: str) -> None:
    """Raise InputError for a device that torch does not see."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: choose cpu, cuda or cuda:NUMBER")
    found = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise InputError(f"--device {name}: torch {torch.__version__} sees {found} CUDA devices")


def _parameter(name: str, defaults: Mapping[str, Any]) -> inspect.Parameter:
    field = OPTIONS[name]
    kind: Any = list[str] if TYPES[name] == tuple[str, ...] else TYPES[name]
    flags = field.metadata["flags"] or (f"--{name.replace('_', '-')}",)
    default = defaults.get(name, ... if name in REQUIRED else field.default)
    assert default is not MISSING
    # typer takes ... for an option that must be given only as a missing default
    default = inspect.Parameter.empty if default is ... else default
    default = list(default) if isinstance(default, tuple) else default
    annotation = Annotated[kind, typer.Option(*flags, help=field.metadata["help"])]
    return _keyword(name, annotation, default)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=annotation)


def _configure(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options of a file as defaults of this command."""
    if path is None:
        return None
    known = {p.name for p in context.command.params if p.name} - {"config", "as_json", "help"}
    values = _read_config(path)
    for name in values:
        if name not in known:
            raise InputError(
                f"{path}: {context.info_name} has no option {name!r}; its options: "
                f"{', '.join(sorted(known))}"
            )
    repeated = {p.name for p in context.command.params if getattr(p, "multiple", False)}
    context.default_map = {
        name: [value] if name in repeated and not isinstance(value, list) else value
        for name, value in values.items()
    }
    return path


def _read_config(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise InputError("--config needs pyyaml: pip install 'hyperinf_kernels[cli]'") from None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: give one option a line, as method: exact")
    return {str(name).lstrip("-").replace("-", "_"): value for name, value in values.items()}

"""The command `hyperinf`: the entry point, which turns errors into one line and an exit code."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import NoReturn

from ..errors import InputError, printable

NEEDED = ("typer", "rich", "pyarrow")


def main() -> None:
    """Entry point: exit code 2 and one clear line for anything the user can put right."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        if sys.argv[1:2] == ["info"]:
            from ..ops.info import as_text, collect

            print(json.dumps(collect(), indent=1) if "--json" in sys.argv else as_text())
            return
        _fail(f"the command line needs {', '.join(missing)}: pip install 'hyperinf_kernels[cli]'")
    # tqdm reads its environment when torch imports it; the bars are the commands' own
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from .app import app

        app(standalone_mode=True)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"{error.strerror or error}{where}")
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    """Exit with code 2 and one line, whatever names and ids of the user's are in it."""
    print("error:", *map(printable, message.splitlines()), file=sys.stderr)
    sys.exit(2)

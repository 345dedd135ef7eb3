"""The command `hyperinf`: the entry point, which turns errors into one line and an exit code."""

from __future__ import annotations

import importlib.util
import json
import sys

from .errors import InputError

NEEDED = ("typer", "rich", "pyarrow")


def main() -> None:
    """Entry point: exit code 2 and one clear line for anything the user can put right."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        if sys.argv[1:2] == ["info"]:
            from .info import as_text, collect

            print(json.dumps(collect(), indent=1) if "--json" in sys.argv else as_text())
            return
        sys.exit(
            f"error: the command line needs {', '.join(missing)}: "
            "pip install 'hyperinf_kernels[cli]'"
        )
    try:
        from .commands import app

        app(standalone_mode=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)

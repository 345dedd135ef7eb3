"""Errors that a person can act on."""

from __future__ import annotations

__all__ = ["BadRowError", "InputError", "printable"]


class InputError(ValueError):
    """Bad user input: a file, a field or an option value that cannot be used.

    The message is one plain line that says what is wrong and where. The command line prints it
    and exits with code 2, without a traceback; anything else that is raised is a bug of ours.
    """


class BadRowError(InputError):
    """One row of a batch cannot be used; whoever reads the stream knows its number and id.

    Args:
        row: its place in the batch.
        what: what is wrong, after "row 3 of the batch ...".
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(f"row {row} of the batch {what}")
        self.row, self.what = row, what


def printable(text: str) -> str:
    """Text with control characters and terminal escapes written out as backslash sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""Errors that a person can act on."""

from __future__ import annotations

__all__ = ["InputError", "printable"]


class InputError(ValueError):
    """Bad user input: a file, a field or an option value that cannot be used.

    The message is one plain line that says what is wrong and where. The command line prints it
    and exits with code 2, without a traceback; anything else that is raised is a bug of ours.
    """


def printable(text: str) -> str:
    """Text with control characters and terminal escapes written out as backslash sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

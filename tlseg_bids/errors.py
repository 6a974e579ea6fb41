"""Errors that speak to the user: what went wrong, where, and what to do about it.

Every error raised on purpose is a `TlsegError`; anything else that escapes is a defect
of this program. Exit codes follow BEP027 and `sysexits.h`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NO_MEMORY = re.compile(
    r"(can't|cannot|unable to|failed to) allocate|out of memory|bad_alloc|can't start new thread",
    re.IGNORECASE,
)


class TlsegError(Exception):
    """A sentence for the user.

    Parameters
    ----------
    what : str
        What is wrong, with the offending value.
    where : str or path-like
        The file, option or column that holds it; empty if there is none.
    hint : str
        What the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, where: object = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, str(where), hint
        super().__init__(what, self.where, hint)

    def __str__(self) -> str:
        return " – ".join(part for part in (self.what, self.where, self.hint) if part)


class ScanError(TlsegError):
    """One scan cannot be processed; the others go on (exit code 1 at the end)."""


class NotBidsError(TlsegError):
    """The input folder is not a BIDS dataset."""

    exit_code = 16


class UnknownLevelError(TlsegError):
    """The analysis level is neither `participant` nor `group`."""

    exit_code = 17


class NothingSelectedError(TlsegError):
    """The filters match no scan."""

    exit_code = 18


class UsageError(TlsegError):
    """An option, or a combination of options, makes no sense."""

    exit_code = 64


class DataError(TlsegError):
    """A file that the whole run depends on is damaged (a card, weights, a table)."""

    exit_code = 65


class NoInputError(TlsegError):
    """A file or folder that was named does not exist."""

    exit_code = 66


class CannotCreateError(TlsegError):
    """The output folder, or a file in it, cannot be created."""

    exit_code = 73


class OutputError(TlsegError):
    """Writing failed on the way, for example on a full disk."""

    exit_code = 74


class LockedError(TlsegError):
    """Another run holds the output folder; try again later."""

    exit_code = 75


def amount(number: float, noun: str, nouns: str = "") -> str:
    """``1 scan`` or ``2 scans``; `nouns` where the plural is not made with an s."""
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun if number == 1 else nouns or noun + 's'}"


def listed(items: Iterable[object], most: int = 8) -> str:
    """``a, b, c and 4 more``: the first `most` of the items, and how many more there are."""
    items = [str(item) for item in items]
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def one_line(text: str) -> str:
    """`text` with line breaks and control characters (of a hostile file name) as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def no_memory(error: BaseException) -> bool:
    """Whether an error means that memory was lacking.

    PyTorch says so in a RuntimeError, and Python where a thread finds no room for its stack.
    """
    kind = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return kind or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))

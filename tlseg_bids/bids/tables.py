"""Small readers for the TSV and JSON files of a BIDS dataset, forgiving where nothing is lost.

Nothing here raises for bad content: a reader returns what it could read and one sentence on what
it could not, because one damaged table must not stop the other scans.
"""

from __future__ import annotations

import csv
import json
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MOST_BYTES = 2**28


@dataclass(frozen=True)
class Table:
    """A TSV file: rows by column name, and the JSON beside it.

    Parameters
    ----------
    name : str
        Short name for messages: ``participants.tsv``.
    rows : tuple of dict
        One dict per row; cells are stripped strings.
    columns : dict
        The JSON sidecar: column name to its description.
    problem : str
        Why the file could not be read; empty if it could, or if there is none.
    exists : bool
        Whether the dataset has the file.
    """

    name: str
    rows: tuple[dict[str, str], ...] = ()
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    exists: bool = True


def why_no_text(path: Path) -> str:
    """Why a file is not read as a text of a dataset: a pipe or a device would never end.

    Raises
    ------
    OSError
        If there is no such file, or it cannot be reached.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_size > MOST_BYTES:
        return f"has {status.st_size} bytes, and at most {MOST_BYTES} are read"
    return ""


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The object in a JSON file, and what is wrong with it (empty if nothing).

    Parameters
    ----------
    path : Path
        A JSON file; a byte-order mark is accepted.

    Returns
    -------
    content : dict
        Empty if the file cannot be read.
    problem : str
        One clause that follows the file's name: ``is not valid JSON (line 3: …)``.
    """
    try:
        if unreadable := why_no_text(path):
            return {}, unreadable
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}, "is a link to a file that is not here" if path.is_symlink() else "is missing"
    except OSError as error:
        return {}, f"cannot be read ({error.strerror})"
    except json.JSONDecodeError as error:
        return {}, f"is not valid JSON (line {error.lineno}: {error.msg})"
    except UnicodeDecodeError:
        return {}, "is not valid JSON (not encoded in UTF-8)"
    except RecursionError:
        return {}, "is not valid JSON (nested too deeply)"
    except ValueError as error:  # a number of thousands of digits
        return {}, f"is not valid JSON ({error})"
    if not isinstance(content, dict):
        return {}, f"holds a JSON {type(content).__name__} where an object is needed"
    return content, ""


def read_table(path: Path, sidecars: tuple[Path, ...] = ()) -> Table:
    """Read a TSV file and its JSON descriptions.

    Parameters
    ----------
    path : Path
        The TSV file; it may be absent.
    sidecars : tuple of Path
        JSON files that may describe its columns, the nearest last; absent ones are passed over.
        Without any, the JSON of the same name is read.

    Returns
    -------
    Table
        Rows shorter than the header have empty cells; cells beyond the header are dropped. A line
        feed ends a row, a carriage return before it or alone too; no other character does.
    """
    if not path.exists():
        problem = "is a link to a file that is not here" if path.is_symlink() else ""
        return Table(path.name, problem=problem, exists=path.is_symlink())
    try:
        if unreadable := why_no_text(path):
            return Table(path.name, problem=unreadable)
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        return Table(path.name, problem=f"cannot be read ({error.strerror})")
    reader = csv.reader(text.split("\n"), delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        lines = [[cell.strip() for cell in line] for line in reader if any(line)]
    except csv.Error as error:
        return Table(path.name, problem=f"is not a table ({error})")
    if not lines:
        return Table(path.name, problem="is empty")
    header, *body = lines
    rows = tuple(
        dict(zip(header, line + [""] * (len(header) - len(line)), strict=False)) for line in body
    )
    columns: dict[str, Any] = {}
    for sidecar in sidecars or (path.with_suffix(".json"),):
        if sidecar.exists():
            columns.update(read_json(sidecar)[0])
    return Table(path.name, rows, columns)

"""What integers mean: label protocols, read from `protocols/*.tsv`.

No integer label is written in Python code; a protocol is asked by name, group or hemisphere.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
import pandas as pd

from tlseg_bids.errors import DataError

DEFAULT_PROTOCOL = "aseg"
"""What a scan is labelled in where the user names neither a protocol nor a model."""

HIGHEST = 2**15 - 1
"""The largest label: label maps are int16."""

COLUMNS = (
    "index", "name", "abbreviation", "color", "hemisphere", "mirror", "group", "subcortical14",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LabelProtocol:
    """A numbered list of structures; row order is the channel order of a network's output.

    Parameters
    ----------
    name : str
        Value of the BIDS entity ``seg``.
    table : DataFrame
        Columns `COLUMNS`; row 0 is the background with index 0.
    """

    name: str
    table: pd.DataFrame

    def __post_init__(self) -> None:
        table, where = self.table, f"label protocol '{self.name}'"
        missing = [column for column in COLUMNS if column not in table]
        if missing:
            raise DataError(f"columns {missing} are missing", where, "add them to the TSV")
        if table.empty:
            raise DataError("the table has no rows", where, "name background 0 and the structures")
        for column in ("index", "mirror"):
            odd = [value for value in table[column] if not _is_label(value)]
            if odd:
                raise DataError(
                    f"{odd[0]!r} in the column '{column}' is no integer from 0 to {HIGHEST}", where,
                    "write the label's number",
                )  # fmt: skip
        if table["index"].duplicated().any():
            twice = table["index"][table["index"].duplicated()].tolist()
            raise DataError(f"indices {twice} occur twice", where, "give each structure its own")
        if int(table["index"].iloc[0]) != 0:
            raise DataError("the first row is not background 0", where, "put index 0 first")
        mirror = dict(zip(table["index"], table["mirror"], strict=True))
        broken = [int(i) for i, m in mirror.items() if mirror.get(m) != i]
        if broken:
            raise DataError(
                f"left/right partners of {broken} do not point at each other", where,
                "mend the column 'mirror'",
            )  # fmt: skip

    @cached_property
    def indices(self) -> np.ndarray:
        """Label of each channel, int16, shape (channels,)."""
        return self.table["index"].to_numpy(np.int16)

    @cached_property
    def mirror(self) -> np.ndarray:
        """Channel of the mirrored structure for each channel, shape (channels,)."""
        channel = {int(label): c for c, label in enumerate(self.indices)}
        return np.array([channel[int(label)] for label in self.table["mirror"]])

    def channels(self, **where: object) -> np.ndarray:
        """Channels of the rows in which every named column has the given value."""
        keep = np.ones(len(self.table), bool)
        for column, value in where.items():
            keep &= (self.table[column] == value).to_numpy()
        return np.flatnonzero(keep)

    @cached_property
    def records(self) -> tuple[dict[str, object], ...]:
        """The rows of the table as dicts, the background first."""
        return tuple(self.table.to_dict("records"))

    def pairs(self) -> list[tuple[int, int]]:
        """(left label, right label) of every paired structure."""
        left = [row for row in self.records if row["hemisphere"] == "left"]
        return [(int(row["index"]), int(row["mirror"])) for row in left]

    def __len__(self) -> int:
        return len(self.table)


def load_protocol(name: str, folder: Path | None = None) -> LabelProtocol:
    """Read `protocols/<name>.tsv`, or else `seg-<name>_dseg.tsv` in a folder.

    The same table is parsed once; one that was rewritten is read as it is now.

    Parameters
    ----------
    name : str
        A protocol that comes with the program, or one of a site's own.
    folder : Path, optional
        Where the model lies that answers in the site's own protocol.

    Raises
    ------
    DataError
        If there is no such protocol, or its table is damaged.
    """
    if _shipped(name).is_file():
        return _shipped_protocol(name)
    file = own_table(name, folder)
    if file is None:
        known = ", ".join(known_protocols())
        raise DataError(f"no label protocol '{name}'", folder or "", f"known are {known}")
    try:
        return _parsed(name, file.read_bytes())
    except DataError as error:
        raise DataError(error.what, file, error.hint) from error
    except OSError as error:
        raise DataError(
            f"the protocol's table cannot be read ({error.strerror})", file, "look at the file"
        ) from error


def own_table(name: str, folder: Path | None) -> Path | None:
    """The table of a site's own protocol in a folder; None for one that comes with the program.

    Parameters
    ----------
    name : str
        Name of the protocol.
    folder : Path or None
        Where the model lies.
    """
    if folder is None or _shipped(name).is_file():
        return None
    file = folder / table_name(name)
    return file if file.is_file() else None


def table_name(name: str) -> str:
    """The file's name of the table of a site's own protocol."""
    return f"seg-{name}_dseg.tsv"


def _shipped(name: str) -> Traversable:
    return resources.files("tlseg_bids.labels") / "protocols" / f"{name}.tsv"


@lru_cache
def _shipped_protocol(name: str) -> LabelProtocol:
    return _parsed(name, _shipped(name).read_bytes())


@lru_cache
def _parsed(name: str, content: bytes) -> LabelProtocol:
    """A protocol from the bytes of its table."""
    try:
        table = pd.read_csv(io.BytesIO(content), sep="\t", keep_default_na=False)
    except ValueError as error:  # pandas derives its own from it, as Python does UnicodeDecodeError
        raise DataError(
            f"the table of the protocol '{name}' is damaged ({str(error).strip()})", "",
            "restore the file, or install or adapt the model again",
        ) from error  # fmt: skip
    return LabelProtocol(name, table)


def _is_label(value: object) -> bool:
    text = str(value)
    return re.fullmatch("[0-9]{1,5}", text) is not None and int(text) <= HIGHEST


def known_protocols() -> tuple[str, ...]:
    """Names of the protocols that come with the program."""
    folder = resources.files("tlseg_bids.labels") / "protocols"
    return tuple(
        sorted(f.name.removesuffix(".tsv") for f in folder.iterdir() if f.name.endswith(".tsv"))
    )

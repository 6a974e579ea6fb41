"""The study in memory: a row per labelled scan, and the volumes of one stratum as a matrix.

Scans of another protocol or of another contrast are never compared with each other: everything
that is estimated (ComBat, head size, outliers, change) is estimated within a stratum, which is a
protocol and a suffix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tlseg_bids.errors import UsageError, listed
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.derivatives import FailedScan

MEASURES = ("hard_mm3", "soft_mm3", "voxels", "mean_confidence", "predicted_dice", "cut_share")
TOTALS = ("brain", "icv")
NOTHING = {"", "n/a", "na", "nan"}

Key = tuple[str, str]
"""Source of a fact (empty for the program's own) and its column there."""


@dataclass(frozen=True, eq=False)
class Row:
    """One labelled scan.

    Parameters
    ----------
    participant, session : str
        Labels without ``sub-`` and ``ses-``; the session may be empty.
    entities : dict
        Entities of the file name.
    suffix, protocol : str
        ``T1w`` or ``T2w``; name of the label protocol.
    stem : str
        File name of the label map without ``_dseg.nii.gz``: the key of the row.
    facts : dict
        Everything that is known beside volumes, as text: (source, column) to cell.
    age_years, pma_weeks : float
        Age at the scan; NaN where unknown.
    date_days, visit_age_days : float
        When it was made: days from ``acq_time`` (of any origin), and the age since birth that a
        sessions or scans table gives; NaN where unknown.
    measures : ndarray, shape (6, labels), float64
        `MEASURES` of every label but the background, in protocol order; NaN where unknown.
    totals : ndarray, shape (2,), float64
        Brain and intracranial volume (`TOTALS`), mm³; NaN where unknown.
    reasons : tuple of str
        What the report advises to look at in the scan; that its age is not known is no such thing.
    visit_pma_weeks : float
        The post-menstrual age that a sessions or scans table gives; NaN where unknown.
    model : tuple of str
        Name, version and checksum of the model that labelled it; empty where unknown.
    """

    participant: str
    session: str
    entities: dict[str, str]
    suffix: str
    protocol: str
    stem: str
    facts: dict[Key, str]
    age_years: float
    pma_weeks: float
    date_days: float
    visit_age_days: float
    measures: np.ndarray
    totals: np.ndarray
    reasons: tuple[str, ...] = ()
    visit_pma_weeks: float = math.nan
    model: tuple[str, str, str] = ("", "", "")

    @property
    def stratum(self) -> str:
        """``aseg_T1w``: what it may be compared with."""
        return f"{self.protocol}_{self.suffix}"


@dataclass(eq=False)
class Study:
    """Every row, the protocols they use, and what has to be told.

    Parameters
    ----------
    rows : list of Row
        Sorted by participant, session and name.
    protocols : dict
        Name of a protocol to itself.
    failures : list of FailedScan
        Label maps that could not be read.
    notes : list of str
        Sentences for the log and the page.
    descriptions : dict
        What the dataset's JSON files say of a column: (source, column) to its entry.
    names : dict
        (source, column) to the column's name in the table; set by `name_columns`.
    """

    rows: list[Row] = field(default_factory=list)
    protocols: dict[str, LabelProtocol] = field(default_factory=dict)
    failures: list[FailedScan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    descriptions: dict[Key, dict] = field(default_factory=dict)
    names: dict[Key, str] = field(default_factory=dict)

    def strata(self) -> dict[str, list[int]]:
        """Name of each stratum → numbers of its rows, in the order of the rows."""
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(row.stratum, []).append(number)
        return dict(sorted(found.items()))

    def name_columns(self, own: Iterable[str]) -> None:
        """Give every fact a column: its own name if that is free, else ``SOURCE_NAME``.

        Parameters
        ----------
        own : iterable of str
            Names that columns of the program have and that no other may take.
        """
        taken, self.names = set(own), {}
        present: dict[Key, None] = {}
        for row in self.rows:
            present.update(dict.fromkeys(row.facts))
        for key in sorted(present, key=lambda k: SOURCES.index(k[0])):
            source, column = key
            name = column if column not in taken or not source else f"{source}_{column}"
            while name in taken and source:
                name += "_"
            taken.add(name)
            self.names[key] = name

    def column(self, name: str, option: str) -> list[str]:
        """The cells of a column of facts, ``n/a`` where a row has none.

        Raises
        ------
        UsageError
            If there is no such column.
        """
        for key, known in self.names.items():
            if known == name:
                return [row.facts.get(key, "n/a") for row in self.rows]
        raise UsageError(
            f"the table has no column '{name}'", option, f"there are {listed(self.names.values())}"
        )


SOURCES = ("", "participants", "sessions", "scans", "scanner", "qc")


def snake(name: str) -> str:
    """``left_hippocampus`` for ``Left hippocampus``; ``brain_mm3`` for ``BrainMm3``."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^0-9a-z]+", "_", split.lower()).strip("_") or "unnamed"


def structures(protocol: LabelProtocol) -> list[str]:
    """Column names of the structures of a protocol, without the background; each occurs once."""
    names = [snake(str(name)) for name in protocol.table["name"].iloc[1:]]
    return [
        name if names.count(name) == 1 and name not in TOTALS else f"{name}_{index}"
        for name, index in zip(names, protocol.table["index"].iloc[1:], strict=True)
    ]


def matrix(rows: Sequence[Row], measure: str) -> np.ndarray:
    """Volumes of the rows of one stratum, shape (rows, labels + 2): labels, then `TOTALS`; mm³."""
    number = MEASURES.index(measure)
    return np.array([np.concatenate([row.measures[number], row.totals]) for row in rows])


def number(text: object) -> float:
    """A cell as a number; NaN if it is none (also for ``inf``)."""
    try:
        value = float(str(text).replace("_", "x"))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def known(text: str) -> bool:
    """Whether a cell says something."""
    return text.strip().casefold() not in NOTHING

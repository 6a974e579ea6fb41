"""One structural scan and everything the dataset says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Age:
    """Age at the scan; either field may be unknown.

    Parameters
    ----------
    days : float or None
        Days since birth.
    pma_weeks : float or None
        Post-menstrual age in weeks.
    source : str
        Where it was read ("scans.tsv", "sessions.tsv", "participants.tsv", "--age"), or why not.
    """

    days: float | None = None
    pma_weeks: float | None = None
    source: str = "not given"

    @property
    def years(self) -> float | None:
        """Age in years of 365.25 days."""
        return None if self.days is None else self.days / 365.25


@dataclass(frozen=True)
class Scan:
    """A T1w or T2w file of a BIDS dataset.

    Parameters
    ----------
    path : Path
        Absolute path of the NIfTI file (not resolved: a DataLad link keeps its BIDS name).
    bids_dir : Path
        Root of the dataset that holds it.
    entities : dict
        BIDS entities in file-name order, e.g. ``{"sub": "01", "ses": "1", "ce": "gadolinium"}``.
    suffix : str
        ``T1w`` or ``T2w``.
    sidecar : dict
        JSON metadata after inheritance.
    age : Age
        Age at the scan.
    contrast_agent : str or None
        ``ContrastBolusIngredient`` or the value of ``ce-``; None before contrast agent.
    skull_stripped : bool or None
        As the sidecar says; None where it says nothing (then the voxels are asked).
    """

    path: Path
    bids_dir: Path
    entities: dict[str, str]
    suffix: str
    sidecar: dict[str, Any] = field(default_factory=dict)
    age: Age = Age()
    contrast_agent: str | None = None
    skull_stripped: bool | None = None

    @property
    def subject(self) -> str:
        """Participant label without ``sub-``."""
        return self.entities["sub"]

    @property
    def session(self) -> str | None:
        """Session label without ``ses-``."""
        return self.entities.get("ses")

    @property
    def stem(self) -> str:
        """File name without suffix and extension: ``sub-01_ses-1_ce-gadolinium``."""
        return "_".join(f"{key}-{value}" for key, value in self.entities.items())

    @property
    def uri(self) -> str:
        """BIDS URI in the input dataset, e.g. ``bids:raw:sub-01/anat/sub-01_T1w.nii.gz``."""
        return f"bids:raw:{self.path.relative_to(self.bids_dir).as_posix()}"


@dataclass(frozen=True)
class Unusable:
    """A scan that was found but cannot be read, decided without opening a voxel.

    Parameters
    ----------
    scan : Scan
        What is known of it; entities of a broken name are reduced to letters and digits.
    reason : str
        What is wrong with it.
    hint : str
        What the user can do.
    """

    scan: Scan
    reason: str
    hint: str

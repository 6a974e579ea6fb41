"""What was fitted, as JSON: to be read by people, and applied to new subjects by a later run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tlseg_bids import __version__
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import DataError, NoInputError
from tlseg_bids.group.design import Covariate
from tlseg_bids.group.harmonise import SiteEffects
from tlseg_bids.group.headsize import FORMULAS, HeadSize

FORMAT = "tlseg group parameters"
FORMAT_VERSION = 1
COMBAT = "harmonised = scale * volume + offset + sum of coefficient * covariate, per site"
PRIORS = "of each site over the structures"
MEND = "give the group_parameters.json of an earlier run"


@dataclass(frozen=True)
class Fit:
    """What applies to one stratum; either may be absent."""

    combat: SiteEffects | None = None
    head: HeadSize | None = None


@dataclass(frozen=True)
class Parameters:
    """A saved file.

    Parameters
    ----------
    volume : str
        ``hard`` or ``soft``: the volumes it was fitted on.
    strata : dict
        Name of a stratum to its features and its `Fit`.
    """

    volume: str
    strata: dict[str, tuple[tuple[str, ...], Fit]] = field(default_factory=dict)
    path: Path | None = None

    def fit(self, stratum: str, names: Sequence[str]) -> Fit | None:
        """The fit of a stratum; None if there is none.

        Raises
        ------
        DataError
            If it is of other structures.
        """
        if stratum not in self.strata:
            return None
        fitted, fit = self.strata[stratum]
        if fitted != tuple(names):
            other = sorted(set(fitted) ^ set(names)) or ["their order"]
            raise DataError(
                f"the parameters of {stratum} are of other structures ({', '.join(other[:4])})",
                self.path or "", "fit again with this version of the protocol",
            )  # fmt: skip
        return fit


def as_json(
    volume: str, fit_where: Sequence[str], fits: Iterable[tuple[str, Sequence[str], Fit]]
) -> dict[str, Any]:
    """The content of ``group_parameters.json`` for (stratum, features, fit) of every stratum."""
    strata = {}
    for stratum, names, fit in fits:
        entry: dict[str, Any] = {"Structures": list(names)}
        if fit.combat:
            entry["Combat"] = _combat(fit.combat)
        if fit.head:
            entry["HeadSize"] = {
                "Method": fit.head.method, "Formula": FORMULAS[fit.head.method],
                "Measure": fit.head.measure, "MeanHeadSize": fit.head.reference_mm3,
                "Slopes": fit.head.slopes, "Scans": fit.head.scans,
            }  # fmt: skip
        strata[stratum] = entry
    return {
        "Format": FORMAT, "FormatVersion": FORMAT_VERSION, "ProgramVersion": __version__,
        "Volume": volume, "FitWhere": list(fit_where), "Strata": strata,
    }  # fmt: skip


def _combat(effects: SiteEffects) -> dict[str, Any]:
    terms = [name for covariate in effects.covariates for name in covariate.names]
    return {
        "Formula": COMBAT,
        "Priors": PRIORS,
        "Column": effects.column,
        "Reference": effects.reference,
        "Covariates": [{"Column": c.column, "Levels": list(c.levels)} for c in effects.covariates],
        "Terms": ["scale", "offset", *terms],
        "Sites": {
            site: {"Scans": effects.scans.get(site), "Numbers": numbers}
            for site, numbers in effects.sites.items()
        },
    }


def read_parameters(path: Path) -> Parameters:
    """Read a file that `as_json` describes.

    Raises
    ------
    NoInputError
        If there is none.
    DataError
        If it is something else, or its numbers do not fit together.
    """
    content, problem = read_json(path)
    if problem == "is missing":
        raise NoInputError("there is no such file of parameters", path, MEND)
    if problem:
        raise DataError(f"the file of parameters {problem}", path, MEND)
    if content.get("Format") != FORMAT or content.get("FormatVersion") != FORMAT_VERSION:
        raise DataError(
            f"this is no file of group parameters of version {FORMAT_VERSION}", path, MEND
        )
    try:
        if content["Volume"] not in ("hard", "soft"):
            raise ValueError(f"Volume is {content['Volume']!r}")
        strata = {str(name): _stratum(entry) for name, entry in content["Strata"].items()}
        return Parameters(content["Volume"], strata, path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        text = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"the file of parameters is damaged ({text})", path, MEND) from error


def _stratum(entry: dict[str, Any]) -> tuple[tuple[str, ...], Fit]:
    names = tuple(str(name) for name in entry["Structures"])
    combat, head = entry.get("Combat"), entry.get("HeadSize")
    return names, Fit(
        _read_combat(combat, len(names)) if combat else None,
        _read_head(head, len(names)) if head else None,
    )


def _read_combat(entry: dict[str, Any], features: int) -> SiteEffects:
    covariates = tuple(
        Covariate(str(c["Column"]), tuple(str(level) for level in c["Levels"]))
        for c in entry["Covariates"]
    )
    terms = 2 + sum(len(covariate.names) for covariate in covariates)
    sites = {
        str(site): _numbers(told["Numbers"], (terms, features), f"site {site}")
        for site, told in entry["Sites"].items()
    }
    scans = {str(site): int(told.get("Scans") or 0) for site, told in entry["Sites"].items()}
    reference = entry.get("Reference")
    return SiteEffects(
        str(entry["Column"]),
        None if reference is None else str(reference),
        covariates,
        sites,
        scans,
        entry.get("Priors") == PRIORS,
    )


def _read_head(entry: dict[str, Any], features: int) -> HeadSize:
    if entry["Method"] not in FORMULAS or entry["Measure"] not in ("icv", "brain"):
        raise ValueError(f"HeadSize is {entry['Method']!r} by {entry['Measure']!r}")
    slopes = _numbers(entry["Slopes"], (features,), "HeadSize")
    size = float(entry["MeanHeadSize"])
    if not size > 0:
        raise ValueError(f"MeanHeadSize is {size}")
    return HeadSize(entry["Method"], entry["Measure"], size, slopes, int(entry.get("Scans") or 0))


def _numbers(values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    array = np.array(values, dtype=float)  # null is NaN
    if array.shape != shape:
        raise ValueError(f"{what} has numbers of shape {array.shape} instead of {shape}")
    return array

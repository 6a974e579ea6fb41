"""The covariates of ComBat: columns of the tables as numbers or categories, and their matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tlseg_bids.errors import UsageError, listed
from tlseg_bids.group.study import known, number


@dataclass(frozen=True)
class Covariate:
    """A column whose effect is kept: a number, or a category with its levels (the first is 0)."""

    column: str
    levels: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Names of its columns in the design: ``age_years``, or ``sex=M``."""
        return [f"{self.column}={level}" for level in self.levels[1:]] or [self.column]

    def encode(self, cells: Sequence[str]) -> np.ndarray:
        """Its columns of the design, shape (scans, columns); NaN where unknown or a new level."""
        if not self.levels:
            return np.array([[number(cell)] for cell in cells]).reshape(-1, 1)
        rows = [
            [float(cell == level) for level in self.levels[1:]]
            if cell in self.levels else [math.nan] * len(self.levels[1:])
            for cell in cells
        ]  # fmt: skip
        return np.array(rows).reshape(len(cells), -1)


def covariates_of(columns: Mapping[str, Sequence[str]], fit: np.ndarray) -> tuple[Covariate, ...]:
    """How each column enters: as a number where every known cell of the fit is one.

    Raises
    ------
    UsageError
        If a column has one value only.
    """
    result = []
    for name, cells in columns.items():
        here = sorted({cell for cell, used in zip(cells, fit, strict=True) if used and known(cell)})
        if len(here) < 2:
            raise UsageError(
                f"the column '{name}' has {'no value' if not here else 'one value only'} in the "
                "scans of the fit", "--combat-covariates", "leave it out",
            )  # fmt: skip
        numeric = all(not math.isnan(number(cell)) for cell in here)
        result.append(Covariate(name, () if numeric else tuple(here)))
    return tuple(result)


def without_words(
    columns: Mapping[str, Sequence[str]], fit: np.ndarray
) -> tuple[dict[str, list[str]], list[str]]:
    """Take the few words in a column of numbers (``89+``) for unknown, instead of all for words.

    Returns
    -------
    columns : dict
        The same with ``n/a`` for them, where most of the known values of the fit are numbers.
    notes : list of str
        A sentence for every column that was changed.
    """
    result, notes = {}, []
    for name, cells in columns.items():
        here = {cell for cell, used in zip(cells, fit, strict=True) if used and known(cell)}
        words = {cell for cell in here if math.isnan(number(cell))}
        result[name] = list(cells)
        if not 0 < len(words) < len(here) / 2:
            continue
        result[name] = ["n/a" if math.isnan(number(cell)) else cell for cell in cells]
        shown = listed(f"'{word}'" for word in sorted(words))
        notes.append(
            f"most values of the column '{name}' are numbers, but {shown} "
            f"{'is none' if len(words) == 1 else 'are none'}: ComBat takes the column for numbers "
            "and these for unknown, so that the scans that have them are not harmonised; write "
            "numbers there if they are known, or words everywhere if these are categories"
        )
    return result, notes


def design_of(
    covariates: Sequence[Covariate], columns: Mapping[str, Sequence[str]], scans: int
) -> np.ndarray:
    """The design matrix of the covariates, shape (scans, columns)."""
    parts = [covariate.encode(columns[covariate.column]) for covariate in covariates]
    return np.concatenate([np.empty((scans, 0)), *parts], axis=1)

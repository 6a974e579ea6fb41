"""Which volumes stand out: the distance from the median in robust standard deviations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Z_LIMIT = 3.5
"""Iglewicz & Hoaglin 1993, How to detect and handle outliers, ASQC, ISBN 0-87389-247-X."""
MAD_TO_SD = 1.482602218505602
"""1 / Φ⁻¹(3/4): the median absolute deviation of a normal distribution times this is its sd."""
MEAN_TO_SD = 1.2533141373155001
"""√(π/2), the same for the mean absolute deviation; used where the median one is 0."""
MIN_SCANS = 8
MIN_AGED = 20
WINDOW = 101
NEGLIGIBLE = 1e-9
"""Deviations below this share of the median are rounding."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Robust scores of a stratum.

    Parameters
    ----------
    z, median, sd : ndarray, shape (scans, features)
        Score, and the median and robust standard deviation that it refers to. NaN where there is
        no volume or there are too few scans.
    by_age : ndarray of bool, shape (scans,)
        True where a scan was compared with those nearest in age, false where with all.
    """

    z: np.ndarray
    median: np.ndarray
    sd: np.ndarray
    by_age: np.ndarray


def robust_scores(values: np.ndarray, age: np.ndarray) -> Scores:
    """Compare every scan with those of about its age; one without age with all.

    The neighbours are the `WINDOW` scans nearest in the order of age, fewer in small studies and
    symmetrically fewer towards the youngest and the oldest, so that growth does not shift the
    median there.

    Parameters
    ----------
    values : ndarray, shape (scans, features)
        Volumes.
    age : ndarray, shape (scans,)
        Age; NaN where unknown.

    References
    ----------
    Leys et al. 2013, https://doi.org/10.1016/j.jesp.2013.03.013
    """
    scans = len(values)
    median, sd = np.full(values.shape, np.nan), np.full(values.shape, np.nan)
    by_age = np.zeros(scans, bool)
    if scans >= MIN_SCANS:
        median[:] = _centre(values)
        sd[:] = _spread(_deviation(values, median))
        aged = np.flatnonzero(np.isfinite(age))
        if len(aged) >= MIN_AGED and np.ptp(age[aged]) > 0:
            order = aged[np.argsort(age[aged], kind="stable")]
            windows = _windows(len(order))
            ordered = values[order]
            local = np.array([_centre(ordered[window]) for window in windows])
            residual = _deviation(ordered, local)
            median[order] = local
            sd[order] = [_spread(residual[window]) for window in windows]
            by_age[order] = True
    difference = _deviation(values, median)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(difference == 0, 0.0, difference / np.where(sd > 0, sd, np.nan))
    return Scores(np.where(np.isfinite(difference), z, np.nan), median, sd, by_age)


def _windows(scans: int) -> list[slice]:
    """The neighbours of every scan in the order of age."""
    half = min(WINDOW, max(MIN_AGED, scans // 5)) // 2
    least = min(half, MIN_SCANS)
    slices = []
    for place in range(scans):
        reach = max(least, min(half, place, scans - 1 - place))
        start = max(0, min(place - reach, scans - 1 - 2 * least))
        slices.append(slice(start, max(place + reach, start + 2 * least) + 1))
    return slices


def _centre(values: np.ndarray) -> np.ndarray:
    """Median of every feature; NaN where there is none."""
    if not np.isnan(values).any():
        return np.median(values, axis=0)
    empty = np.isnan(values).all(axis=0)
    return np.where(empty, np.nan, np.nanmedian(np.where(empty, 0.0, values), axis=0))


def _deviation(values: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Differences from `centre`, 0 where they are rounding."""
    difference = values - centre
    return np.where(np.abs(difference) <= NEGLIGIBLE * np.abs(centre), 0.0, difference)


def _spread(residual: np.ndarray) -> np.ndarray:
    """Robust standard deviation of every feature."""
    size = np.abs(residual)
    mad = MAD_TO_SD * _centre(size)
    if (mad > 0).all():
        return mad
    count = np.maximum(np.isfinite(size).sum(axis=0), 1)
    return np.where(mad > 0, mad, MEAN_TO_SD * np.nansum(size, axis=0) / count)

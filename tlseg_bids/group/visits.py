"""Who was scanned more than once: change per year, and what repeated scans agree on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tlseg_bids.errors import listed
from tlseg_bids.group.study import Row
from tlseg_bids.report.derivatives import SAME

RETEST_DAYS = 30.0
"""Scans of one person within this time count as repeated, not as a change."""
DAYS_PER_YEAR = 365.25
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Series:
    """The scans of one participant in one stratum, with the same acquisition and model.

    Parameters
    ----------
    participant : str
    visits : tuple of tuple of int
        Numbers of the rows of every visit, in the order of time.
    years : tuple of float
        Time of each visit since the first; empty where it is unknown.
    basis : str
        Where the time is from: ``acq_time`` or ``age``; empty where it is unknown.
    """

    participant: str
    visits: tuple[tuple[int, ...], ...]
    years: tuple[float, ...] = ()
    basis: str = ""


def series_of(rows: Sequence[Row], numbers: Sequence[int]) -> list[Series]:
    """Series of two scans or more among the rows `numbers` of one stratum."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for number in numbers:
        entities = rows[number].entities
        same = (entities.get(name, "") for name in SAME)
        key = (rows[number].participant, *rows[number].model, *same)
        groups.setdefault(key, []).append(number)
    return [_series(rows, group) for group in groups.values() if len(group) > 1]


def _series(rows: Sequence[Row], group: list[int]) -> Series:
    participant = rows[group[0]].participant
    for basis, days in (
        ("acq_time", [rows[n].date_days for n in group]),
        ("age", [rows[n].visit_age_days for n in group]),
        ("age", [7 * rows[n].visit_pma_weeks for n in group]),  # never mixed with the former
    ):
        if not any(math.isnan(day) for day in days):
            return _timed(participant, group, days, basis)
    sessions: dict[str, list[int]] = {}
    for number in group:
        sessions.setdefault(rows[number].session, []).append(number)
    return Series(participant, tuple(map(tuple, sessions.values())))


def without_time(rows: Sequence[Row], every: Sequence[Series]) -> list[str]:
    """Sentences on the participants whose visits have no time on one clock."""
    clocks: dict[str, None] = {}
    unknown: dict[str, None] = {}
    for series in every:
        if series.years or len(series.visits) < 2:
            continue
        members = [rows[n] for visit in series.visits for n in visit]
        ages = [(row.visit_age_days, row.visit_pma_weeks) for row in members]
        aged = not any(math.isnan(days) and math.isnan(weeks) for days, weeks in ages)
        (clocks if aged else unknown)[f"sub-{series.participant}"] = None
    said = []
    if clocks:
        said.append(
            f"no change is computed for {listed(clocks)}: at some visits only the age since birth "
            "is known and at others only the post-menstrual age, which count from different days; "
            "give acq_time, or one of the two ages for every visit, in scans.tsv or sessions.tsv"
        )
    if unknown:
        said.append(
            f"no change is computed for {listed(unknown)}, as the time of some visits is not "
            "known; give acq_time, or the age at every visit, in scans.tsv or sessions.tsv"
        )
    return said


def _timed(participant: str, group: list[int], days: list[float], basis: str) -> Series:
    """Visits are scans within `RETEST_DAYS` of the first of them."""
    visits: list[list[int]] = []
    starts: list[float] = []
    times: list[list[float]] = []
    for day, number in sorted(zip(days, group, strict=True)):
        if not starts or day - starts[-1] > RETEST_DAYS:
            visits.append([])
            starts.append(day)
            times.append([])
        visits[-1].append(number)
        times[-1].append(day)
    means = [float(np.mean(time)) for time in times]
    years = tuple((mean - means[0]) / DAYS_PER_YEAR for mean in means)
    return Series(participant, tuple(map(tuple, visits)), years, basis)


def annual_change(values: np.ndarray, years: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Slope over the visits, and the slope in percent of the mean over the visits.

    Parameters
    ----------
    values : ndarray, shape (visits, features)
        Volumes, mm³; two visits or more.
    years : sequence of float
        Time of each visit, years.

    Returns
    -------
    rate, percent : ndarray, shape (features,)
        mm³ per year by least squares, and the symmetrised percent change per year (Reuter et al.
        2012, https://doi.org/10.1016/j.neuroimage.2012.02.084); NaN where the mean is 0.
    """
    time = np.asarray(years) - np.mean(years)
    rate = time @ (values - values.mean(axis=0)) / float(time @ time)
    mean = values.mean(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return rate, np.where(mean > 0, 100 * rate / mean, np.nan)


def retest_pairs(every: Iterable[Series]) -> list[tuple[int, int]]:
    """The first two scans of the first visit that has two, of every participant."""
    pairs, seen = [], set()
    for series in every:
        repeated = next((visit for visit in series.visits if len(visit) > 1), None)
        if repeated is not None and series.participant not in seen:
            seen.add(series.participant)
            pairs.append((repeated[0], repeated[1]))
    return pairs


@dataclass(frozen=True)
class Agreement:
    """An intraclass correlation with its 95 % confidence interval."""

    value: float
    low: float
    high: float


def intraclass(scores: np.ndarray) -> tuple[Agreement, Agreement]:
    """ICC(2,1), absolute agreement, and ICC(3,1), consistency.

    Parameters
    ----------
    scores : ndarray, shape (participants, scans)
        At least two of each; NaN results where nothing varies.

    References
    ----------
    Shrout & Fleiss 1979, https://doi.org/10.1037/0033-2909.86.2.420; intervals as there and in
    McGraw & Wong 1996, https://doi.org/10.1037/1082-989X.1.1.30
    """
    from scipy.stats import f

    n, k = scores.shape
    grand = scores.mean()
    between = k * ((scores.mean(axis=1) - grand) ** 2).sum() / (n - 1)
    scans = n * ((scores.mean(axis=0) - grand) ** 2).sum() / (k - 1)
    total = ((scores - grand) ** 2).sum()
    error = (total - between * (n - 1) - scans * (k - 1)) / ((n - 1) * (k - 1))
    error = max(float(error), 0.0)
    free, half = (n - 1) * (k - 1), (1 + CONFIDENCE) / 2
    if between + scans + error == 0:
        return Agreement(math.nan, math.nan, math.nan), Agreement(math.nan, math.nan, math.nan)
    absolute = (between - error) / (between + (k - 1) * error + k * (scans - error) / n)
    consistent = (between - error) / (between + (k - 1) * error)
    if error == 0:
        known = Agreement(float(absolute), math.nan, math.nan)
        return known, Agreement(float(consistent), 1.0, 1.0)
    low, high = (
        between / error / f.ppf(half, n - 1, free),
        between / error * f.ppf(half, free, n - 1),
    )
    three = Agreement(
        float(consistent), float((low - 1) / (low + k - 1)), float((high - 1) / (high + k - 1))
    )
    mix = n * (1 + (k - 1) * absolute) - k * absolute
    ratio = scans / error
    degrees = free * (k * absolute * ratio + mix) ** 2
    degrees /= (n - 1) * (k * absolute * ratio) ** 2 + mix**2
    upper, lower = f.ppf(half, n - 1, degrees), f.ppf(half, degrees, n - 1)
    rest = k * scans + (k * n - k - n) * error
    two = Agreement(
        float(absolute),
        float(n * (between - upper * error) / (upper * rest + n * between)),
        float(n * (lower * between - error) / (rest + n * lower * between)),
    )
    return two, three


def within_subject_cv(scores: np.ndarray) -> float:
    """Within-subject coefficient of variation in percent: root mean square over participants.

    Parameters
    ----------
    scores : ndarray, shape (participants, scans)
        Volumes; participants with the mean 0 are left out (NaN if none is left).

    References
    ----------
    Quan & Shih 1996, https://doi.org/10.2307/2532835
    """
    mean, sd = scores.mean(axis=1), scores.std(axis=1, ddof=1)
    good = mean > 0
    return 100 * float(np.sqrt(np.mean((sd[good] / mean[good]) ** 2))) if good.any() else math.nan

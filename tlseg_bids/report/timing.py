"""When the scans of a subject were made: their order, from dates, ages or the names of sessions."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence

from tlseg_bids.bids.tables import read_table
from tlseg_bids.report.derivatives import LabelledScan

ORIGIN = datetime.datetime(1900, 1, 1)
NUMBERED = re.compile(r"(?P<word>.*?)(?P<number>[0-9]+)")


def date_days(text: str) -> float:
    """Days of an ISO date since an origin; NaN if it is none. Time zones are left aside."""
    try:
        when = datetime.datetime.fromisoformat(text.strip()).replace(tzinfo=None)
    except ValueError:
        return math.nan
    return (when - ORIGIN).total_seconds() / 86400


def order_of(scans: Sequence[LabelledScan]) -> tuple[list[int], str]:
    """Places of the scans of different sessions in the order of time, and what tells the order.

    Returns
    -------
    order : list of int
        Places in `scans`, the earliest first.
    basis : str
        ``acquisition time``, ``age`` or ``number of the session``; empty where nothing tells the
        order, and `order` is then that of the names.
    """
    named = sorted(range(len(scans)), key=lambda place: scans[place].entities.get("ses", ""))
    for basis, times in (
        ("acquisition time", [_acquired(scan) for scan in scans]),
        ("age", [_age(scan, "Days") for scan in scans]),
        ("age", [_age(scan, "PostMenstrualWeeks") for scan in scans]),
        ("number of the session", _numbers([scan.entities.get("ses", "") for scan in scans])),
    ):
        if not any(map(math.isnan, times)) and len(set(times)) == len(times):
            return sorted(named, key=lambda place: times[place]), basis
    return named, ""


def _acquired(scan: LabelledScan) -> float:
    """Days of ``acq_time`` of the scans or else the sessions table of the scan's dataset."""
    if scan.image is None:
        return math.nan
    subject, session = f"sub-{scan.entities['sub']}", f"ses-{scan.entities.get('ses')}"
    folder = scan.image.parent.parent
    for path, column, name in (
        (folder / f"{subject}_{session}_scans.tsv", "filename", scan.image.name),
        (folder.parent / f"{subject}_sessions.tsv", "session_id", session),
    ):
        table = read_table(path)
        rows = [row for row in table.rows if _label(row.get(column, "")) == _label(name)]
        days = {date_days(row.get("acq_time", "")) for row in rows}
        if len(days) == 1 and not math.isnan(day := days.pop()):
            return day
    return math.nan


def _label(cell: str) -> str:
    return cell.rpartition("/")[2].removeprefix("ses-")


def _age(scan: LabelledScan, key: str) -> float:
    """Age at the scan as the sidecar tells it, in the unit of `key`."""
    told = scan.sidecar.get("Age")
    value = told.get(key) if isinstance(told, dict) else None
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.nan


def _numbers(sessions: Sequence[str]) -> list[float]:
    """The numbers that sessions named alike end in: ``1`` and ``12``, ``month06`` and ``month12``.

    NaN where one ends in none, or the words before differ.
    """
    found = [match for session in sessions if (match := NUMBERED.fullmatch(session))]
    if len(found) < len(sessions) or len({match["word"] for match in found}) > 1:
        return [math.nan] * len(sessions)
    return [float(match["number"]) for match in found]

"""The sessions of a subject side by side: each structure's volume, and how much it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tlseg_bids.report.derivatives import LabelledScan
from tlseg_bids.report.verdict import VolumeRow


@dataclass(frozen=True)
class Changes:
    """Scans of one suffix and protocol, a column each.

    `rows` are name of the structure, its volumes (mm³, in the order of `titles`) and the change
    from the first to the last in percent of their mean (NaN where one is not known or both are 0).
    """

    suffix: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...], float], ...]


def changes(scans: Sequence[tuple[LabelledScan, list[VolumeRow]]]) -> list[Changes]:
    """A table for each suffix and protocol that two sessions or more have.

    Of a session the first scan counts, and one without contrast agent before one with it. Sessions
    are in the order of their names; the group level knows their dates.
    """
    found: dict[tuple[str, str], dict[str, tuple[LabelledScan, list[VolumeRow]]]] = {}
    for scan, rows in sorted(scans, key=lambda one: ("ce" in one[0].entities, one[0].stem)):
        session = scan.entities.get("ses")
        if session is not None:
            visits = found.setdefault((scan.suffix, scan.protocol.name), {})
            visits.setdefault(session, (scan, rows))
    tables = []
    for (suffix, _), visits in sorted(found.items()):
        if len(visits) < 2:
            continue
        ordered = [visits[session] for session in sorted(visits)]
        rows = []
        for several in zip(*(rows for _, rows in ordered), strict=True):
            volumes = tuple(row.hard_mm3 for row in several)
            rows.append((several[0].name, volumes, _percent(volumes[0], volumes[-1])))
        titles = tuple(scan.title for scan, _ in ordered)
        tables.append(Changes(suffix, titles, tuple(rows)))
    return tables


def _percent(first: float, last: float) -> float:
    mean = (first + last) / 2
    return 100 * (last - first) / mean if mean > 0 else math.nan

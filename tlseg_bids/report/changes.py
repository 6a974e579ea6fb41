"""The sessions of a subject side by side: each structure's volume, and how much it changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tlseg_bids.report.derivatives import ENTITY_WORDS, SAME, LabelledScan
from tlseg_bids.report.timing import order_of
from tlseg_bids.report.verdict import VolumeRow


@dataclass(frozen=True)
class Changes:
    """Scans of one suffix, acquisition and protocol, a column each.

    `rows` are name of the structure, its volumes (mm³, in the order of `titles`) and the change
    from the first to the last in percent of their mean (NaN where one is not known or both are 0).
    `kind` is the suffix with what else the scans have in common (``T1w, acquisition mprage``);
    `basis` is what tells their order in time, empty where nothing does: then no change is known.
    """

    suffix: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...], float], ...]
    kind: str = ""
    basis: str = ""


def changes(scans: Sequence[tuple[LabelledScan, list[VolumeRow]]]) -> list[Changes]:
    """A table for each suffix, acquisition and protocol that two sessions or more have.

    Scans that differ in an entity of `SAME` are not compared; of a session the first one counts.
    Sessions are in the order of time (`tlseg_bids.report.timing.order_of`).
    """
    found: dict[tuple[str, ...], dict[str, tuple[LabelledScan, list[VolumeRow]]]] = {}
    for scan, rows in sorted(scans, key=lambda one: one[0].stem):
        session = scan.entities.get("ses")
        if session is not None:
            same = (scan.entities.get(name, "") for name in SAME)
            visits = found.setdefault((scan.suffix, scan.protocol.name, *same), {})
            visits.setdefault(session, (scan, rows))
    tables = []
    for (suffix, _, *same), visits in sorted(found.items()):
        if len(visits) < 2:
            continue
        there = list(visits.values())
        order, basis = order_of([scan for scan, _ in there])
        ordered = [there[place] for place in order]
        rows = []
        for several in zip(*(rows for _, rows in ordered), strict=True):
            volumes = tuple(row.hard_mm3 for row in several)
            change = _percent(volumes[0], volumes[-1]) if basis else math.nan
            rows.append((several[0].name, volumes, change))
        titles = tuple(scan.title for scan, _ in ordered)
        words = [f"{ENTITY_WORDS.get(k, k)} {v}" for k, v in zip(SAME, same, strict=True) if v]
        tables.append(Changes(suffix, titles, tuple(rows), ", ".join([suffix, *words]), basis))
    return tables


def _percent(first: float, last: float) -> float:
    mean = (first + last) / 2
    return 100 * (last - first) / mean if mean > 0 else math.nan

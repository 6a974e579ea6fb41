"""Scans that can be image channels beside another one: the T2w of a T1w, and the reverse."""

from __future__ import annotations

from collections.abc import Iterable

from tlseg_bids.bids.scan import Scan

Visits = dict[tuple[str, str | None], list[Scan]]


def by_visit(scans: Iterable[Scan]) -> Visits:
    """Scans by subject and session."""
    visits: Visits = {}
    for scan in scans:
        visits.setdefault((scan.subject, scan.session), []).append(scan)
    return visits


def companions(scan: Scan, visits: Visits) -> dict[str, Scan]:
    """For each other suffix, the scan of the same visit that goes best with `scan`.

    It has the same contrast agent, or none as well, and is skull-stripped or not as `scan` is, as
    far as the sidecars say. Of several the one that shares the most entities (``acq``, ``rec``,
    ``run``, …) is taken, then the first by name.

    Parameters
    ----------
    scan : Scan
        The scan that is labelled.
    visits : dict
        All scans that can be read, as `by_visit` sorts them; `scan` may be among them.
    """
    best: dict[str, tuple[int, str, Scan]] = {}
    for other in visits.get((scan.subject, scan.session), ()):
        if other.suffix == scan.suffix or not _together(scan, other):
            continue
        shared = sum(other.entities.get(key) == value for key, value in scan.entities.items())
        foreign = sum(key not in scan.entities for key in other.entities)
        entry = (foreign - shared, other.stem, other)
        best[other.suffix] = min(best.get(other.suffix, entry), entry, key=lambda e: e[:2])
    return {suffix: entry[2] for suffix, entry in sorted(best.items())}


def _together(scan: Scan, other: Scan) -> bool:
    known = None not in (scan.skull_stripped, other.skull_stripped)
    differ = known and scan.skull_stripped != other.skull_stripped
    return scan.contrast_agent == other.contrast_agent and not differ

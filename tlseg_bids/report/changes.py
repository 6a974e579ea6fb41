"""The sessions of a subject side by side: each structure's volume, and how much it changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlseg_bids.report.derivatives import ENTITY_WORDS, SAME, LabelledScan
from tlseg_bids.report.provenance import Identity, model_identity, model_names
from tlseg_bids.report.timing import order_of
from tlseg_bids.report.verdict import VolumeRow

Labelled = tuple[LabelledScan, list[VolumeRow]]


@dataclass(frozen=True)
class Changes:
    """Scans of one suffix, acquisition and protocol, a column each.

    `kind` is the suffix with what else the scans have in common (``T1w, acquisition mprage``).
    `rows` are name of the structure, its volumes (mm³, in the order of `titles`) and the change
    from the first to the last in percent of their mean (NaN where one is not known or both are 0).
    `basis` is what tells their order in time, empty where nothing does: then no change is known.
    `models` are those that labelled the scans if they are several: then no change is told, as a
    difference between models would look like one of the brain.
    """

    kind: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...], float], ...]
    basis: str
    models: tuple[str, ...] = ()


def changes(scans: Sequence[Labelled]) -> list[Changes]:
    """A table for each suffix, acquisition and protocol that two sessions or more have.

    Scans that differ in an entity of `SAME` are not compared; of a session the first one counts.
    Sessions are in the order of time (`tlseg_bids.report.timing.order_of`). If they were labelled
    by several models, a table of each that labelled two sessions or more follows.
    """
    found: dict[tuple[str, ...], dict[str, list[Labelled]]] = {}
    for scan, rows in sorted(scans, key=lambda one: one[0].stem):
        session = scan.entities.get("ses")
        if session is not None:
            same = (scan.entities.get(name, "") for name in SAME)
            visits = found.setdefault((scan.suffix, scan.protocol.name, *same), {})
            visits.setdefault(session, []).append((scan, rows))
    tables = []
    for (suffix, _, *same), visits in sorted(found.items()):
        words = [f"{ENTITY_WORDS.get(k, k)} {v}" for k, v in zip(SAME, same, strict=True) if v]
        if len(visits) > 1:
            tables += _tables(", ".join([suffix, *words]), list(visits.values()))
    return tables


def _tables(kind: str, visits: list[list[Labelled]]) -> list[Changes]:
    """The sessions side by side; if their models differ, those of each model too."""
    first = [several[0] for several in visits]
    models = model_names(model_identity(scan) for several in visits for scan, _ in several)
    if len({model_identity(scan) for scan, _ in first}) == 1:
        return [_table(kind, first)]
    tables = [_table(kind, first, models)]
    for model, name in models.items():
        own = [[one for one in several if model_identity(one[0]) == model] for several in visits]
        there = [several[0] for several in own if several]
        if len(there) > 1:
            tables.append(_table(f"{kind}, labelled by {name}", there))
    return tables


def _table(
    kind: str, there: list[Labelled], models: Mapping[Identity, str] | None = None
) -> Changes:
    """A table with the change, or without it but with the models if these are given."""
    order, basis = order_of([scan for scan, _ in there])
    ordered = [there[place] for place in order]
    basis = "" if models else basis
    rows = []
    for several in zip(*(rows for _, rows in ordered), strict=True):
        volumes = tuple(row.hard_mm3 for row in several)
        change = _percent(volumes[0], volumes[-1]) if basis else math.nan
        rows.append((several[0].name, volumes, change))
    names = tuple(models[model_identity(scan)] for scan, _ in ordered) if models else ()
    titles = tuple(
        ", ".join([scan.title, *names[place : place + 1]])
        for place, (scan, _) in enumerate(ordered)
    )
    used = tuple(dict.fromkeys(names))
    return Changes(kind, titles, tuple(rows), basis, used)


def _percent(first: float, last: float) -> float:
    mean = (first + last) / 2
    return 100 * (last - first) / mean if mean > 0 else math.nan

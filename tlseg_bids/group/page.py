"""``group.html``: the study on one page that needs nothing but itself.

Volumes stand in it as 16-bit numbers between the least and the largest of each structure: good for
looking; for computing there are the tables.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import write_text
from tlseg_bids.errors import listed
from tlseg_bids.group.analyse import Stratum
from tlseg_bids.group.exclusion import Proposal
from tlseg_bids.group.headsize import FORMULAS
from tlseg_bids.group.study import Key, Study, known, number

MISSING = 65535
LARGEST_DATA_BYTES = 18_000_000
MOST_LEVELS = 40
FEW_NUMBERS = 6
PROPOSAL = "proposal"
MOST_COLUMNS = 60
MOST_NOTES = 200
HIDDEN = {
    "participant_id", "session_id", "scan", "content_key", "reasons", "age_source", "verdict",
}  # fmt: skip
KINDS = {
    "raw": "as measured", "combat": "after ComBat", "adjusted": "corrected for head size",
    "z": "robust z", "asymmetry": "asymmetry of left and right",
}  # fmt: skip


def write_page(
    out_dir: Path,
    study: Study,
    strata: Sequence[Stratum],
    proposals: Sequence[Proposal],
    told: tuple[str, str],
) -> Path:
    """Write ``group.html``.

    Parameters
    ----------
    out_dir : Path
        Root of the derivatives; the subjects' reports are linked where they are.
    study, strata, proposals
        What was computed; a proposal per row of the study.
    told : tuple of str
        Which volume (``hard`` or ``soft``), and the command line.

    Raises
    ------
    CannotCreateError, OutputError
        If the file cannot be written.
    """
    volume, command = told
    step = _step(study, strata)
    shown = list(range(0, len(study.rows), step))
    columns = _columns(study, proposals, shown, _sites(strata))
    counts = Counter(one.proposal for one in proposals)
    environment = Environment(
        loader=PackageLoader("tlseg_bids.group", "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["share"] = lambda v: "–" if not np.isfinite(v) else f"{100 * v:.1f} %"
    page = environment.get_template("group.html.jinja").render(
        version=__version__, command=command, made=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        participants=len({row.participant for row in study.rows}), scans=len(study.rows),
        counts={name: counts.get(name, 0) for name in ("use", "look", "exclude")},
        notes=study.notes[:MOST_NOTES], noted=len(study.notes),
        failures=study.failures[:MOST_NOTES],
        failed=len(study.failures), step=step, settings=_settings(strata, volume),
        left_out=listed(columns.left_out), most_levels=MOST_LEVELS,
        most_columns=MOST_COLUMNS,
        effects=[(s.name, list(zip(s.names, *s.site_effect, strict=True)))
                 for s in strata if s.site_effect is not None],
        style=_asset("tlseg_bids.report", "report.css") + _asset("tlseg_bids.group", "group.css"),
        script=_asset("tlseg_bids.group", "group.js"),
        data=_data(out_dir, study, strata, proposals, shown, columns),
    )  # fmt: skip
    return write_text(out_dir / "group.html", page)


def _asset(package: str, name: str) -> str:
    return (resources.files(package) / "templates" / name).read_text(encoding="utf-8")


def _settings(strata: Sequence[Stratum], volume: str) -> list[tuple[str, str]]:
    """What was chosen, in words."""
    combat = next((s.fit.combat for s in strata if s.fit.combat), None)
    head = next((s.fit.head for s in strata if s.fit.head), None)
    harmonised = "not harmonised"
    if combat:
        kept = ", ".join(c.column for c in combat.covariates) or "no covariate"
        reference = f"; reference {combat.reference}" if combat.reference else ""
        harmonised = f"ComBat by {combat.column}, keeping the effect of {kept}{reference}"
    corrected = f"{head.method} by {head.measure}: {FORMULAS[head.method]}" if head else "none"
    return [
        ("Volumes", {"hard": "hard: voxels with the label", "soft": "soft: probabilities"}[volume]),
        ("Sites", harmonised),
        ("Correction for head size", corrected),
    ]


def _step(study: Study, strata: Sequence[Stratum]) -> int:
    """1 if every scan fits on the page, else every how-manieth does."""
    values = sum(len(s.rows) * (len(s.names) * len(_kinds(s)) + len(s.pairs)) for s in strata)
    size = (2 * values + 2 * MOST_COLUMNS * len(study.rows)) * 4 / 3 + 250 * len(study.rows)
    return int(np.ceil(size / LARGEST_DATA_BYTES))


def _kinds(stratum: Stratum) -> dict[str, np.ndarray]:
    """Values to plot by kind, shape (scans, features) each, without the asymmetry."""
    every = {
        "raw": stratum.raw, "combat": stratum.combat, "adjusted": stratum.adjusted,
        "z": stratum.scores.z,
    }  # fmt: skip
    return {kind: values for kind, values in every.items() if values is not None}


def _data(
    out_dir: Path, study: Study, strata: Sequence[Stratum], proposals: Sequence[Proposal],
    shown: list[int], columns: _Columns,
) -> dict[str, Any]:  # fmt: skip
    """Everything the page's script needs."""
    place = {n: p for p, n in enumerate(shown)}
    rows = [study.rows[n] for n in shown]
    reports = {row.participant: (out_dir / f"sub-{row.participant}.html").is_file() for row in rows}
    return {
        "participant": [row.participant for row in rows],
        "session": [row.session for row in rows],
        "scan": [row.stem for row in rows],
        "report": _packed(np.array([reports[row.participant] for row in rows], np.uint8)),
        "proposal": [proposals[n].proposal for n in shown],
        "reasons": ["; ".join(proposals[n].reasons)[:300] for n in shown],
        "numbers": columns.numbers,
        "categories": columns.categories,
        "strata": [_stratum(stratum, place) for stratum in strata],
    }


def _stratum(stratum: Stratum, place: dict[int, int]) -> dict[str, Any]:
    keep = np.array([n in place for n in stratum.rows], bool)
    kinds = []
    for kind, values in _kinds(stratum).items():
        features = stratum.corrected() if kind == "adjusted" else range(len(stratum.names))
        features = [f for f in features if np.isfinite(values[:, f]).any()]
        unit = {"z": "robust standard deviations"}.get(kind, "mm³")
        if kind == "adjusted" and stratum.fit.head and stratum.fit.head.method == "ratio":
            unit = "share of the head size"
        names = [stratum.names[f] for f in features]
        if not names:
            continue
        kinds.append(_kind(kind, unit, names, values[keep][:, features]))
    if stratum.pairs:
        values = np.stack(list(stratum.pairs.values()), axis=1)[keep]
        kinds.append(
            _kind("asymmetry", "percent, left larger above 0", list(stratum.pairs), values)
        )
    rows = np.array([place[n] for n in stratum.rows if n in place], np.uint32)
    return {"name": stratum.name, "rows": _packed(rows), "kinds": kinds}


def _kind(kind: str, unit: str, names: list[str], values: np.ndarray) -> dict[str, Any]:
    return {
        "kind": kind, "words": KINDS[kind], "unit": unit, "names": names,
        "columns": [_quantised(column) for column in values.T],
    }  # fmt: skip


def _quantised(values: np.ndarray) -> dict[str, Any]:
    """A column as 16-bit numbers: value = low + step · number; `MISSING` is unknown."""
    good = np.isfinite(values)
    low = float(values[good].min()) if good.any() else 0.0
    step = (float(values[good].max()) - low) / (MISSING - 1) if good.any() else 0.0
    numbers = np.full(len(values), MISSING, np.uint16)
    numbers[good] = np.round((values[good] - low) / step) if step > 0 else 0
    return {"low": low, "step": step, "data": _packed(numbers)}


def _packed(values: np.ndarray) -> str:
    little = values.astype(values.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode("ascii")


@dataclass
class _Columns:
    """What volumes can be plotted against, and the names of what they cannot."""

    numbers: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def _sites(strata: Sequence[Stratum]) -> set[str]:
    """Columns that name the site."""
    return {stratum.fit.combat.column for stratum in strata if stratum.fit.combat}


def _columns(
    study: Study, proposals: Sequence[Proposal], shown: list[int], sites: Collection[str]
) -> _Columns:
    """Columns to plot against: numbers, and categories of not too many levels.

    Numbers that name something (the dataset describes their levels, the column is one of `sites`,
    or a few of them recur) are categories. A column of the dataset that is called like the
    program's own ``proposal`` gets its source in front.
    """
    found = _Columns()
    for key, name in study.names.items():
        if name in HIDDEN:
            continue
        cells = [study.rows[n].facts.get(key, "n/a") for n in shown]
        given = [cell for cell in cells if known(cell)]
        levels = sorted(set(given), key=_in_order)
        values = np.array([number(cell) for cell in cells])
        numeric = bool(levels) and all(not np.isnan(number(level)) for level in levels)
        named = name in sites or set(levels) <= _described(study, key)
        recurring = len(levels) <= min(FEW_NUMBERS, len(given) // 2)
        name = f"{key[0]}_{name}" if name == PROPOSAL else name
        if levels and len(found.numbers) + len(found.categories) >= MOST_COLUMNS:
            found.left_out.append(name)
        elif numeric and not recurring and not (named and len(levels) <= MOST_LEVELS):
            found.numbers.append({"name": name, **_quantised(values)})
        elif len(levels) > MOST_LEVELS:
            found.left_out.append(name)
        elif levels:
            found.categories.append(_category(name, cells, levels))
    proposed = [proposals[n].proposal for n in shown]
    found.categories.append(_category(PROPOSAL, proposed, ["use", "look", "exclude"]))
    return found


def _in_order(level: str) -> tuple[float, str]:
    """Key to sort levels by: numbers by size, then words."""
    value = number(level)
    return (np.inf if np.isnan(value) else value, level)


def _described(study: Study, key: Key) -> set[str]:
    """The levels of a column that the dataset's JSON files tell."""
    levels = study.descriptions.get(key, {}).get("Levels")
    return {str(level) for level in levels} if isinstance(levels, dict) else set()


def _category(name: str, cells: Sequence[str], levels: list[str]) -> dict[str, Any]:
    code = {level: n for n, level in enumerate(levels)}
    data = np.array([code.get(cell, 255) for cell in cells], np.uint8)
    return {"name": name, "levels": [level[:80] for level in levels], "data": _packed(data)}

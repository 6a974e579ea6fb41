"""What the page says of a scan at a glance: use it, look at it, or leave it out, and why.

It is the verdict in the sidecar (`tlseg_bids.postprocess.judgement`) where there is one; else it
sums up warnings, flags and the volumes table. It is no rating; the rating is the reader's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tlseg_bids.errors import listed
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.derivatives import LabelledScan, as_list

ASYMMETRY_LIMIT_PERCENT = 30.0
TOLD = ("Flags", "ScanWarnings", "Warnings")
WORDS = {"use": "no finding", "look": "please check", "exclude": "leave out", "fail": "failed"}


@dataclass(frozen=True)
class Verdict:
    """`level` is one of `WORDS`, ``fail`` where there is no result; `reasons`, gravest first."""

    level: str
    reasons: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The level for people."""
        return WORDS[self.level]


@dataclass(frozen=True)
class VolumeRow:
    """One structure of the volumes table; mm³, confidence 0…1, asymmetry in percent.

    Unknown numbers are NaN. `low_mm3` and `high_mm3` are the ends of the calibrated interval.
    """

    index: int
    name: str
    abbreviation: str
    colour: str
    hard_mm3: float
    soft_mm3: float
    confidence: float
    dice: float
    asymmetry: float
    low_mm3: float = math.nan
    high_mm3: float = math.nan


def asymmetry_percent(left_mm3: float, right_mm3: float) -> float:
    """200 · (L − R) / (L + R): positive where the left is larger; NaN if both are absent."""
    total = left_mm3 + right_mm3
    return 200.0 * (left_mm3 - right_mm3) / total if total > 0 else math.nan


def volume_rows(scan: LabelledScan) -> list[VolumeRow]:
    """Every structure of the protocol but the background, in protocol order."""
    measured = {_number(row.get("index")): row for row in scan.volumes or ()}
    partner = {entry["index"]: entry["mirror"] for entry in scan.protocol.records}
    rows = []
    for entry in scan.protocol.records[1:]:
        index, values = int(entry["index"]), measured.get(int(entry["index"]), {})
        hard = _number(values.get("hard_mm3"))
        other = _number(measured.get(int(partner[index]), {}).get("hard_mm3"))
        sides = {"left": (hard, other), "right": (other, hard)}.get(entry["hemisphere"])
        rows.append(
            VolumeRow(
                index=index,
                name=str(entry["name"]),
                abbreviation=str(entry["abbreviation"]),
                colour=str(entry["color"]),
                hard_mm3=hard,
                soft_mm3=_number(values.get("soft_mm3")),
                confidence=_number(values.get("mean_confidence")),
                dice=_number(values.get("predicted_dice")),
                asymmetry=asymmetry_percent(*sides) if sides else math.nan,
                low_mm3=_number(values.get("soft_low_mm3")),
                high_mm3=_number(values.get("soft_high_mm3")),
            )
        )
    return rows


def totals(scan: LabelledScan) -> list[tuple[str, float, str]]:
    """Volumes that are no label of the protocol, from the table's JSON.

    Returns
    -------
    list of (name, mm3, why)
        NaN and the reason where a volume could not be measured.
    """
    named = (("Brain", "BrainVolume"), ("Intracranial", "IntracranialVolume"))
    values = [
        (name, _number(entry.get("Value")), str(entry.get("Reason") or ""))
        for name, key in named
        if isinstance(entry := scan.totals.get(key), dict)
    ]
    return [total for total in values if total[2] or not math.isnan(total[1])]


def verdict(scan: LabelledScan, rows: list[VolumeRow]) -> Verdict:
    """The verdict on a labelled scan, from what is on disk."""
    told = scan.sidecar.get("Verdict")
    level, reasons = "use", []
    if isinstance(told, dict) and told.get("Decision") in WORDS:
        level, reasons = told["Decision"], [str(r) for r in as_list(told.get("Reasons"))]
    else:
        reasons += [str(r) for key in TOLD for r in as_list(scan.sidecar.get(key))]
        absent = [row.name for row in rows if row.hard_mm3 == 0]
        if absent:
            reasons.append(f"no voxel of {listed(absent, 6)}")
        reasons += _asymmetries(rows, scan.protocol)
    if scan.volumes is None:
        reasons.append("there is no volumes table beside the labels")
    if reasons and level == "use":
        level = "look"
    return Verdict(level, tuple(dict.fromkeys(reasons)))


def _asymmetries(rows: list[VolumeRow], protocol: LabelProtocol) -> list[str]:
    left = {pair[0] for pair in protocol.pairs()}
    return [
        f"{_without_side(row.name)}: {'left' if row.asymmetry > 0 else 'right'} larger by "
        f"{abs(row.asymmetry):.0f} % of the mean of both sides"
        for row in rows
        if row.index in left
        and row.hard_mm3 > 0
        and ASYMMETRY_LIMIT_PERCENT < abs(row.asymmetry) < 200
    ]


def _without_side(name: str) -> str:
    bare = name.removeprefix("Left ").removeprefix("Right ")
    return bare[:1].upper() + bare[1:]


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan

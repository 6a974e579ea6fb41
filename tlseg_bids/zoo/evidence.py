"""What was measured of a model, and which of several models was measured better on such scans.

A row of evidence may say on which scans it was measured (`suffixes`, `age_years`,
`contrast_agent`, `skull_stripped`) and over which `structures`; what it leaves out holds for all.
`parent_mean` is the mean of the parent on the same scans and structures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlseg_bids.bids.scan import Scan
from tlseg_bids.zoo.card import ModelCard, age_in_years

SCORE = "dice"
CONFIDENCE = 0.95
GOOD_DICE, WEAK_DICE = 0.75, 0.6
"""Mean Dice from which a model is held to what is asked of a good one, and below which it is called
weak. What models expected of scans like those of their evidence was 0.64 to 0.9 of what it says."""


@dataclass(frozen=True)
class Measured:
    """Dice of one model over the scans of one or several rows of evidence.

    Parameters
    ----------
    datasets : tuple of str
        Where it was measured.
    structures : str
        Over which structures; empty where the row does not say.
    n : int
        Number of scans.
    mean, sd : float
        Over scans.
    by_parent : float
        Lower end by way of the parent: that of the parent, and what the model gained over it on
        the same scans. NaN where the two were not measured together.
    """

    datasets: tuple[str, ...]
    structures: str
    n: int
    mean: float
    sd: float
    by_parent: float = math.nan

    @property
    def low(self) -> float:
        """Lower end of the 95 % confidence interval of the mean: ``mean − t · sd / √n``.

        t is the 0.975 quantile of Student's distribution with n − 1 degrees of freedom
        (doi:10.1093/biomet/6.1.1), so that a good figure on two scans does not beat a slightly
        lower one on fifteen. A gain over the parent on the same scans is known better than either
        mean, as most of the spread is the scans': there the end by way of the parent counts, if it
        is the higher one.
        """
        from scipy.special import stdtrit

        quantile = float(stdtrit(self.n - 1, (1 + CONFIDENCE) / 2))
        own = self.mean - quantile * self.sd / math.sqrt(self.n)
        return own if math.isnan(self.by_parent) else max(own, self.by_parent)

    def __str__(self) -> str:
        over = f", {self.structures}" if self.structures else ""
        where = " and ".join(self.datasets)
        return f"{self.mean:.3f} ± {self.sd:.3f} (n = {self.n}, {where}{over})"


def counts(row: dict[str, Any]) -> bool:
    """Whether a row can be compared: Dice with a spread over two scans or more."""
    numbers = math.isfinite(row["mean"]) and math.isfinite(row["sd"])
    return row["metric"].lower() == SCORE and numbers and row["n"] >= 2


def age_gap(row: dict[str, Any], scan: Scan) -> float | None:
    """How far the ages of a row are from that of a scan; None if it was measured on other scans.

    0 within the row's ages, and where either of the two is not known; else the difference of the
    logarithms of age + 1 year, so that a month counts for an infant what years count for an adult.
    """
    suffixes = row.get("suffixes")
    agent, stripped = row.get("contrast_agent"), row.get("skull_stripped")
    if suffixes and scan.suffix not in suffixes:
        return None
    if agent is not None and agent != bool(scan.contrast_agent):
        return None
    if None not in (stripped, scan.skull_stripped) and stripped != scan.skull_stripped:
        return None
    years, limits = age_in_years(scan.age), row.get("age_years")
    if years is None or limits is None:
        return 0.0
    nearest = min(max(years, limits[0]), limits[1])
    return abs(math.log((years + 1) / (nearest + 1)))


def compare(cards: Sequence[ModelCard], scan: Scan) -> dict[str, Measured]:
    """The measurement by which models can be compared for a scan, by the name of the card.

    Of each card the rows nearest in age count. Models are compared on a dataset and a set of
    structures that the most of them share; where no two share one, over the datasets together;
    where not even the structures agree, not at all. A model that lacks the measurement is absent.

    Returns
    -------
    dict of str to Measured
        Empty, or with two entries or more.
    """
    rows = {card.name: _nearest(card, scan) for card in cards}
    for columns in (("dataset", "structures"), ("structures",)):
        groups = {name: _grouped(found, columns) for name, found in rows.items()}
        shared = Counter(key for found in groups.values() for key in found)
        if shared and max(shared.values()) > 1:
            key = min(shared, key=lambda key: (-shared[key], key))
            found = {name: rows[key] for name, rows in groups.items() if key in rows}
            return _by_parents({card.name: card for card in cards}, found)
    return {}


def _by_parents(cards: dict[str, ModelCard], rows: dict[str, list]) -> dict[str, Measured]:
    """The measurement of each card, by way of its parent where that is known."""
    done: dict[str, Measured] = {}

    def of(name: str, younger: tuple[str, ...]) -> Measured:
        if name not in done:
            found, parent = _pooled(rows[name]), cards[name].parent
            gain = _gain(rows[name])
            if gain is not None and parent in rows and parent not in (name, *younger):
                low = of(parent, (name, *younger)).low + gain
                found = replace(found, by_parent=low)
            done[name] = found
        return done[name]

    return {name: of(name, ()) for name in rows}


def gain_on_parent(card: ModelCard, scan: Scan) -> float | None:
    """Mean Dice of a card minus that of its parent, on the same scans and structures.

    Of the rows nearest to the scan those count that hold both figures (`parent_mean`); None where
    there is none.
    """
    return _gain(_nearest(card, scan))


def _gain(rows: Iterable[dict[str, Any]]) -> float | None:
    pairs = [row for row in rows if math.isfinite(row.get("parent_mean", math.nan))]
    total = sum(row["n"] for row in pairs)
    return sum(r["n"] * (r["mean"] - r["parent_mean"]) for r in pairs) / total if pairs else None


def measured(card: ModelCard, scan: Scan | None = None) -> list[Measured]:
    """Dice of a card, one entry for each set of structures; for a scan, from its nearest rows."""
    rows = [row for row in card.evidence if counts(row)] if scan is None else _nearest(card, scan)
    return [_pooled(found) for found in _grouped(rows, ("structures",)).values()]


def reached(card: ModelCard) -> float | None:
    """Mean Dice of a card on its best dataset, over its worst set of structures; None for none.

    What is expected of a scan is a mean over every structure, so a good figure for some of them
    does not count where a lower one for more of them is known.
    """
    best: dict[str, float] = {}
    for row in card.evidence:
        if row["metric"].lower() == SCORE and math.isfinite(row["mean"]):
            over = row.get("structures", "")
            best[over] = max(row["mean"], best.get(over, 0.0))
    return min(best.values(), default=None)


def skill(card: ModelCard) -> float:
    """Share of `GOOD_DICE` that a card `reached`, 1 at most; 1 if it was measured nowhere."""
    found = reached(card)
    return 1.0 if found is None else min(found / GOOD_DICE, 1.0)


def _nearest(card: ModelCard, scan: Scan) -> list[dict[str, Any]]:
    gaps = [(age_gap(row, scan), row) for row in card.evidence if counts(row)]
    least = min((gap for gap, _ in gaps if gap is not None), default=None)
    return [row for gap, row in gaps if gap is not None and gap == least]


def _grouped(rows: Iterable[dict[str, Any]], columns: tuple[str, ...]) -> dict[tuple, list]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column, "") for column in columns), []).append(row)
    return groups


def _pooled(rows: list[dict[str, Any]]) -> Measured:
    """Mean and spread of all scans of the rows together."""
    total = sum(row["n"] for row in rows)
    mean = sum(row["n"] * row["mean"] for row in rows) / total
    squares = sum((r["n"] - 1) * r["sd"] ** 2 + r["n"] * (r["mean"] - mean) ** 2 for r in rows)
    datasets = tuple(dict.fromkeys(row["dataset"] for row in rows))
    structures = rows[0].get("structures", "")
    return Measured(datasets, structures, total, mean, math.sqrt(squares / (total - 1)))

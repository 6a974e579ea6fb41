"""Which scans to leave out: proposed from reports, outliers and ratings, applied by nobody here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tlseg_bids.bids.tables import read_table
from tlseg_bids.errors import DataError, NoInputError, amount, listed
from tlseg_bids.group.outliers import Z_LIMIT
from tlseg_bids.group.study import Row, known

FAR = 5.0
MANY = 3
RATINGS = ("pass", "needs edit", "fail")
NEEDED = ("participant_id", "scan", "rating")


@dataclass(frozen=True)
class Rating:
    """What one person said of one scan; `stale` if it was said of an earlier result."""

    rating: str
    rater: str
    note: str
    time: str
    stale: bool


@dataclass(frozen=True)
class Proposal:
    """``use``, ``look`` or ``exclude`` for one scan, and why."""

    proposal: str
    reasons: tuple[str, ...]
    ratings: tuple[Rating, ...]
    outliers: int
    largest_z: float


def rating_files(paths: Sequence[Path]) -> list[Path]:
    """The TSV files named, and those in the folders named.

    Raises
    ------
    NoInputError
        If a path does not exist, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*_ratings.tsv")) if path.is_dir() else [path]
        if not inside or not all(file.is_file() for file in inside):
            what = "the folder holds no *_ratings.tsv" if path.is_dir() else "there is no such file"
            raise NoInputError(what, path, "name the TSV that the button of a report exports")
        files += inside
    return files


def read_ratings(
    paths: Sequence[Path], rows: Sequence[Row]
) -> tuple[dict[str, tuple[Rating, ...]], list[str]]:
    """Ratings by scan, the latest of each rater, and sentences on those of no use.

    Raises
    ------
    NoInputError
        As `rating_files`.
    DataError
        If a file is no table of ratings.
    """
    keys = {row.stem: row.facts.get(("", "content_key"), "n/a") for row in rows}
    latest: dict[tuple[str, str], Rating] = {}
    unknown: dict[str, None] = {}
    odd: dict[str, None] = {}
    for file in rating_files(paths):
        table = read_table(file)
        missing = [name for name in NEEDED if not table.rows or name not in table.rows[0]]
        if table.problem or missing:
            what = table.problem or f"has no column {listed(missing)}"
            raise DataError(f"the table of ratings {what}", file, "export it again from the report")
        for line in table.rows:
            rating, stem = line["rating"].casefold(), line["scan"]
            if not known(rating):
                continue
            if stem not in keys:
                unknown[f"{line['participant_id']} ({stem})"] = None
            elif rating not in RATINGS:
                odd[f"'{line['rating']}' of {stem}"] = None
            else:
                key = line.get("content_key", "n/a")
                stale = known(key) and known(keys[stem]) and key != keys[stem]
                rater = line.get("rater", "n/a")
                one = Rating(rating, rater, line.get("note", ""), line.get("time", ""), stale)
                before = latest.get((stem, rater))
                if before is None or before.time <= one.time:
                    latest[stem, rater] = one
    notes = []
    if unknown:
        notes.append(
            f"ratings of scans that are not in the tables are left aside: {listed(unknown)}"
        )
    if odd:
        notes.append(f"ratings other than {', '.join(RATINGS)} are left aside: {listed(odd)}")
    ratings: dict[str, tuple[Rating, ...]] = {}
    for (stem, _), one in latest.items():
        ratings[stem] = (*ratings.get(stem, ()), one)
    return ratings, notes


def propose(
    row: Row, scores: np.ndarray, names: Sequence[str], ratings: tuple[Rating, ...]
) -> Proposal:
    """What to do with one scan.

    Parameters
    ----------
    row : Row
    scores : ndarray, shape (features,)
        Robust scores; NaN where there is none.
    names : sequence of str
        Features.
    ratings : tuple of Rating
        Of this scan.

    Returns
    -------
    Proposal
        ``exclude`` where somebody rated the present result as failed, or nobody rated it and its
        verdict is to leave it out; ``look`` where it needs an edit, or nobody passed it and the
        report advises a look, `MANY` structures are outliers (beyond `Z_LIMIT`) or one lies beyond
        `FAR`; else ``use``.
    """
    size = np.nan_to_num(np.abs(scores))
    out = [name for name, beyond in zip(names, size > Z_LIMIT, strict=True) if beyond]
    current = {one.rating for one in ratings if not one.stale}
    reasons = [_said(one) for one in ratings]
    reasons += row.reasons
    if out:
        order = sorted(out, key=lambda name: -size[names.index(name)])
        reasons.append(f"{amount(len(out), 'outlying volume')}: {listed(order, 4)}")
    striking = bool(row.reasons) or len(out) >= MANY or size.max(initial=0.0) > FAR
    unfit = row.facts.get(("", "verdict")) == "exclude" and not current
    if "fail" in current or unfit:
        proposal = "exclude"
    elif "needs edit" in current or (striking and "pass" not in current):
        proposal = "look"
    else:
        proposal = "use"
    return Proposal(proposal, tuple(reasons), ratings, len(out), float(size.max(initial=0.0)))


def _said(one: Rating) -> str:
    who = f" by {one.rater}" if known(one.rater) else ""
    note = f" ({one.note})" if known(one.note) else ""
    return f"rated '{one.rating}'{who}{note}{', of an earlier result' if one.stale else ''}"

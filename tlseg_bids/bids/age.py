"""How old the person was at the scan, from `--age` or from the dataset's TSV files.

The nearest table that gives an age wins: scans, then sessions, then participants. In one table,
``age_days``, ``age_weeks`` and ``age_months`` come before ``age`` (whose unit is the ``Units`` of
the JSON beside the table, else years, the BIDS default) and ``age_years``; post-menstrual age is
read from ``scan_age``, ``pma_weeks`` or ``pma``. Upper and lower case of these names, of those of
the columns that name the scan and of ``Units`` do not matter. A missing, withheld (``n/a``) or
capped (``89+``) age is normal: the result says why there is none, and nothing is raised.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tlseg_bids.bids.scan import Age
from tlseg_bids.bids.tables import Table, read_table
from tlseg_bids.errors import UsageError

DAYS_PER_YEAR = 365.25
OLDEST_YEARS = 125.0
PMA_WEEKS = (18.0, 200.0)

DAYS = {"day": 1.0, "week": 7.0, "month": DAYS_PER_YEAR / 12, "year": DAYS_PER_YEAR}
UNIT_NAMES = {
    "day": ("d", "day", "days"),
    "week": ("w", "wk", "wks", "week", "weeks"),
    "month": ("m", "mo", "mos", "mon", "month", "months"),
    "year": ("y", "yr", "yrs", "year", "years"),
}
UNITS = {name: unit for unit, names in UNIT_NAMES.items() for name in names}
AGE_COLUMNS = (
    ("age_days", "day"), ("age_weeks", "week"), ("age_months", "month"),
    ("age", None), ("age_years", "year"),
)  # fmt: skip
PMA_COLUMNS = ("scan_age", "pma_weeks", "pma")
UNKNOWN = {"", "n/a", "na", "nan", "none", "null", "unknown", "missing", "-"}
PMA_WORDS = re.compile(r"\b(pma|ga|gw|post-?\s?menstrual(\s+age)?|gestation(al)?(\s+age)?)\b")
AMOUNT = re.compile(r"(\d+(?:[.,]\d+)?)\s*([a-zµ]*)")


class _CannotRead(ValueError):
    """A cell or option that holds no age; the message is the reason."""


def parse_age(text: str) -> Age:
    """Read the value of ``--age``.

    Parameters
    ----------
    text : str
        A number is years (``34``); a number with a unit is that (``6 months``, ``10d``,
        ``2 years 3 months``, ``2y3m``); with ``pma`` it is post-menstrual age, in weeks where no
        unit stands (``40w pma``, ``40 pma``, ``40+3 weeks PMA`` is 40 weeks and 3 days).

    Returns
    -------
    Age
        With source ``--age``.

    Raises
    ------
    UsageError
        If the text is no age, or not a human one.
    """
    try:
        return _age_from_text(text, unit=None, pma=False, source="--age")
    except _CannotRead as reason:
        raise UsageError(
            f"the age '{text}' cannot be used: {reason}", "--age",
            "write years (34), another unit (6 months, 10 days) or post-menstrual weeks (40w pma)",
        ) from None  # fmt: skip


class AgeReader:
    """Reads the age of one scan after another; every table is opened once.

    Parameters
    ----------
    bids_dir : Path
        Root of the dataset.
    override : str or None
        Value of ``--age``; then no table is read.

    Raises
    ------
    UsageError
        If the override is no age.
    """

    def __init__(self, bids_dir: Path, override: str | None = None) -> None:
        self._root = bids_dir
        self._override = None if override is None else parse_age(override)
        self._tables: dict[Path, Table] = {}

    def age(self, path: Path, entities: dict[str, str]) -> Age:
        """Age at the scan `path` of the subject (and session) in `entities`.

        Returns
        -------
        Age
            Where nothing gives an age, `source` says why, e.g. ``participants.tsv says 'n/a'``.
        """
        if self._override is not None:
            return self._override
        reasons = []
        for table, rows in self._rows(path, entities):
            age = age_from_rows(table, rows)
            if age.days is not None or age.pma_weeks is not None:
                return age
            if age.source:
                reasons.append(age.source)
        return Age(source="; ".join(reasons) or "not given")

    def _rows(self, path: Path, entities: dict[str, str]):
        """The scan's rows in the scans, sessions and participants tables, nearest first."""
        subject, session = f"sub-{entities['sub']}", entities.get("ses")
        folder = self._root / subject
        inner = folder / f"ses-{session}" if session else folder
        stem = f"{subject}_ses-{session}" if session else subject
        scans = self._table(inner / f"{stem}_scans.tsv", "scans.json")
        here = path.relative_to(inner).as_posix() if path.is_relative_to(inner) else path.name
        yield _matching(scans, "filename", "[./]+", here)
        if session:
            table = self._table(folder / f"{subject}_sessions.tsv", "sessions.json")
            yield _matching(table, "session_id", "ses-", session)
        table = self._table(self._root / "participants.tsv")
        table, rows = _matching(table, "participant_id", "sub-", entities["sub"])
        if session and any(row.get(_spelled(row, "session_id")) for row in rows):
            _, rows = _matching(replace(table, rows=tuple(rows)), "session_id", "ses-", session)
        yield table, rows

    def _table(self, path: Path, inherited: str = "") -> Table:
        """A table, read once; `inherited` names the JSON that may stand at the root."""
        if path not in self._tables:
            sidecars = (path.with_suffix(".json"),)
            if inherited:
                sidecars = (self._root / inherited, *sidecars)
            self._tables[path] = read_table(path, sidecars)
        return self._tables[path]


def _matching(
    table: Table, column: str, prefix: str, label: str
) -> tuple[Table, list[dict[str, str]]]:
    """A table, and its rows whose `column` is the label, with or without the pattern `prefix`."""
    name = _spelled(table.rows[0], column) if table.rows else column
    if name is None:
        return replace(table, problem=f"has no column '{column}'"), []
    wanted = re.compile(f"(?:{prefix})?{re.escape(label)}")
    return table, [row for row in table.rows if wanted.fullmatch(row[name])]


def _spelled(names: Iterable[str], name: str) -> str | None:
    """How a table or its JSON spells a name, of which upper and lower case do not matter."""
    return next((one for one in names if one.casefold() == name.casefold()), None)


def age_from_rows(table: Table, rows: list[dict[str, str]]) -> Age:
    """The age that the rows of one scan agree on; `source` holds the reason if there is none."""
    if table.problem:
        return Age(source=f"{table.name} {table.problem}")
    if not table.exists:
        return Age(source="")
    if not rows:
        return Age(source=f"{table.name} has no row for it")
    ages = [_age_from_row(table, row) for row in rows]
    found = {(age.days, age.pma_weeks) for age in ages}
    if len(found) > 1:
        return Age(source=f"{table.name} has {len(rows)} rows for it with different ages")
    return ages[0]


def _age_from_row(table: Table, row: dict[str, str]) -> Age:
    """Days since birth and post-menstrual weeks, each from the first column that gives it."""
    cells = {name.casefold(): (name, cell) for name, cell in row.items() if name}
    days = pma = None
    reasons = []
    columns = [(column, unit, False) for column, unit in AGE_COLUMNS]
    columns += [(column, None, True) for column in PMA_COLUMNS]
    present = [entry for entry in columns if entry[0] in cells]
    for column, unit, is_pma in present:
        if (pma if is_pma else days) is not None:
            continue
        name, cell = cells[column]
        try:
            age = _age_from_text(cell, unit or _stated_unit(table, name), is_pma, table.name)
        except _CannotRead as reason:
            reasons.append(f"{table.name}, column '{name}': {reason}")
            continue
        days = age.days if days is None else days
        pma = age.pma_weeks if pma is None else pma
    if days is not None or pma is not None:
        return Age(days, pma, table.name)
    if not present:
        return Age(source=f"{table.name} has no age column")
    return Age(source="; ".join(reasons))


def _stated_unit(table: Table, column: str) -> str | None:
    """``Units`` of a column in the table's JSON; None if it states none."""
    entry = table.columns.get(_spelled(table.columns, column))
    units = entry.get(_spelled(entry, "Units")) if isinstance(entry, dict) else None
    return units.strip() if isinstance(units, str) and units.strip() else None


def _age_from_text(text: str, unit: str | None, pma: bool, source: str) -> Age:
    """Read one age; the unit in the text comes before `unit`, years (PMA: weeks) come last."""
    words = text.strip().casefold()
    if words in UNKNOWN:
        raise _CannotRead(f"it says '{text.strip() or 'nothing'}'")
    if re.fullmatch(r"\d+\s*\+", words) or re.match(r"[<>≥≤]=?\s*\d", words):
        raise _CannotRead(f"it says '{text.strip()}', which is a bound and no age")
    if unit is not None and PMA_WORDS.search(unit.casefold()):
        pma = True
    if PMA_WORDS.search(words):
        pma, words = True, PMA_WORDS.sub(" ", words).strip()
    words = re.sub(r"\b(old|of age)\b", "", words).strip()
    unit = _unit(unit, "week" if pma else "year")
    if pma:
        gestation = re.fullmatch(r"(\d+)\s*\+\s*([0-6])\s*(?:w|wk|wks|weeks?)?", words)
        days = (
            7.0 * int(gestation[1]) + int(gestation[2]) if gestation
            else _sum_of_amounts(words, unit, text)
        )  # fmt: skip
        if not PMA_WEEKS[0] <= days / 7 <= PMA_WEEKS[1]:
            raise _CannotRead(
                f"'{text.strip()}' is {days / 7:g} post-menstrual weeks, outside "
                f"{PMA_WEEKS[0]:g} to {PMA_WEEKS[1]:g}"
            )
        return Age(None, days / 7, source)
    days = _sum_of_amounts(words, unit, text)
    if days > OLDEST_YEARS * DAYS_PER_YEAR:
        raise _CannotRead(f"'{text.strip()}' taken as {unit}s is more than {OLDEST_YEARS:g} years")
    return Age(days, None, source)


def _unit(stated: str | None, default: str) -> str:
    """The unit in a phrase such as ``months (corrected)``; `default` if nothing is stated."""
    if stated is None:
        return default
    if "conception" in stated.casefold():
        raise _CannotRead(
            f"the unit '{stated}' counts from conception; since birth or post-menstrual is needed"
        )
    words = re.findall(r"[a-z]+", stated.casefold())
    units = {UNITS[word] for word in words if word in UNITS}
    if PMA_WORDS.search(stated.casefold()) and not units:
        return "week"
    if len(units) != 1:
        raise _CannotRead(f"the unit '{stated}' is neither days, weeks, months nor years")
    return units.pop()


def _sum_of_amounts(words: str, unit: str, text: str) -> float:
    """Days in ``6``, ``6 months`` or ``2y 3m``; a number without its own unit has `unit`."""
    if re.fullmatch(r"0\d\d[dwmy]", words):  # a DICOM age string, as in 034Y
        words = words.lstrip("0") if words[:3] != "000" else "0" + words[-1]
    rest = AMOUNT.sub("", words).replace(",", "").replace("and", "").strip()
    amounts = AMOUNT.findall(words)
    if rest or not amounts or (len(amounts) > 1 and not all(name for _, name in amounts)):
        raise _CannotRead(f"'{text.strip()}' is not an age")
    days = 0.0
    for number, name in amounts:
        if name and name not in UNITS:
            raise _CannotRead(f"'{name}' is neither days, weeks, months nor years")
        days += float(number.replace(",", ".")) * DAYS[UNITS[name] if name else unit]
    if not math.isfinite(days):
        raise _CannotRead(f"'{text.strip()}' is not an age")
    return days

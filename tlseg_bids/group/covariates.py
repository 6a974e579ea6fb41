"""What the BIDS dataset says of a scan: participants, sessions and scans tables, age and time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tlseg_bids.bids.age import age_from_rows
from tlseg_bids.bids.metadata import SCANNER
from tlseg_bids.bids.scan import Age
from tlseg_bids.bids.sidecar import SidecarReader
from tlseg_bids.bids.tables import Table, read_table
from tlseg_bids.errors import listed
from tlseg_bids.group.study import Key, number, snake
from tlseg_bids.report.derivatives import LabelledScan
from tlseg_bids.report.timing import date_days

IDENTITY = {"participant_id", "session_id", "filename"}


class Covariates:
    """Looks scan after scan up in the tables of a dataset; those of one subject at a time.

    Parameters
    ----------
    bids_dir : Path
        Root of the dataset; without a participants.tsv there are fewer columns.
    """

    def __init__(self, bids_dir: Path) -> None:
        self._root = bids_dir
        self._sidecars = SidecarReader(bids_dir)
        self._participants = read_table(bids_dir / "participants.tsv")
        self._by_label: dict[str, list[dict[str, str]]] = {}
        for row in self._participants.rows:
            label = row.get("participant_id", "").removeprefix("sub-")
            self._by_label.setdefault(label, []).append(row)
        self._subject, self._tables = "", dict[Path, Table]()
        self._missing: dict[str, None] = {}
        self._twice: dict[str, None] = {}
        self._other_age: dict[str, None] = {}
        self.descriptions: dict[Key, dict[str, Any]] = {
            ("participants", name): entry
            for name, entry in self._participants.columns.items()
            if isinstance(entry, dict)
        }

    def of(self, scan: LabelledScan) -> tuple[dict[Key, str], Age, float, Age]:
        """Facts, age, date in days (NaN: unknown) and per-visit age of a labelled scan.

        The per-visit age is that of the scans or sessions table; it is unknown where the age is
        from elsewhere.
        """
        if scan.entities["sub"] != self._subject:
            self._subject, self._tables = scan.entities["sub"], {}
        tables = self._rows(scan)
        facts: dict[Key, str] = {}
        for source in ("participants", "sessions", "scans"):
            _, rows = tables[source]
            facts.update(self._cells(source, rows, f"sub-{self._subject}"))
        facts.update(self._scanner(scan))
        age, of_visit = self._age(scan, tables)
        dates = [facts.get((source, "acq_time"), "") for source in ("scans", "sessions")]
        date = next((d for d in map(date_days, dates) if not math.isnan(d)), math.nan)
        return facts, age, date, age if of_visit else Age()

    def notes(self) -> list[str]:
        """Sentences on what could not be found, for the whole study."""
        table, said = self._participants, []
        if not table.exists:
            said.append(
                f"there is no participants.tsv in {self._root}, so that the tables hold no "
                "covariates of it"
            )
        elif table.problem:
            said.append(f"participants.tsv {table.problem}, so that nothing of it is in the tables")
        elif self._missing:
            said.append(
                f"participants.tsv has no row for {listed(self._missing)}; their covariates are n/a"
            )
        if self._twice:
            said.append(
                f"participants.tsv has several rows for {listed(self._twice)}; cells in which they "
                "differ are n/a"
            )
        if self._other_age:
            said.append(
                "the tables give another age now than when the scan was labelled for "
                f"{listed(self._other_age)}; the tables are believed, but the model may have been "
                "chosen by the former age"
            )
        return said

    def _rows(self, scan: LabelledScan) -> dict[str, tuple[Table, list[dict[str, str]]]]:
        """Rows of the scan in each table."""
        subject, session = f"sub-{self._subject}", scan.entities.get("ses")
        folder = self._root / subject
        inner = folder / f"ses-{session}" if session else folder
        stem = f"{subject}_ses-{session}" if session else subject
        people = list(self._by_label.get(self._subject, ()))
        if session and any(row.get("session_id") for row in people):
            people = _of_session(people, session)
        scans = self._table(inner / f"{stem}_scans.tsv", "scans.json")
        name = scan.source.rpartition("/")[2]
        rows = [row for row in scans.rows if row.get("filename", "").rpartition("/")[2] == name]
        sessions = self._table(folder / f"{subject}_sessions.tsv", "sessions.json")
        visits = _of_session(sessions.rows, session) if session else []
        return {
            "participants": (self._participants, people),
            "sessions": (sessions, visits),
            "scans": (scans, rows if name else []),
        }

    def _table(self, path: Path, inherited: str) -> Table:
        if path not in self._tables:
            table = read_table(path, (self._root / inherited, path.with_suffix(".json")))
            source = inherited.removesuffix(".json")
            for name, entry in table.columns.items():
                if isinstance(entry, dict):
                    self.descriptions.setdefault((source, name), entry)
            self._tables[path] = table
        return self._tables[path]

    def _cells(self, source: str, rows: list[dict[str, str]], who: str) -> dict[Key, str]:
        """The cells on which the rows of one table agree."""
        if source == "participants" and self._participants.rows and not rows:
            self._missing[who] = None
        cells: dict[Key, str] = {}
        for row in rows:
            for column, cell in row.items():
                key = (source, column)
                if not column or column in IDENTITY:
                    continue
                if cells.setdefault(key, cell) != cell:
                    cells[key] = "n/a"
                    self._twice[who] = None
        return cells

    def _scanner(self, scan: LabelledScan) -> dict[Key, str]:
        """The scanner, from the derivative's sidecar; for one that is silent, from the scan's."""
        told = scan.sidecar.get("Scanner")
        if not isinstance(told, dict):
            relative = scan.source.rpartition(":")[2]
            path = self._root / relative
            entities = {k: v for k, v in scan.entities.items() if k != "space"}
            inside = relative and ".." not in path.parts
            told = self._sidecars.metadata(path, entities, scan.suffix)[0] if inside else {}
        return {
            ("scanner", f"scanner_{snake(key)}"): str(told[key]) for key in SCANNER if key in told
        }

    def _age(self, scan: LabelledScan, tables) -> tuple[Age, bool]:
        """Age from the nearest table, else as known at labelling; whether it is of the visit."""
        told = scan.sidecar.get("Age")
        told = told if isinstance(told, dict) else {}
        days, pma = (_positive(told.get(key)) for key in ("Days", "PostMenstrualWeeks"))
        before = Age(days, pma, str(told.get("Source") or "not given"))
        if before.source == "--age":
            return before, False
        reasons = []
        for source in ("scans", "sessions", "participants"):
            table, rows = tables[source]
            age = age_from_rows(table, rows)
            if age.days is None and age.pma_weeks is None:
                reasons += [age.source] if age.source else []
                continue
            if before.days is not None and age.days is not None and age.days != before.days:
                self._other_age[f"sub-{self._subject}"] = None
            return age, source != "participants"
        if before.days is None and before.pma_weeks is None:
            return Age(source="; ".join(reasons) or before.source), False
        return before, False


def _of_session(rows, session: str) -> list[dict[str, str]]:
    return [row for row in rows if row.get("session_id", "").removeprefix("ses-") == session]


def _positive(value: object) -> float | None:
    found = number(value)
    return found if found >= 0 else None

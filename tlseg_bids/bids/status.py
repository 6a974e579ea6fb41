"""What became of every scan, over all runs and shards that share an output folder.

Each run writes its own ``logs/plan_<id>.tsv`` and ``logs/status_<id>.tsv``; here they are put
together, so that a scan which a run had planned and never ended is seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tlseg_bids.bids.atomic import clean_cell
from tlseg_bids.bids.runlog import STATUS_COLUMNS
from tlseg_bids.bids.source import is_gone, source_dataset
from tlseg_bids.bids.tables import read_table
from tlseg_bids.errors import DataError, NoInputError

UNFINISHED = "unfinished"
REMOVED = "removed"
COLUMNS = ("scan", "status", "run", "times_done", *STATUS_COLUMNS[3:], "time")
GOOD = ("done", "reused", "skipped", REMOVED)


@dataclass(frozen=True)
class ScanStatus:
    """The latest word on a scan.

    `row` has the cells of `STATUS_COLUMNS`; `run` is the id of the run that wrote it;
    `times_done` counts how often the scan was labelled, over all runs (reuse is not counted).
    """

    scan: str
    status: str
    run: str
    times_done: int
    row: dict[str, str]

    @property
    def good(self) -> bool:
        """Whether nothing is left to do."""
        return self.status in GOOD

    def cells(self) -> list[str]:
        """The cells of `COLUMNS`."""
        own = {"scan": self.scan, "status": self.status, "run": self.run,
               "times_done": str(self.times_done)}  # fmt: skip
        return [own.get(name, self.row.get(name, "")) for name in COLUMNS]


def read_status(out_dir: Path) -> list[ScanStatus]:
    """The latest status of every scan that a run under `out_dir` planned, by scan.

    ``unfinished`` is a scan of which the run that planned it last has not said what became of it:
    the run is at work, or was killed. A scan that was finished before with the same content key
    stays finished. ``removed`` is one that failed or was not ended, and is no longer in the
    dataset; where the dataset is not found, nothing counts as removed.

    Raises
    ------
    NoInputError
        If there are no plans.
    DataError
        If a table cannot be read.
    """
    logs = out_dir / "logs"
    plans = sorted(logs.glob("plan_*.tsv"))
    if not plans:
        raise NoInputError(
            "no run has left a plan", logs, "name the OUT_DIR of a run of tlseg participant"
        )
    latest: dict[str, ScanStatus] = {}
    keys: dict[str, str] = {}
    done: Counter[str] = Counter()
    for plan in plans:  # an id begins with its time, so the runs come in their order
        run = plan.stem.removeprefix("plan_")
        for row in _rows(plan):
            scan, key = row["scan"], row.get("key", "")
            before = latest.get(scan)
            if before is None or not before.good or keys.get(scan) != key:
                latest[scan] = ScanStatus(scan, UNFINISHED, run, 0, row)
            keys[scan] = key
        for row in _rows(logs / f"status_{run}.tsv"):
            done[row["scan"]] += row.get("status") == "done"
            latest[row["scan"]] = ScanStatus(row["scan"], row.get("status", ""), run, 0, row)
    dataset = source_dataset(out_dir)
    for scan, status in latest.items():
        if dataset is not None and not status.good and is_gone(dataset, scan):
            latest[scan] = replace(status, status=REMOVED)
    return [replace(status, times_done=done[scan]) for scan, status in sorted(latest.items())]


def _rows(path: Path) -> tuple[dict[str, str], ...]:
    table = read_table(path)
    if table.problem == "is empty":  # a run that is just starting
        return ()
    if table.problem or any("scan" not in row for row in table.rows):
        raise DataError(
            f"the table {table.problem or 'has no column scan'}", path,
            "remove this file; the run that wrote it is then not counted",
        )  # fmt: skip
    return table.rows


def as_tsv(found: list[ScanStatus]) -> str:
    """One table of all runs, with `COLUMNS`."""
    lines = [COLUMNS, *(status.cells() for status in found)]
    return "".join("\t".join(clean_cell(cell) for cell in line) + "\n" for line in lines)

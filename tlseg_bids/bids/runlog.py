"""What a run was going to do and what became of it: the folder ``logs/`` of the output.

Every run has an id and writes only files with this id, so that runs (shards) side by side do not
touch each other's.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import secrets
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from tlseg_bids import __version__
from tlseg_bids.bids.atomic import clean_cell, write_json, write_text, writing_failed
from tlseg_bids.bids.scan import Scan
from tlseg_bids.config import Config, without_home

PLAN_COLUMNS = (
    "scan", "status", "model", "version", "reason", "refused", "warnings", "device",
    "memory_gib", "key",
)  # fmt: skip
STATUS_COLUMNS = (
    "time", "scan", "status", "model", "seconds", "peak_memory_gib", "error", "hint", "files",
)  # fmt: skip


ID_TIME = "%Y%m%dT%H%M%S"


class PlanLike(Protocol):
    """What is needed of `tlseg_bids.flow.Plan` (which this layer does not import)."""

    jobs: tuple[Any, ...]
    skips: tuple[Any, ...]


class OutcomeLike(Protocol):
    """What is needed of `tlseg_bids.flow.Outcome`."""

    scan: Scan
    status: str
    files: tuple[Path, ...]
    seconds: dict[str, float]
    peak_memory_gib: float
    error: str
    hint: str


def new_run_id(folder: Path) -> str:
    """``20250131T120000Z-1a2b3c``: sorts after the ids of the runs before, and is unique.

    It is the time, unless a run in `folder` has a later one because a clock was wrong: then it is
    a second after that.
    """
    now = datetime.datetime.now(datetime.UTC)
    times = [path.stem.removeprefix("config_").split("-")[0] for path in folder.glob("config_*")]
    with contextlib.suppress(ValueError):
        last = datetime.datetime.strptime(max(times, default=""), f"{ID_TIME}%z")
        now = max(now, last + datetime.timedelta(seconds=1)) if last > now else now
    return f"{now:{ID_TIME}}Z-{secrets.token_hex(3)}"


def plan_rows(plan: PlanLike) -> list[dict[str, Any]]:
    """A row per scan with `PLAN_COLUMNS`, for the log and for ``--dry-run``.

    `status` is ``planned`` or ``skipped``; a skipped scan has its reason and hint in `reason`.
    """
    rows = []
    for job in plan.jobs:
        rows.append({
            "scan": scan_name(job.scan), "status": "planned", "model": job.card.name,
            "version": job.card.version, "reason": job.reason,
            "refused": "; ".join(f"{no.model}: {no.reason}" for no in job.refused),
            "warnings": "; ".join(job.warnings), "device": job.device,
            "memory_gib": round(float(job.memory_gib), 2), "key": job.key,
        })  # fmt: skip
    for skip in plan.skips:
        row: dict[str, Any] = dict.fromkeys(PLAN_COLUMNS)
        reason = " – ".join(part for part in (skip.reason, skip.hint) if part)
        rows.append({**row, "scan": scan_name(skip.scan), "status": "skipped", "reason": reason})
    return rows


class RunLog:
    """The log files of one run.

    Parameters
    ----------
    out_dir : Path
        Output folder; files go to its ``logs``.
    run_id : str or None
        Taken from `new_run_id` if None.
    """

    def __init__(self, out_dir: Path, run_id: str | None = None) -> None:
        self.folder = out_dir / "logs"
        self.run_id = run_id or new_run_id(self.folder)
        self.status_file = self.folder / f"status_{self.run_id}.tsv"
        self._one_at_a_time = threading.Lock()

    def write_plan(self, plan: PlanLike) -> tuple[Path, Path]:
        """Write ``plan_<id>.tsv`` and ``.json``; before a voxel is read.

        Raises
        ------
        CannotCreateError, OutputError
            If a file cannot be made or written (so for every method that writes).
        """
        rows = plan_rows(plan)
        lines = [PLAN_COLUMNS, *([row[name] for name in PLAN_COLUMNS] for row in rows)]
        table = write_text(self.folder / f"plan_{self.run_id}.tsv", _tsv(lines))
        jobs = [
            {
                "Scan": scan_name(job.scan), "Model": job.card.name, "Version": job.card.version,
                "Reason": job.reason, "Beside": [scan_name(other) for other in job.companions],
                "Refused": [{"Model": no.model, "Reason": no.reason} for no in job.refused],
                "Warnings": job.warnings, "Device": job.device, "MemoryGib": job.memory_gib,
                "AgeDays": job.scan.age.days, "PostMenstrualWeeks": job.scan.age.pma_weeks,
                "AgeSource": job.scan.age.source, "ContrastAgent": job.scan.contrast_agent,
                "SkullStripped": job.scan.skull_stripped, "ContentKey": job.key,
            }
            for job in plan.jobs
        ]  # fmt: skip
        skips = [
            {"Scan": scan_name(skip.scan), "Reason": skip.reason, "Hint": skip.hint}
            for skip in plan.skips
        ]
        content = {"Run": self.run_id, "Version": __version__, "Jobs": jobs, "Skipped": skips}
        return table, write_json(self.folder / f"plan_{self.run_id}.json", content)

    def write_config(self, config: Config) -> Path:
        """Write the run's `Config` as ``config_<id>.toml``, to run it again."""
        head = f"# tlseg {__version__}, run {self.run_id}\n"
        return write_text(self.folder / f"config_{self.run_id}.toml", head + config.to_toml())

    def record(self, outcome: OutcomeLike, model: str = "") -> None:
        """Append a scan to ``status_<id>.tsv``; may be called from several threads.

        A line is written at once and whole, so a run that is killed leaves a table that can be
        read.
        """
        total = sum(outcome.seconds.values())
        row = (
            datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            scan_name(outcome.scan), outcome.status, model, f"{total:.1f}",
            f"{outcome.peak_memory_gib:.2f}", outcome.error, outcome.hint,
            " ".join(path.name for path in outcome.files),
        )  # fmt: skip
        with self._one_at_a_time:
            lines = [row] if self.status_file.exists() else [STATUS_COLUMNS, row]
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with self.status_file.open("ab", buffering=0) as stream:
                    stream.write(_tsv(lines).encode("utf-8", errors="replace"))
            except OSError as error:
                raise writing_failed(error, self.status_file) from error

    def crash(self, scan: Scan, error: BaseException) -> Path:
        """Write the traceback of a failed scan to ``crash_<id>_<scan>.txt``."""
        mark = "".join(c if c.isalnum() or c in "-_+" else "_" for c in scan.stem)[:150]
        text = (
            f"scan: {clean_cell(scan_name(scan))}\nversion: {__version__}\nrun: {self.run_id}\n"
            f"process: {os.getpid()}\npython: {platform.python_version()} on "
            f"{platform.platform()}\n\n" + "".join(traceback.format_exception(error))
        )
        path = self.folder / f"crash_{self.run_id}_{mark}_{scan.suffix}.txt"
        return write_text(path, without_home(text))

    def write_citation(self, text: str) -> Path:
        """Write ``CITATION.md``: the methods section and whom to cite."""
        return write_text(self.folder / "CITATION.md", text)


def scan_name(scan: Scan) -> str:
    """Path of the scan below its dataset, as the tables of the log have it."""
    return scan.path.relative_to(scan.bids_dir).as_posix()


def _tsv(lines: Iterable[Iterable[Any]]) -> str:
    return "".join("\t".join(clean_cell(cell) for cell in line) + "\n" for line in lines)

"""The pages of a run's subjects, each written as soon as nothing more is to come for it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path

from tlseg_bids.bids.runlog import scan_name
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import NoInputError
from tlseg_bids.flow import Outcome
from tlseg_bids.report.derivatives import FailedScan, failures_and_gone
from tlseg_bids.report.subject import write_subject_report

LOG = logging.getLogger(__name__)
LABELS = "_dseg.nii.gz"


class Pages:
    """Hears of every scan that has ended, and writes the page of a subject after its last one.

    A subject whose scans were all reused keeps the page that it has, unless that tells of a failure
    that is over.

    Parameters
    ----------
    out_dir : Path
        Root of the derivative dataset; its ``logs/`` are read once.
    command : str
        The command line, for the pages.
    scans : iterable of Scan
        Every scan of the run.
    """

    def __init__(self, out_dir: Path, command: str, scans: Iterable[Scan]) -> None:
        self.out_dir, self.command = out_dir, command
        self._left = Counter(scan.subject for scan in scans)
        self._failed, gone = failures_and_gone(out_dir)
        self._changed = {_subject(scan) for scan in gone if self._tells_of(scan)}

    def ended(self, outcome: Outcome) -> None:
        """Take in what became of a scan; raises as `write_subject_report` where a page is due."""
        subject, scan = outcome.scan.subject, scan_name(outcome.scan)
        over, page = False, self.out_dir / f"sub-{subject}.html"
        if outcome.status == "failed":
            name = outcome.scan.path.name
            self._failed[scan] = FailedScan(name, outcome.error, outcome.hint)
        else:
            over = self._failed.pop(scan, None) is not None
        if over or outcome.status != "reused" or not page.is_file():
            self._changed.add(subject)
        self._left[subject] -= 1
        if self._left[subject] == 0 and subject in self._changed:
            self.write(subject)

    def _tells_of(self, scan: str) -> bool:
        """Whether the page of its subject names a scan."""
        page = self.out_dir / f"sub-{_subject(scan)}.html"
        try:
            return escape(scan.rpartition("/")[2]) in page.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False

    def write(self, subject: str) -> None:
        """Write the page of a subject from what is on disk."""
        path = write_subject_report(
            self.out_dir, subject, self.command, recorded=dict(sorted(self._failed.items()))
        )
        LOG.info("report: %s", path)


def check_reportable(out_dir: Path, subjects: Iterable[str]) -> None:
    """Refuse to write reports where no scan of the subjects was labelled, and none has failed.

    Raises
    ------
    NoInputError
        Naming the folder.
    """
    wanted, (failed, _) = set(subjects), failures_and_gone(out_dir)
    if wanted & {_subject(scan) for scan in failed}:
        return
    if not any(next((out_dir / f"sub-{s}").rglob(f"*{LABELS}"), None) for s in wanted):
        raise NoInputError(
            "no scan of the selected participants is labelled there, so there is nothing to report",
            out_dir, "leave out --reports-only to label them, or correct the path",
        )  # fmt: skip


def _subject(scan: str) -> str:
    return scan.partition("/")[0].removeprefix("sub-")

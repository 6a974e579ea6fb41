"""When the page of a subject is written, and what it is told of failures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import make_dataset
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.flow import Outcome
from tlseg_bids.report import pages
from tlseg_bids.report.pages import Pages


def scan(root: Path, subject: str, suffix: str = "T1w") -> Scan:
    path = root / "raw" / f"sub-{subject}" / "anat" / f"sub-{subject}_{suffix}.nii.gz"
    return Scan(path, root / "raw", {"sub": subject}, suffix)


@pytest.fixture
def written(monkeypatch) -> list[tuple[str, list[str]]]:
    """Subjects whose page was written, each with the sentences about failed scans."""
    calls: list[tuple[str, list[str]]] = []

    def write(out_dir: Path, subject: str, _command: str, *, recorded: dict) -> Path:
        said = [failure.error for name, failure in recorded.items() if f"sub-{subject}/" in name]
        calls.append((subject, said))
        return out_dir / f"sub-{subject}.html"

    monkeypatch.setattr(pages, "write_subject_report", write)
    return calls


def test_a_page_is_written_when_the_last_scan_of_its_subject_has_ended(tmp_path, written):
    one, other = scan(tmp_path, "01"), scan(tmp_path, "01", "T2w")
    second = scan(tmp_path, "02")
    told = Pages(tmp_path / "out", "tlseg", [one, other, second])
    told.ended(Outcome(one, "done"))
    assert written == []
    told.ended(Outcome(second, "failed", error="it is torn"))
    assert written == [("02", ["it is torn"])]
    told.ended(Outcome(other, "skipped", error="not wanted"))
    assert written[1:] == [("01", [])]


def test_a_page_stays_as_it_is_where_every_scan_is_reused(tmp_path, written):
    one, other = scan(tmp_path, "01"), scan(tmp_path, "02")
    (tmp_path / "sub-01.html").touch()
    told = Pages(tmp_path, "tlseg", [one, other])
    for each in (one, other):
        told.ended(Outcome(each, "reused"))
    assert written == [("02", [])]


def test_an_earlier_failure_is_told_until_the_scan_is_labelled(tmp_path, written):
    one, other = scan(tmp_path, "01"), scan(tmp_path, "01", "T2w")
    log = RunLog(tmp_path)
    for each in (one, other):
        log.record(Outcome(each, "failed", error=f"{each.suffix} was cut"))
    told = Pages(tmp_path, "tlseg", [one])
    told.ended(Outcome(one, "done"))
    assert written == [("01", ["T2w was cut"])]


def test_a_failure_that_is_over_leaves_the_page_though_the_scan_is_reused(tmp_path, written):
    """Labelled, its content dropped and so failed, fetched again and so reused."""
    one = scan(tmp_path, "01")
    (tmp_path / "sub-01.html").touch()
    RunLog(tmp_path).record(Outcome(one, "failed", error="the content is not here"))
    Pages(tmp_path, "tlseg", [one]).ended(Outcome(one, "reused"))
    assert written == [("01", [])]


def test_a_failure_whose_scan_was_removed_leaves_the_page(tmp_path, written):
    out, raw = tmp_path / "out", make_dataset(tmp_path / "raw", ["sub-01/anat/sub-01_T1w.nii.gz"])
    one, gone = scan(tmp_path, "01"), scan(tmp_path, "01", "T2w")
    Derivatives(out, raw).write_root([], {})
    RunLog(out).record(Outcome(gone, "failed", error="it was cut"))
    for page, expected in (("sub-01_T2w.nii.gz: it was cut", [("01", [])]), ("all is well", [])):
        (out / "sub-01.html").write_text(page)
        Pages(out, "tlseg", [one]).ended(Outcome(one, "reused"))
        assert written == expected
        written.clear()

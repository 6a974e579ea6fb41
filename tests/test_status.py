"""`tlseg-status`: what shards and runs said of every scan, put together."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import config, made_up_job, make_dataset
from tlseg_bids.bids.discover import discover
from tlseg_bids.bids.runlog import RunLog
from tlseg_bids.bids.source import is_gone
from tlseg_bids.bids.status import read_status
from tlseg_bids.bids.write import Derivatives
from tlseg_bids.cli import status
from tlseg_bids.errors import DataError, NoInputError
from tlseg_bids.flow import Outcome, Plan, Skip
from tlseg_bids.report.derivatives import all_failures


@pytest.fixture
def jobs(tmp_path):
    """Four jobs."""
    raw = make_dataset(
        tmp_path / "raw", [f"sub-0{n}/anat/sub-0{n}_T1w.nii.gz" for n in range(1, 5)]
    )
    return [made_up_job(scan) for scan in discover(config(raw))[0]]


def run(out, number: int, jobs, *outcomes: str, **changes) -> None:
    """A run that planned `jobs` and said what became of the first of them."""
    log = RunLog(out, f"20250101T0000{number:02}Z-abcdef")
    log.write_plan(Plan(tuple(jobs)))
    for job, outcome in zip(jobs, outcomes, strict=False):
        log.record(Outcome(job.scan, outcome, **changes), "small")


def test_shards_are_put_together(tmp_path, jobs, capsys):
    run(tmp_path, 1, jobs[:2], "done", "done")
    run(tmp_path, 2, jobs[2:], "done", "failed", error="it is upside down", hint="turn it")
    found = read_status(tmp_path)
    assert [scan.status for scan in found] == ["done", "done", "done", "failed"]
    assert status.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out == (
        "sub-04/anat/sub-04_T1w.nii.gz: failed in run 20250101T000002Z-abcdef – "
        "it is upside down – turn it\n4 scans: 3 done, 1 failed\n"
    )


def test_a_killed_run_leaves_unfinished_scans_until_another_run_ends_them(tmp_path, jobs, capsys):
    run(tmp_path, 1, jobs, "done", "done")
    assert [s.status for s in read_status(tmp_path)] == ["done", "done", *["unfinished"] * 2]
    assert status.main([str(tmp_path)]) == 1
    run(tmp_path, 2, jobs)  # the same again, killed before it looked at anything
    assert [s.status for s in read_status(tmp_path)] == ["done", "done", *["unfinished"] * 2]
    run(tmp_path, 3, jobs, "reused", "reused", "done", "done")
    found = read_status(tmp_path)
    assert [scan.times_done for scan in found] == [1, 1, 1, 1]
    capsys.readouterr()
    assert status.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "4 scans: 2 done, 2 reused\n"


def test_a_finished_scan_whose_content_changed_is_unfinished_again(tmp_path, jobs):
    run(tmp_path, 1, jobs[:1], "done")
    run(tmp_path, 2, [replace(jobs[0], key="another")])
    assert [scan.status for scan in read_status(tmp_path)] == ["unfinished"]


def test_a_scan_done_twice_is_seen(tmp_path, jobs):
    run(tmp_path, 1, jobs[:1], "done")
    run(tmp_path, 2, jobs[:1], "done")
    assert read_status(tmp_path)[0].times_done == 2


def test_one_table_of_all_runs(tmp_path, jobs, capsys):
    run(tmp_path, 1, jobs[:1], "done", seconds={"read": 2.0})
    assert status.main(["--tsv", str(tmp_path)]) == 0
    head, row = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    cells = dict(zip(head, row, strict=True))
    assert cells["scan"] == "sub-01/anat/sub-01_T1w.nii.gz"
    assert cells["run"] == "20250101T000001Z-abcdef"
    assert (cells["model"], cells["seconds"], cells["times_done"]) == ("small", "2.0", "1")


def test_an_output_without_runs_is_a_sentence(tmp_path, capsys):
    with pytest.raises(NoInputError, match=r"no run has left a plan – .*logs – name the OUT_DIR"):
        read_status(tmp_path)
    assert status.main([str(tmp_path)]) == 66
    assert capsys.readouterr().err.startswith("tlseg-status: no run has left a plan")


def test_a_damaged_table_is_a_sentence(tmp_path, jobs):
    run(tmp_path, 1, jobs, "done")
    file = next((tmp_path / "logs").glob("status_*.tsv"))
    file.write_text("a\tb\n1\t2\n")
    with pytest.raises(
        DataError, match=r"the table has no column scan – .*status_.* – remove this"
    ):
        read_status(tmp_path)


# Scans that are no longer in the dataset ----------------------------------------------------------


@pytest.fixture
def failed(tmp_path, jobs):
    """An output folder in which scans 2 and 3 failed and scan 4 was not ended."""
    out = tmp_path / "out"
    Derivatives(out, tmp_path / "raw").write_root([], {})
    run(out, 1, jobs, "done", "failed", "failed", error="it is torn", hint="rename it")
    return out


def statuses(out) -> list[str]:
    return [scan.status for scan in read_status(out)]


def test_a_failed_scan_that_was_renamed_or_removed_no_longer_counts(jobs, failed, capsys):
    assert statuses(failed) == ["done", "failed", "failed", "unfinished"]
    jobs[0].scan.path.unlink()  # its labels are there
    path = jobs[1].scan.path
    path.rename(path.with_name("sub-02_run-1_T1w.nii.gz"))
    shutil.rmtree(jobs[3].scan.path.parents[1])
    assert statuses(failed) == ["done", "removed", "failed", "removed"]
    assert status.main([str(failed)]) == 1
    jobs[2].scan.path.unlink()
    capsys.readouterr()
    assert status.main([str(failed)]) == 0
    assert capsys.readouterr().out == "4 scans: 1 done, 3 removed\n"


def test_a_failed_scan_whose_content_is_not_here_is_there(jobs, failed):
    jobs[1].scan.path.unlink()
    jobs[1].scan.path.symlink_to("../../.git/annex/objects/gone.nii.gz")
    assert statuses(failed)[1] == "failed"


@pytest.mark.parametrize("how", ["moved", "another", "unmounted"])
def test_failures_count_where_the_dataset_is_not_found(tmp_path, failed, how):
    raw = tmp_path / "raw"
    if how == "moved":
        raw.rename(tmp_path / "moved")
    else:
        shutil.rmtree(raw)
        raw.mkdir()
    if how == "another":
        (raw / "dataset_description.json").write_text('{"Name": "of somebody else"}')
    assert statuses(failed) == ["done", "failed", "failed", "unfinished"]


def test_a_failed_scan_with_an_odd_name_is_known_by_what_the_logs_hold(tmp_path):
    raw = make_dataset(tmp_path / "raw")
    odd = [os.fsdecode(b"sub-01_acq-\xff_T1w.nii.gz"), "sub-01_acq-tab\there_T1w.nii.gz"]
    for name in odd:
        (raw / "sub-01" / "anat" / name).touch()
    plain = discover(config(raw, participants=("01",)))
    Derivatives(tmp_path / "out", raw).write_root([], {})
    log = RunLog(tmp_path / "out", "20250101T000001Z-abcdef")
    log.write_plan(Plan((), tuple(Skip(found.scan, found.reason, "") for found in plain[1])))
    for found in plain[1]:
        log.record(Outcome(found.scan, "failed", error=found.reason))
    assert len(plain[1]) == 2
    assert set(statuses(tmp_path / "out")) == {"failed"}
    assert len(all_failures(tmp_path / "out")) >= 2
    for name in odd:
        (raw / "sub-01" / "anat" / name).unlink()
    assert set(statuses(tmp_path / "out")) == {"removed"}
    assert all_failures(tmp_path / "out") == {}


@pytest.mark.parametrize("folder", ["sub-01", "sub-01/anat"])
def test_a_folder_without_permission_fails_until_it_can_be_read(tmp_path, monkeypatch, folder):
    raw = make_dataset(tmp_path / "raw")
    assert is_gone(raw, folder)
    monkeypatch.setattr(os, "access", lambda path, _mode: Path(path) != raw / folder)
    assert not is_gone(raw, folder)
    shutil.rmtree(raw / "sub-01")
    assert is_gone(raw, folder)


def test_what_cannot_be_reached_is_there(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", refuses)
    assert not is_gone(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")

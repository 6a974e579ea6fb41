"""Two runs that write the same files, on every file system, whatever their clocks say."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

from tlseg_bids.bids.atomic import atomic, try_lock, write_text
from tlseg_bids.bids.runlog import RunLog, new_run_id
from tlseg_bids.errors import OutputError
from tlseg_bids.report.derivatives import all_failures

STATUS = "time\tscan\tstatus\terror\thint\n{time}\tsub-01/x\t{status}\tbad\tmend\n"


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "page.html"
    with atomic(path) as first:
        first.write(b"first")
        with atomic(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_removed(tmp_path):
    path = tmp_path / "page.html"
    with atomic(path) as stream:
        (left,) = tmp_path.glob("*.part")
        stream.write(b"x")
    left.write_bytes(b"half")
    write_text(path, "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def refusing(code: int):
    """A `flock` that the file system does not have, or that fails."""

    def flock(_handle: int, _kind: int) -> None:
        raise OSError(code, "no")

    return flock


def test_without_locks_nothing_of_another_run_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOLCK))
    path = tmp_path / "page.html"
    with atomic(path) as first:
        first.write(b"first")
        write_text(path, "second")
    assert path.read_bytes() == b"first"
    with path.open("rb") as stream:
        assert try_lock(stream.fileno()) is None


def test_a_disk_that_fails_to_lock_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OutputError, match=r"writing failed \(no\) – .*page.html"):
        write_text(tmp_path / "page.html", "x")


def test_a_run_after_one_from_the_future_still_comes_after_it(tmp_path):
    (tmp_path / "config_20991231T235959Z-abcdef.toml").touch()
    (tmp_path / "config_of_somebody.toml").touch()
    assert new_run_id(tmp_path).startswith("2")
    (tmp_path / "config_of_somebody.toml").unlink()
    first = new_run_id(tmp_path)
    assert first.startswith("21000101T000000Z-")
    (tmp_path / f"config_{first}.toml").touch()
    assert new_run_id(tmp_path) > first


def test_the_latest_run_is_believed_and_not_the_latest_clock(tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "status_20250101T000000Z-a.tsv").write_text(
        STATUS.format(time="2030-01-01T00:00:00+00:00", status="failed")
    )
    assert list(all_failures(tmp_path)) == ["sub-01/x"]
    (logs / "status_20250102T000000Z-b.tsv").write_text(
        STATUS.format(time="2020-01-01T00:00:00+00:00", status="done")
    )
    assert all_failures(tmp_path) == {}


def test_a_runs_own_id_is_kept():
    assert RunLog(Path("out"), "20250101T000000Z-a").run_id == "20250101T000000Z-a"

"""Locks between processes: one holder, and none that outlives its process."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tlseg_bids.bids.lock import hold
from tlseg_bids.errors import CannotCreateError, LockedError

ROOT = Path(__file__).resolve().parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from tlseg_bids.bids.lock import hold
with hold(Path(sys.argv[1]), "the scan is being processed"):
    print("held", flush=True)
    sys.stdin.read()
"""
TURNS = """
import sys
from pathlib import Path
from tlseg_bids.bids.lock import hold
lock, count = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(100):
    with hold(lock, "x", wait_s=120):
        count.write_text(str(int(count.read_text()) + 1))
"""


def start(code: str, *arguments: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        (sys.executable, "-c", code, *arguments), cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_another_process_is_refused_and_told_who_holds_it(tmp_path):
    path = tmp_path / "locks" / "scan.lock"
    other = start(HOLDER, path)
    assert other.stdout.readline() == "held\n"
    with (
        pytest.raises(LockedError, match=rf"by another run \(process {other.pid} on .*\) – .* – w"),
        hold(path, "the scan is being processed"),
    ):
        pass
    other.communicate()
    with hold(path, "the scan is being processed"):
        assert path.exists()
    assert not path.exists()


def test_the_lock_of_a_killed_process_does_not_stand_in_the_way(tmp_path):
    path = tmp_path / "scan.lock"
    other = start(HOLDER, path)
    assert other.stdout.readline() == "held\n"
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert path.exists(), "a killed process cannot tidy up"
    with hold(path, "the scan is being processed"):
        pass
    assert not path.exists()


def test_a_lock_file_of_a_machine_that_died_is_taken_over(tmp_path):
    path = tmp_path / "scan.lock"
    path.write_text("process 4711 on node-that-burnt")
    with hold(path, "the scan is being processed"):
        assert b"4711" not in path.read_bytes()


def test_many_processes_never_hold_it_together(tmp_path):
    count, lock = tmp_path / "count", tmp_path / "x.lock"
    count.write_text("0")
    others = [start(TURNS, lock, count) for _ in range(4)]
    assert [other.wait() for other in others] == [0] * 4
    assert count.read_text() == "400"


def test_a_lock_file_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CannotCreateError, match=r"the lock file cannot be made .* – check the perm"),
        hold(tmp_path / "file" / "x.lock", "x"),
    ):
        pass

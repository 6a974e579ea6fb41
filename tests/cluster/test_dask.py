"""A real Dask scheduler with two workers, one of which is killed, does what one run does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.compare import differences
from tests.cluster.conftest import LIMIT_S, SCANS, THREADS, environment
from tlseg_bids.bids.status import read_status

pytest.importorskip("distributed", reason="Dask is not installed (extra 'dask')")
pytestmark = [pytest.mark.dask, pytest.mark.slow]


@pytest.fixture
def cluster(tmp_path: Path, ends) -> tuple[Path, list[subprocess.Popen]]:
    """The scheduler file and the two workers."""
    file = tmp_path / "scheduler.json"
    dask, quiet = [sys.executable, "-m", "dask"], ["--no-dashboard"]
    common = {"env": environment(), "cwd": tmp_path, "stderr": subprocess.DEVNULL}
    ends.append(
        subprocess.Popen(
            [*dask, "scheduler", "--scheduler-file", file, "--port", "0", "--host", "127.0.0.1",
             *quiet], **common,
        )
    )  # fmt: skip
    workers = [
        subprocess.Popen(
            [*dask, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny",
             "--memory-limit", "0", *quiet], **common,
        )
        for _ in range(2)
    ]  # fmt: skip
    ends += workers
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, "the scheduler does not start"
        time.sleep(0.05)
    return file, workers


def test_a_killed_worker_loses_nothing(study, plain, cluster, ends):
    file, workers = cluster
    out = study.bids.parent / "dask"
    run = subprocess.Popen(
        study.command(out, "--nprocs", THREADS, "--executor", "dask", "--dask", file),
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ends.append(run)
    deadline = time.monotonic() + LIMIT_S
    locks = out / "logs" / "locks"
    mine = f"process {workers[0].pid} on "

    def text(lock: Path) -> str:
        """Who holds a lock; it may be gone by now."""
        try:
            return lock.read_text()
        except FileNotFoundError:
            return ""

    def held() -> bool:
        """Whether the first worker holds a scan after the first one is done."""
        status = list((out / "logs").glob("status_*.tsv"))
        begun = status and len(status[0].read_text().splitlines()) > 1
        return bool(begun) and any(mine in text(lock) for lock in locks.glob("sub-*.lock"))

    while not held():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.5)
    workers[0].kill()
    _, said = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, said
    found = read_status(out)
    assert len(found) == SCANS
    assert {scan.status for scan in found} <= {"done", "reused"}, said
    assert all(scan.times_done <= 1 for scan in found)
    assert sum(scan.times_done for scan in found) >= SCANS - 1
    assert len(re.findall(rf"^\[\d+/{SCANS}\]", said, re.MULTILINE)) == SCANS
    assert differences(plain, out) == []

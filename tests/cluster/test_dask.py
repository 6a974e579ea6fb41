"""A real Dask scheduler with two workers, one of which is killed, does what one run does."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.compare import differences
from tests.cluster.conftest import ROOT, SCANS, THREADS, environment
from tlseg_bids.bids.status import read_status

pytest.importorskip("distributed", reason="Dask is not installed (extra 'dask')")
pytestmark = [pytest.mark.dask, pytest.mark.data, pytest.mark.slow]
LIMIT_S = 7200


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen]]]:
    """The scheduler file and the two workers."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet = ["--no-dashboard"]
    common = {"env": environment(), "cwd": tmp_path}
    scheduler = subprocess.Popen(
        [*dask, "scheduler", "--scheduler-file", file, "--port", "0", "--host", "127.0.0.1",
         *quiet], **common,
    )  # fmt: skip
    workers = [
        subprocess.Popen(
            [*dask, "worker", "--scheduler-file", file, "--nthreads", "1", "--no-nanny",
             "--memory-limit", "0", *quiet], **common,
        )
        for _ in range(2)
    ]  # fmt: skip
    yield file, workers
    for process in (*workers, scheduler):
        process.kill()
        process.wait()


def test_a_killed_worker_loses_nothing(dataset, options, plain, cluster):
    file, workers = cluster
    out = dataset.parent / "dask"
    run = subprocess.Popen(
        [sys.executable, ROOT / "bids_app_entry.py", dataset, out, "participant",
         "--nprocs", THREADS, *options, "--executor", "dask", "--dask", file],
        env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + LIMIT_S
    locks = out / "logs" / "locks"
    mine = f"process {workers[0].pid} on "

    def held() -> bool:
        """Whether the first worker holds a scan, of the second round or later."""
        status = list((out / "logs").glob("status_*.tsv"))
        begun = status and len(status[0].read_text().splitlines()) > 2
        return bool(begun) and any(mine in lock.read_text() for lock in locks.glob("sub-*.lock"))

    while not held():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    time.sleep(1)
    workers[0].kill()
    _, said = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, said
    found = read_status(out)
    assert len(found) == SCANS
    assert {scan.status for scan in found} <= {"done", "reused"}, said
    assert all(scan.times_done <= 1 for scan in found)
    assert sum(scan.times_done for scan in found) >= SCANS - 1
    assert len(re.findall(r"^\[\d+/12\]", said, re.MULTILINE)) == SCANS
    assert differences(plain, out) == []

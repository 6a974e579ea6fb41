"""A real Slurm (tests/cluster/slurm.sh): an array of shards does what one run does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.compare import differences
from tests.cluster.conftest import ROOT, SCANS, THREADS, environment
from tlseg_bids.bids.status import read_status

HERE = Path(__file__).parent
SHARDS = 4
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
LIMIT_S = 7200
pytestmark = [pytest.mark.slurm, pytest.mark.data, pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster with two nodes."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in DAEMONS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing)")
    folder = tmp_path_factory.mktemp("slurm")
    started = subprocess.run((HERE / "slurm.sh", "start", folder), capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"Slurm does not start here: {started.stderr.strip()}")
    name, _, conf = started.stdout.strip().partition("=")
    yield {**environment(), "PATH": path, name: conf}
    subprocess.run((HERE / "slurm.sh", "stop", folder), check=False)


def answer(slurm: dict[str, str], *words: object) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run([str(w) for w in words], env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def until(what: str, true) -> None:
    """Wait until `true()` says something."""
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.5)


def states(slurm: dict[str, str], job: str) -> dict[str, str]:
    """State of every task of an array, by its number."""
    lines = answer(slurm, "squeue", "--all", "--array", "--noheader", "--states=all",
                   "--format=%K %T", "--jobs", job).splitlines()  # fmt: skip
    return dict(line.split() for line in lines)


def test_an_array_of_shards_makes_the_files_of_one_run(dataset, options, plain, slurm, tmp_path):
    out, logs = dataset.parent / "array", tmp_path
    program = tmp_path / "tlseg"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "bids_app_entry.py"} "$@"\n')
    program.chmod(0o755)
    job = answer(
        {**slurm, "TLSEG": str(program)},
        "sbatch", "--parsable", f"--array=1-{SHARDS}", f"--cpus-per-task={THREADS}",
        f"--output={logs}/%a.log", ROOT / "singularity" / "tlseg.sbatch",
        dataset, out, *options,
    )  # fmt: skip

    def rows() -> int:
        """Scans that shard 2 has recorded."""
        count = 0
        for config in (out / "logs").glob("config_*.toml"):
            status = config.with_name(config.name.replace("config_", "status_")).with_suffix(".tsv")
            if f'shard = "2/{SHARDS}"' in config.read_text() and status.exists():
                count += len(status.read_text().splitlines()) - 1
        return count

    until("the first scan of shard 2", lambda: rows() == 1)
    until("a lock of its second scan", lambda: any((out / "logs" / "locks").glob("sub-*.lock")))
    time.sleep(2)
    answer(slurm, "scancel", "--signal=KILL", "--full", f"{job}_2")
    until("the death of task 2", lambda: states(slurm, job)["2"] not in ("RUNNING", "COMPLETING"))
    killed = states(slurm, job)["2"]
    unfinished = [scan.scan for scan in read_status(out) if scan.status == "unfinished"]
    answer(slurm, "scontrol", "requeue", f"{job}_2")
    until("the end", lambda: set(states(slurm, job).values()) <= {"COMPLETED", "FAILED"})

    texts = {path.name: path.read_text() for path in sorted(logs.glob("*.log"))}
    assert killed in ("FAILED", "CANCELLED"), texts
    assert len(unfinished) >= 2, "the killed task had scans left"
    assert set(states(slurm, job).values()) == {"COMPLETED"}, texts
    found = read_status(out)
    assert len(found) == SCANS
    assert {scan.status for scan in found} <= {"done", "reused"}
    assert {scan.scan: scan.times_done for scan in found if scan.times_done != 1} == {}
    assert differences(plain, out) == []
    assert not list((out / "logs" / "locks").glob("*.lock")), "a lock was left behind"
    sidecars = [json.loads(p.read_text()) for p in out.rglob("*_seg-*_dseg.json")
                if "_desc-" not in p.name]  # fmt: skip
    assert len([s for s in sidecars if "ContentKey" in s]) == SCANS

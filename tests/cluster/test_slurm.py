"""A real Slurm (tests/cluster/slurm.sh): an array of shards does what one run does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w

from tests.cluster.compare import differences
from tests.cluster.conftest import LIMIT_S, LONG, ROOT, SCANS, THREADS, environment
from tests.heads import tiny_recipe, write_heads
from tlseg_bids.bids.status import read_status
from tlseg_bids.train.recipe import load_checkpoint

SCRIPT = Path(__file__).parent / "slurm.sh"
SHARDS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "unshare")
pytestmark = [pytest.mark.slurm, pytest.mark.slow]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a cluster with two nodes."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)} missing)")
    folder = tmp_path_factory.mktemp("slurm")
    cluster = subprocess.Popen(
        (SCRIPT, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    name, _, conf = cluster.stdout.readline().strip().partition("=")
    if name != "SLURM_CONF":
        pytest.skip(f"Slurm does not start here: {cluster.communicate()[1].strip()}")
    yield {**environment(), "PATH": path, name: conf}
    cluster.kill()
    cluster.communicate()


def answer(slurm: dict[str, str], *words: object) -> str:
    """What a command of Slurm prints."""
    done = subprocess.run([str(w) for w in words], env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def until(what: str, true, every_s: float = 0.5) -> None:
    """Wait until `true()` says something."""
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(every_s)


def states(slurm: dict[str, str], job: str) -> dict[str, str]:
    """State of every task of an array, by its number."""
    lines = answer(slurm, "squeue", "--all", "--array", "--noheader", "--states=all",
                   "--format=%K %T", "--jobs", job).splitlines()  # fmt: skip
    return dict(line.split() for line in lines)


def test_an_array_of_shards_makes_the_files_of_one_run(study, plain, slurm, tmp_path):
    out, logs = study.bids.parent / "array", tmp_path
    locks = out / "logs" / "locks"
    program = tmp_path / "tlseg"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "bids_app_entry.py"} "$@"\n')
    program.chmod(0o755)
    job = answer(
        {**slurm, "TLSEG": str(program)},
        "sbatch", "--parsable", f"--array=1-{SHARDS}", f"--cpus-per-task={THREADS}", "--mem=1G",
        f"--output={logs}/%a.log", ROOT / "singularity" / "tlseg.sbatch",
        study.bids, out, *study.options,
    )  # fmt: skip

    def rows() -> list[str]:
        """The status lines of shard 2."""
        for config in (out / "logs").glob("config_*.toml"):
            status = config.with_name(config.name.replace("config_", "status_")).with_suffix(".tsv")
            if f'shard = "2/{SHARDS}"' in config.read_text() and status.exists():
                return status.read_text().splitlines()[1:]
        return []

    second = sorted(path.name for path in study.bids.glob("sub-*"))[1 + SHARDS]
    until("the second scan of shard 2", lambda: list(locks.glob(f"{second}*.lock")), every_s=0.02)
    answer(slurm, "scancel", "--signal=KILL", "--full", f"{job}_2")
    until("the death of task 2", lambda: states(slurm, job)["2"] not in ("RUNNING", "COMPLETING"))
    killed, ended = states(slurm, job)["2"], rows()
    answer(slurm, "scontrol", "requeue", f"{job}_2")
    until("the end", lambda: set(states(slurm, job).values()) <= {"COMPLETED", "FAILED"})

    texts = {path.name: path.read_text() for path in sorted(logs.glob("*.log"))}
    assert killed in ("FAILED", "CANCELLED"), texts
    assert len(ended) == 1, "the task was killed while it labelled its second scan"
    assert set(states(slurm, job).values()) == {"COMPLETED"}, texts
    found = read_status(out)
    assert len(found) == SCANS
    assert {scan.status for scan in found} <= {"done", "reused"}
    assert {scan.scan: scan.times_done for scan in found if scan.times_done > 1} == {}
    untold = [scan for scan in found if scan.times_done == 0]  # killed before it could say so
    assert len(untold) <= 1 and all(scan.status == "reused" for scan in untold)
    assert differences(plain, out) == []
    assert not list(locks.glob("*.lock")), "a lock was left behind"
    sidecars = [json.loads(p.read_text()) for p in out.rglob("*_seg-*_dseg.json")
                if "_desc-" not in p.name]  # fmt: skip
    assert len([s for s in sidecars if "ContentKey" in s]) == SCANS


@pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1: over half a minute")
def test_workers_that_dask_jobqueue_submits_label_scans(study, plain, slurm, tmp_path):
    """The cluster file of docs/cluster.md, with two small jobs."""
    pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed (extra 'dask')")
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    for old, new in (("jobs = 20", "jobs = 2"), ("cores = 2", "cores = 1"), ('"4GB"', '"3GB"')):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "cluster.toml").write_text(text)
    out, labels = tmp_path / "out", sorted(path.name for path in study.bids.glob("sub-*"))[:2]
    done = subprocess.run(
        study.command(out, "--nprocs", THREADS, "--participant-label", *labels, "--executor",
                      "dask", "--dask", tmp_path / "cluster.toml"),
        env=slurm, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [scan.status for scan in read_status(out)] == ["done", "done"]
    files = [path.relative_to(out) for path in out.rglob("sub-*/anat/*.nii.gz")]
    assert len(files) >= 2
    assert all((out / file).read_bytes() == (plain / file).read_bytes() for file in files)


@pytest.mark.skipif(not os.environ.get(LONG), reason=f"set {LONG}=1: over half a minute")
def test_two_nodes_train_together(slurm, tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(tomli_w.dumps({**asdict(tiny_recipe()), "steps": 2}))
    write_heads(tmp_path / "data")
    program = Path(sys.executable).with_name("torchrun")
    answer(
        {**slurm, "MASTER": "127.0.0.1", "DEVICE": "cpu", "PROCESSES": "1", "TORCHRUN": program},
        "sbatch", "--wait", "--nodes=2", "--cpus-per-task=1", f"--output={tmp_path}/log",
        ROOT / "singularity" / "tlseg-train.sbatch", recipe, "--data", tmp_path / "data",
        "--out", tmp_path / "runs", "--threads", "1",
    )  # fmt: skip
    saved = load_checkpoint(tmp_path / "runs" / "tiny.pt")
    assert (saved["step"], saved["processes"]) == (2, 2), (tmp_path / "log").read_text()

"""What the documents and scripts for containers and clusters say is what is done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.small import small_model, small_scans
from tlseg_bids.cli import options
from tlseg_bids.executors.cluster import read_queue_file

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SBATCH = ROOT / "singularity" / "tlseg.sbatch"
TRAIN = ROOT / "singularity" / "tlseg-train.sbatch"


def sbatch(
    tmp_path: Path, *arguments: str, script: Path = SBATCH, **environment: str
) -> subprocess.CompletedProcess[str]:
    """What Slurm would run, with programs that print their command lines."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho gpu07; sleep 0.2; echo gpu08\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    for name in ("tlseg", "apptainer", "srun"):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@"\n')
        program.chmod(0o755)
    return subprocess.run(
        ("bash", script, *arguments), cwd=tmp_path, capture_output=True, text=True, check=False,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3",
             "SLURM_ARRAY_TASK_COUNT": "40", "SLURM_CPUS_PER_TASK": "2", **environment},
    )  # fmt: skip


def test_the_array_script_gives_each_task_its_shard(tmp_path):
    (tmp_path / "my bids").mkdir()
    said = sbatch(tmp_path, "my bids", "my out", "--device", "cpu").stdout.splitlines()
    assert said == [
        "tlseg", f"{tmp_path}/my bids", f"{tmp_path}/my out", "participant", "--shard", "3/40",
        "--nprocs", "2", "--device", "cpu",
    ]  # fmt: skip
    values = options.parse(said[1:])
    assert values["shard"] == (3, 40)


def test_the_array_script_starts_some_tasks_again_and_the_image(tmp_path):
    (tmp_path / "bids").mkdir()
    said = sbatch(tmp_path, "bids", "out", SHARDS="90", TLSEG_IMAGE="t.sif", NV="--nv").stdout
    words = said.splitlines()
    assert words[:4] == ["apptainer", "run", "--cleanenv", "--containall"]
    assert "--nv" in words
    assert words[words.index("t.sif") + 1 :][:5] == [
        "/bids",
        "/out",
        "participant",
        "--shard",
        "3/90",
    ]


def test_the_array_script_says_how_it_is_used(tmp_path):
    refused = sbatch(tmp_path, "bids")
    assert refused.returncode == 64
    assert refused.stderr.startswith("usage: sbatch --array=1-N ")


def test_the_tables_follow_an_array_in_which_a_scan_failed():
    assert set(re.findall(r"--dependency=(\w+):", CLUSTER)) == {"afterany"}


def test_the_training_script_starts_torchrun_on_every_node(tmp_path):
    said = sbatch(
        tmp_path, "r.toml", "--data", "my data", script=TRAIN, SLURM_JOB_ID="41234",
        SLURM_JOB_NODELIST="gpu[07-08]", SLURM_JOB_NUM_NODES="2", SLURM_GPUS_ON_NODE="4",
    ).stdout.splitlines()  # fmt: skip
    assert said == [
        "srun", "torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--rdzv-id", "41234",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "gpu07:21234", "-m", "tlseg_bids.cli.train",
        "r.toml", "--data", "my data", "--device", "cuda",
    ]  # fmt: skip
    refused = sbatch(tmp_path, "r.toml", script=TRAIN)
    assert refused.returncode == 64
    assert refused.stderr.startswith("usage: sbatch --nodes=N --gpus-per-node=M ")


def test_the_cluster_file_of_the_page_is_one(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", CLUSTER, re.DOTALL)
    file = tmp_path / "cluster.toml"
    file.write_text(text)
    assert read_queue_file(file)["jobs"] == 20


def test_the_tables_of_scale_are_what_the_script_prints():
    page = (ROOT / "docs" / "explanation" / "scale.md").read_text(encoding="utf-8")
    printed = subprocess.run(
        (sys.executable, ROOT / "benchmarks" / "scale.py"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (told,) = re.findall(r"<!-- tables -->\n(.*)<!-- end -->", page, re.DOTALL)
    assert told == printed


@pytest.mark.slow
def test_what_a_scan_costs_is_measured(tmp_path):
    small_scans(tmp_path / "bids", 1)
    (tmp_path / "models").mkdir()
    small_model(tmp_path / "models")
    command = [
        sys.executable, ROOT / "benchmarks" / "scale.py", "--measure", tmp_path / "bids",
        tmp_path / "out", "--float32", "--models", tmp_path / "models", "--model", "small",
        "--skip-bids-validation", "--nprocs", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["scans"] == 1
    assert 1 < said["core_s"] < 600
    assert 0.2 < said["peak_gib"] < 4
    assert 1 < said["output_mib"] < 20
    assert said["output_files"] == len(
        [p for p in (tmp_path / "out").rglob("sub-*") if p.is_file()]
    )
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "is there already: name a new folder" in again.stderr


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_image_holds_every_requirement_pinned_and_hashed(variant):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    folder = ROOT / "container"
    text = "".join(
        (folder / f"requirements-{name}.txt").read_text(encoding="utf-8")
        for name in (variant, "alone")
    )
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.MULTILINE)
    )
    assert len(pins) == len(re.findall(r"^[\w.-]+", text, re.MULTILINE)), "a line without a hash"
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["dask"], *extras["harmonise"]):
        wanted = Requirement(line)
        name = wanted.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not locked: run container/lock.sh"
        assert wanted.specifier.contains(pins[name], prereleases=True), f"{line}, but {pins[name]}"


def test_the_image_is_not_roots_and_its_entry_is_no_shell():
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
    assert re.search(r"^USER (?!0|root)\d+:\d+$", last, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["/', last, re.MULTILINE)
    assert "HEALTHCHECK" not in DOCKERFILE
    assert DOCKERFILE.count("--require-hashes") == 2
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "!container/requirements-*.txt" in ignored

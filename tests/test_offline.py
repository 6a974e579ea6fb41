"""What reaches the network, what is said where it may not, and that the main job needs none."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cards import write_model
from tests.datasets import make_dataset
from tests.small import small_model, small_scans
from tlseg_bids.bids.validate import find_validator
from tlseg_bids.cli import run, zoo
from tlseg_bids.zoo.card_file import write_card

ROOT = Path(__file__).resolve().parents[1]
REACHING = (
    "aiohttp", "boto3", "dask_jobqueue", "distributed", "fsspec", "ftplib", "http", "httpx",
    "huggingface_hub", "nilearn.datasets", "requests", "socket", "templateflow",
    "torch.distributed", "torch.hub", "urllib.request", "urllib3",
)  # fmt: skip
REACHED = {
    "bids/lock.py": {"socket"},  # the name of this machine
    "bids/spaces.py": {"templateflow"},  # templates of --output-spaces
    "executors/cluster.py": {
        "socket",
        "distributed",
        "dask_jobqueue",
    },  # the scheduler that --dask names
    "train/parallel.py": {"torch.distributed"},  # the processes that torchrun started
    "zoo/weights.py": {"http", "urllib.request"},  # weights
}
WATCHED = """
import sys
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
          "urllib.Request"}
sys.addaudithook(lambda name, _: name in EVENTS and print("network:", name, _, file=sys.stderr))
from tlseg_bids.cli.run import main
sys.exit(main(sys.argv[1:]))
"""
NOWHERE = "http://127.0.0.1:9/far.safetensors"


def imported(path: Path) -> set[str]:
    """Which of `REACHING` a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {one for one in REACHING for name in names if name == one or name.startswith(one + ".")}


def test_only_weights_are_ever_downloaded():
    package = ROOT / "tlseg_bids"
    found = {path.relative_to(package).as_posix(): imported(path) for path in package.rglob("*.py")}
    assert {name: what for name, what in found.items() if what} == REACHED


@pytest.fixture
def far(tmp_path, monkeypatch):
    """A folder with the model `far`, whose weights lie at an address where nobody answers."""
    monkeypatch.setenv("TLSEG_CACHE", str(tmp_path / "cache"))
    card = write_model(tmp_path / "models", "far")
    weights = replace(card.weights, file=None, url=NOWHERE)
    write_card(replace(card, weights=weights), card.path)
    (tmp_path / "models" / "far.safetensors").unlink()
    make_dataset(tmp_path / "bids")
    return tmp_path / "models"


@pytest.mark.parametrize(
    "more",
    [
        ("--model", "far"),
        ("--model", "far", "--dry-run"),
        ("--fine-tune", "--labels", "labels", "--base", "far"),
    ],
)
def test_each_level_says_that_offline_forbids_the_download(far, tmp_path, capsys, more):
    labels = make_dataset(tmp_path / "labels", ()) / "sub-01" / "anat"
    shutil.copytree(tmp_path / "bids" / "sub-01" / "anat", labels)
    scan = labels / "sub-01_T1w.nii.gz"
    scan.rename(labels / "sub-01_space-T1w_seg-aseg_dseg.nii.gz")
    words = [tmp_path / "bids", tmp_path / "out", "participant", "--offline", "--models", far,
             "--skip-bids-validation", "--device", "cpu", *more]  # fmt: skip
    words = [str(tmp_path / word) if word == "labels" else str(word) for word in words]
    assert run.main(words) in (65, 66)
    said = capsys.readouterr().err
    assert "model 'far' cannot be used" in said
    assert "its weights were not fetched yet, and --offline was given" in said
    assert "tlseg-zoo fetch" in said


def test_fetching_says_that_offline_forbids_it_and_that_nobody_answers(far, capsys):
    words = ["fetch", "far", "--models", str(far)]
    assert zoo.main([*words, "--offline"]) == 66
    said = capsys.readouterr().err
    assert "'far' cannot be used: its weights were not fetched yet, and --offline was given" in said
    assert zoo.main(words) == 66
    said = capsys.readouterr().err
    assert re.search(r"the weights cannot be fetched \(.*refused\) – http://127\.0\.0\.1:9/", said)
    assert "fetch them on another machine and copy its cache folder (TLSEG_CACHE)" in said
    assert zoo.main(["fetch", "any", "--offline"]) == 0, "they are in the package"
    assert zoo.main(["verify", "far", "--models", str(far)]) == 66
    assert "far are not on this machine" in capsys.readouterr().err.replace("'", "")


@pytest.mark.slow
@pytest.mark.skipif(find_validator() is None, reason="bids-validator-deno is not installed")
def test_the_main_job_and_the_group_try_no_network(tmp_path):
    """Nor would they have any: where it can be had, in a network name space of its own."""
    small_scans(tmp_path / "bids", 1)
    (tmp_path / "models").mkdir()
    small_model(tmp_path / "models")
    home = tmp_path / "home"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TEMPLATEFLOW", "TLSEG"))}
    apart = ("unshare", "--net", "--")
    possible = shutil.which("unshare") and not subprocess.run((*apart, "true")).returncode
    begin = [*(apart if possible else ()), sys.executable, "-c", WATCHED]
    words = [tmp_path / "bids", tmp_path / "out"]
    options = ["--model", "small", "--models", tmp_path / "models", "--device", "cpu"]
    for more in (["participant", *options], ["group"]):
        answer = subprocess.run(
            [*begin, *words, *more], capture_output=True, text=True, cwd=ROOT,
            env={**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        assert "network:" not in answer.stderr
        assert "was not validated" not in answer.stderr
    assert not [path for path in home.rglob("*") if "templateflow" in path.name.lower()]

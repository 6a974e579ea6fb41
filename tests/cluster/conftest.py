"""Twelve scans, small ones or real ones, and what one plain run makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.datasets import real_dataset
from tests.small import small_model, small_scans
from tlseg_bids.zoo.card_file import write_card
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import local_file

ROOT = Path(__file__).resolve().parents[2]
SCANS = 12
THREADS = "1"
LONG = "TLSEG_LONG_TESTS"
LIMIT_S = 3600 if os.environ.get(LONG) else 600


@dataclass(frozen=True)
class Study:
    """A dataset of `SCANS` scans, and the options of every run on it."""

    bids: Path
    options: tuple[str, ...]

    def command(self, out: Path, *more: object) -> list[str]:
        """The command line of a run."""
        words = (ROOT / "bids_app_entry.py", self.bids, out, "participant", *self.options, *more)
        return [sys.executable, *map(str, words)]


def environment() -> dict[str, str]:
    """The environment of every program here: this checkout, on the CPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}


@pytest.fixture(
    scope="session",
    params=["small", pytest.param("real", marks=pytest.mark.data)],
)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Small scans with a small model, or real ones with the default model."""
    if request.param == "real" and not os.environ.get(LONG):
        pytest.skip(f"set {LONG}=1 to label {SCANS} real scans twice over, about ten minutes")
    folder = tmp_path_factory.mktemp(f"cluster-{request.param}")
    (folder / "models").mkdir()
    model = request.param
    if model == "small":
        small_scans(folder / "bids", SCANS)
        small_model(folder / "models")
    else:
        real_scans(folder / "bids")
        real_model(folder / "models")
    assert len(list(folder.glob("bids/sub-*/anat/*.nii.gz"))) == SCANS
    return Study(
        folder / "bids",
        ("--device", "cpu", "--models", str(folder / "models"), "--model", model,
         "--skip-bids-validation"),
    )  # fmt: skip


def real_scans(bids: Path) -> None:
    """A copy of the T1w scans of `infant`."""
    source = real_dataset("infant")
    bids.mkdir()
    for path in [*source.iterdir(), *source.glob("sub-*/anat/*_T1w.*")]:
        if path.is_file():
            copy = bids / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def real_model(folder: Path) -> None:
    """The default model, asked once instead of until it settles."""
    card = find_card(load_cards(), "any")
    weights = local_file(card)
    assert weights is not None
    shutil.copy(weights, folder / "real.safetensors")
    quick = replace(
        card, name="real", path=None, weights=replace(card.weights, file="real.safetensors"),
        strategy={**card.strategy, "mirror": False, "overlap": 0.0},
        preprocess={**card.preprocess, "rounds": 1, "settled_mm": 99.0},
    )  # fmt: skip
    write_card(quick, folder / "real.toml")


@pytest.fixture(scope="session")
def plain(study: Study) -> Path:
    """The output of one run in one process, two scans at a time."""
    out = study.bids.parent / "plain"
    command = study.command(out, "--nprocs", "2", "--omp-nthreads", THREADS)
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return out


@pytest.fixture
def ends() -> Iterator[list[subprocess.Popen]]:
    """Processes that are ended after the test: those that it put in here, and no other."""
    started: list[subprocess.Popen] = []
    yield started
    for process in reversed(started):
        process.kill()
        process.wait()

"""Twelve real scans and what one plain run makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.datasets import real_dataset
from tlseg_bids.zoo.card_file import write_card
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import local_file

ROOT = Path(__file__).resolve().parents[2]
SCANS = 12
THREADS = "1"
LONG = "TLSEG_LONG_TESTS"


def environment() -> dict[str, str]:
    """The environment of every program here: this checkout, on the CPU."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": THREADS}


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the T1w scans of `infant`."""
    if not os.environ.get(LONG):
        pytest.skip(f"set {LONG}=1 to label {SCANS} scans twice over, about ten minutes")
    source = real_dataset("infant")
    folder = tmp_path_factory.mktemp("cluster") / "bids"
    folder.mkdir()
    for path in [*source.iterdir(), *source.glob("sub-*/anat/*_T1w.*")]:
        if path.is_file():
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    assert len(list(folder.glob("sub-*/anat/*.nii.gz"))) == SCANS
    return folder


@pytest.fixture(scope="session")
def options(dataset: Path) -> tuple[str, ...]:
    """Options of every run: the default model, asked once instead of until it settles.

    What is compared does not depend on the model, and 12 scans are labelled three times.
    """
    card, folder = find_card(load_cards(), "any"), dataset.parent / "models"
    folder.mkdir()
    weights = local_file(card)
    assert weights is not None
    shutil.copy(weights, folder / "quick.safetensors")
    quick = replace(
        card, name="quick", path=None, weights=replace(card.weights, file="quick.safetensors"),
        strategy={**card.strategy, "mirror": False, "overlap": 0.0},
        preprocess={**card.preprocess, "rounds": 1, "settled_mm": 99.0},
    )  # fmt: skip
    write_card(quick, folder / "quick.toml")
    return "--device", "cpu", "--models", str(folder), "--model", "quick"


@pytest.fixture(scope="session")
def plain(dataset: Path, options: tuple[str, ...]) -> Path:
    """The output of one run in one process."""
    out = dataset.parent / "plain"
    command = (sys.executable, ROOT / "bids_app_entry.py", dataset, out, "participant",
               "--nprocs", THREADS, *options)  # fmt: skip
    answer = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return out

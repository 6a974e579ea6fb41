"""Twelve scans, small ones or real ones, and what one plain run makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.datasets import make_dataset, real_dataset
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.zoo.card_file import write_card
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import describe, load_weights, local_file

ROOT = Path(__file__).resolve().parents[2]
SCANS = 12
THREADS = "1"
LONG = "TLSEG_LONG_TESTS"
LIMIT_S = 3600 if os.environ.get(LONG) else 600
SMALL_NETWORK = {"network": "unet", "features": [2, 4], "stem": 2, "prior_channels": 33}


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
        small_scans(folder / "bids")
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


def small_scans(bids: Path) -> None:
    """The average brain that ships inside nilearn, at 2 mm, with noise of its own in every scan."""
    from nilearn.datasets import load_mni152_template

    brain = load_mni152_template(resolution=2)
    voxels = np.asarray(brain.dataobj, np.float32) * 1000
    make_dataset(bids, ())
    for number in range(1, SCANS + 1):
        noise = np.random.default_rng(number).normal(0, 20, voxels.shape)
        image = nib.Nifti1Image((voxels + noise * (voxels > 0)).astype(np.int16), brain.affine)
        path = bids / f"sub-{number:02}" / "anat" / f"sub-{number:02}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(image, path)


def small_model(folder: Path) -> None:
    """The locator of `any`, and in place of its segmenter an untrained one that trusts the prior.

    Two seconds a scan; what is compared does not depend on how good the labels are.
    """
    card = find_card(load_cards(), "any")
    torch.manual_seed(0)
    network = build(**SMALL_NETWORK, out_channels=[len(load_protocol(card.protocol))])
    tensors = {f"segmenter.{key}": value.half() for key, value in network.state_dict().items()}
    tensors["segmenter.prior_weight"] = torch.tensor(6.0).half()
    kept = ("locator.", "prior.", "template")
    tensors |= {k: v for k, v in load_weights(card).items() if k.startswith(kept)}
    file, path = folder / "small.safetensors", folder / "small.toml"
    save_file(tensors, file)
    preprocess = {**card.preprocess, "spacing_mm": 2.0, "rounds": 1, "settled_mm": 99.0}
    preprocess["locator"] = {**card.preprocess["locator"], "looks": 1}
    write_card(
        replace(
            card, name="small", path=None, networks={**card.networks, "segmenter": SMALL_NETWORK},
            strategy={"name": "sliding", "window": 96, "overlap": 0.0},
            preprocess=preprocess, weights=describe(file, "MIT", path),
        ),
        path,
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

"""The benchmark of the synthesis times the stages of real steps and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from tests.scripts import load_benchmark
from tlseg_bids.train.dataset import default_protocol
from tlseg_bids.train.loop import Training
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.synth import Mix, compose

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("synthesis")


@pytest.fixture
def run(tmp_path: Path) -> Training:
    """A run on one label map: a cube for every paired structure."""
    labels = np.zeros((40, 40, 40), np.int16)
    for n, (left, right) in enumerate(default_protocol().pairs()):
        j, k = 2 + 8 * (n % 4), 2 + 8 * (n // 4)
        labels[24:32, j : j + 7, k : k + 7] = right
        labels[8:16, j : j + 7, k : k + 7] = left
    folder = tmp_path / "cubes" / "sub-1" / "anat"
    folder.mkdir(parents=True)
    nib.save(
        nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1])), folder / "sub-1_seg-head_dseg.nii.gz"
    )
    (tmp_path / "cubes" / "dataset_description.json").write_text(json.dumps({"Name": "Cubes"}))
    recipe = Recipe(
        name="tiny", role="locator", protocol="aseg",
        network={"network": "unet", "features": [4, 8], "stem": 2}, patch=16, spacing_mm=2.0,
        box_mm=[[-40, 40]] * 3, datasets={"cubes": {}}, mix=Mix(skull_stripped=1.0),
    )  # fmt: skip
    return Training(recipe, tmp_path, None)


def test_stages_are_timed_within_the_example(benchmark, run):
    rows = benchmark.measure(run, steps=2, warm_up=1)
    assert run.step == 3
    assert len(rows) == 2
    for row in rows:
        parts = sum(seconds for label, seconds in row.items()
                    if label not in (benchmark.MAKING, benchmark.LEARNING))  # fmt: skip
        assert 0 < parts <= row[benchmark.MAKING]
        assert {"skull stripped", "scanner", "deformation"} <= set(row)
        assert "real image read" not in row
    text = benchmark.table(rows)
    assert "| skull stripped |" in text
    assert "| step |" in text
    assert compose.acquire.__name__ == "acquire", "a stage is still watched"

"""How far images lie beside their labels, found by what a model makes of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from tests.scripts import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("beside")


def balls(beside: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    """Three structures, all of them that many voxels beside their place."""
    grid = np.stack(np.meshgrid(*[np.arange(32.0)] * 3, indexing="ij"), -1)
    found = np.zeros((32, 32, 32), np.int16)
    for label, centre in ((10, (10, 16, 16)), (49, (22, 16, 16)), (16, (16, 8, 12))):
        found[np.linalg.norm(grid - centre - np.array(beside), axis=-1) < 5] = label
    return found


@pytest.mark.parametrize("beside", [(0, 0, 0), (0.5, 0, -0.25), (-1.4, 1.0, 0.6)])
def test_the_translation_is_found_to_a_tenth_of_a_voxel(benchmark, beside):
    found = benchmark.translation(balls(beside), balls())
    np.testing.assert_allclose(found, beside, atol=0.1)


def test_labels_that_are_moved_back_agree(benchmark):
    seen, reference = balls((-1.4, 1.0, 0.6)), balls()
    moved = benchmark.moved_labels(seen, np.array([-1.4, 1.0, 0.6]))
    assert benchmark.agreement(seen, reference) < 0.75
    assert benchmark.agreement(moved, reference) > 0.93
    assert set(np.unique(moved)) == {0, 10, 16, 49}


def test_a_line_says_it_in_mm_and_the_order_of_ras(benchmark, tmp_path: Path, capsys):
    turned = np.diag([-2.0, 2, 2, 1])
    for folder, labels in (("out", balls((1, 0, 0))), ("labels", balls())):
        path = tmp_path / folder / "sub-01" / "anat"
        path.mkdir(parents=True)
        name = "sub-01_space-T1w_dseg.nii.gz" if folder == "out" else "sub-01_dseg.nii.gz"
        nib.save(nib.Nifti1Image(labels, turned), path / name)
    assert benchmark.main([str(tmp_path / "out"), str(tmp_path / "labels")]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [float(cell) for cell in row[2:5]] == pytest.approx([-2, 0, 0], abs=0.1)
    assert float(row[5]) < float(row[6])


def test_too_few_words_are_answered_with_the_usage(benchmark, capsys):
    assert benchmark.main(["out"]) == 64
    assert "beside.py OUT REFERENCE" in capsys.readouterr().err

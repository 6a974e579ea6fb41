"""Labels that went through larger voxels."""

from __future__ import annotations

from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from tests.scripts import load_benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("ceiling")


def cube() -> np.ndarray:
    labels = np.zeros((24, 24, 24), np.int32)
    labels[6:18, 6:18, 6:18] = 10  # left thalamus
    labels[11, 11, 11] = 26  # left accumbens, a single voxel
    return labels


def test_voxels_of_the_same_size_change_nothing(benchmark):
    assert (benchmark.read_back(cube(), np.ones(3), 1.0) == cube()).all()


def test_what_is_smaller_than_a_voxel_is_lost(benchmark):
    back = benchmark.read_back(cube(), np.ones(3), 4.0)
    assert back.shape == cube().shape
    assert set(np.unique(back)) == {0, 10}


def test_the_scans_own_voxels_are_counted_in_mm(benchmark):
    half = benchmark.read_back(cube(), np.full(3, 0.5), 1.0)
    assert (half == benchmark.read_back(cube(), np.ones(3), 2.0)).all()


def test_a_lost_structure_counts_as_nothing(benchmark, tmp_path):
    path = tmp_path / "sub-1_seg-aseg_dseg.nii.gz"
    nib.save(nib.Nifti1Image(cube().astype(np.int16), np.eye(4)), path)
    assert benchmark.ceilings(path, 1.0) == {"14": 1.0, "all": 1.0}
    found = benchmark.ceilings(path, 4.0)
    assert 0.3 < found["14"] < 0.5, "one of two structures"


def test_a_row_for_each_dataset_and_size(benchmark, tmp_path, capsys):
    for dataset, folder in (("malc", "manual"), ("infant", "jlf")):
        for number in range(2):
            (tmp_path / dataset / f"sub-{number}").mkdir(parents=True)
            anat = tmp_path / dataset / "derivatives" / folder / f"sub-{number}" / "anat"
            anat.mkdir(parents=True)
            image = nib.Nifti1Image(cube().astype(np.int16), np.eye(4))
            nib.save(image, anat / f"sub-{number}_seg-aseg_dseg.nii.gz")
    assert benchmark.main([str(tmp_path), "--spacing", "1", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| malc | 1 | 1 | 1.000 ± 0.000 | 1.000 ± 0.000 |"
    assert lines[3].startswith("| malc | 4 | 1 | 0.38")
    assert len(lines) == 6

"""Labelled scans in thick slices, and what a table says of them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.scripts import load_benchmark

SIZE = (4, 5, 8)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("slices")


def heights() -> nib.Nifti1Image:
    """An image whose voxels say how many mm up they are, stored as P, S, L."""
    affine = np.array([[0, 0, -1, 9], [-1, 0, 0, 7], [0, 1, 0, -3], [0, 0, 0, 1]], float)
    up = np.broadcast_to((np.arange(SIZE[1]) - 3.0)[None, :, None], SIZE)
    return nib.Nifti1Image(up.astype(np.float32), affine)


@pytest.mark.parametrize(("word", "first", "count"), [("axial-2", -2.5, 2), ("axial-2-1", -1.5, 2),
                                                      ("axial-5", -1.0, 1)])  # fmt: skip
def test_a_slice_lies_where_its_voxels_did(benchmark, word, first, count):
    thick = benchmark.cut(heights(), benchmark.Slices.read(word), labels=False)
    assert thick.shape == (SIZE[0], count, SIZE[2])
    up = nib.affines.apply_affine(thick.affine, np.argwhere(np.ones(thick.shape)))[:, 2]
    assert np.allclose(thick.get_fdata().ravel(), up), "means of heights are the slice's height"
    assert up.min() == first


@pytest.mark.parametrize(("word", "axis"), [("coronal-2", 0), ("axial-2", 1), ("sagittal-2", 2)])
def test_directions_follow_the_affine(benchmark, word, axis):
    thick = benchmark.cut(heights(), benchmark.Slices.read(word), labels=False)
    assert [a // b for a, b in zip(SIZE, thick.shape, strict=True)] == [
        2 if i == axis else 1 for i in range(3)
    ]


def test_a_label_is_the_most_frequent_one(benchmark):
    labels = np.array([[3, 3, 0], [0, 5, 5], [5, 3, 0]])[:, :, None]
    assert benchmark.most_frequent(labels).ravel().tolist() == [3, 5, 0]


@pytest.mark.parametrize("word", ["oblique-3", "axial", "axial-1-2-3", "axial-1..2"])
def test_slices_that_are_none_are_refused(benchmark, word):
    with pytest.raises(SystemExit, match=f"{word}: slices are sagittal, coronal, axial, then"):
        benchmark.Slices.read(word)


@pytest.mark.parametrize("word", ["axial-0.2", "axial-3-4", "axial-9"])
def test_slices_that_the_scan_does_not_hold_are_refused(benchmark, word):
    with pytest.raises(SystemExit, match=r"axial[0-9bp]+: no such slice in 5 .* of 1 mm, ask for"):
        benchmark.cut(heights(), benchmark.Slices.read(word), labels=False)


def dataset(root: Path) -> Path:
    for folder, ending in (("", "T1w"), ("derivatives/hand", "seg-own_dseg")):
        there = root / folder / "sub-1" / "ses-a" / "anat"
        there.mkdir(parents=True)
        nib.save(heights(), there / f"sub-1_ses-a_{ending}.nii.gz")
    other = root / "sub-2" / "anat"
    other.mkdir(parents=True)
    nib.save(heights(), other / "sub-2_T1w.nii.gz")
    return root


def test_scans_with_labels_are_written_as_they_are_and_in_slices(benchmark, tmp_path, capsys):
    data, out = dataset(tmp_path / "data"), tmp_path / "out"
    assert benchmark.main(["scans", str(data), "hand", str(out), "axial-2", "axial-2.5-1"]) == 0
    assert capsys.readouterr().out == f"1 scans, as they are and in 2 kinds of slices, in {out}\n"
    written = sorted(p.name for p in out.glob("sub-*/**/*.nii.gz"))
    assert written == ["sub-1_ses-a_T1w.nii.gz", "sub-1_ses-a_acq-axial2_T1w.nii.gz",
                       "sub-1_ses-a_acq-axial2p5b1_T1w.nii.gz"]  # fmt: skip
    labels = sorted(p.name for p in out.glob("derivatives/labels/**/*.nii.gz"))
    assert labels == sorted(name.replace("T1w", "seg-own_dseg") for name in written)
    shape = nib.load(next(out.glob("derivatives/labels/**/*axial2_*"))).shape
    assert shape == nib.load(next(out.glob("sub-1/**/*axial2_*"))).shape


def test_a_dataset_without_such_labels_is_refused(benchmark, tmp_path):
    data = dataset(tmp_path / "data")
    with pytest.raises(
        SystemExit, match=r"machine: no label map of a T1w or T2w in .*data; name a"
    ):
        benchmark.main(["scans", str(data), "machine", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def labelled(
    out: Path, acquisition: str, dice: float, thalamus: float, suffix: str = "T1w"
) -> tuple[str, int, float]:
    name = f"sub-1{acquisition}_space-{suffix}_seg-aseg"
    there = out / "sub-1" / "anat"
    there.mkdir(parents=True, exist_ok=True)
    rows = {"index": [10, 49, 26], "soft_mm3": [thalamus, 7000.0, 500.0]}
    pd.DataFrame(rows).to_csv(there / f"{name}_desc-volumes_dseg.tsv", sep="\t", index=False)
    return f"{name}_dseg.nii.gz", 1, dice


def test_the_table_sets_slices_beside_the_scan_as_it_is(benchmark, tmp_path, capsys):
    rows = [labelled(tmp_path, "", 0.9, 7000.0), labelled(tmp_path, "_acq-axial5", 0.8, 5600.0),
            labelled(tmp_path, "_acq-axial5b2", 0.8, 7000.0),
            labelled(tmp_path, "", 0.7, 9000.0, "T2w")]  # fmt: skip
    table = tmp_path / "dice.tsv"
    pd.DataFrame(rows, columns=["predicted", "subcortical14", "dice"]).to_csv(table, sep="\t")
    assert benchmark.main(["table", str(tmp_path), str(table)]) == 0
    whole, t2w, thick, mean, thalamus, *other, places = capsys.readouterr().out.splitlines()
    assert t2w.startswith("as it is, T2w: 1 scans, Dice 0.700")
    assert other[0].startswith("axial5b2, T1w: 1 scans")
    assert places == "axial5, T1w begun in 2 places, sd within a scan: thalamus 7.1 %"
    assert whole == "as it is, T1w: 1 scans, Dice 0.900 ± nan, of the sub-cortical 0.900 ± nan"
    assert thick == "axial5, T1w: 1 scans, Dice 0.800 ± nan, of the sub-cortical 0.800 ± nan"
    assert mean == "  volumes differ by 10.0 % in the mean"
    assert thalamus == "  thalamus: -10.0 ± nan %", "the accumbens is too small to be told"

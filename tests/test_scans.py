"""Labelled scans that training reads: what is refused, what is left out, what is moved."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from heads import tiny_recipe

from tlseg_bids.errors import DataError, NoInputError, ScanError, UsageError
from tlseg_bids.train.scans import load_dataset, moved_back
from tlseg_bids.train.supply import load_samples

SIDE = 48


def labels(top: int = 30) -> np.ndarray:
    """A left and a right hippocampus, two blocks."""
    found = np.zeros((SIDE,) * 3, np.int16)
    found[8:20, 10:30, 10:top], found[24:36, 10:30, 10:top] = 17, 53
    return found


def scan_of(found: np.ndarray) -> np.ndarray:
    """Intensities that differ from voxel to voxel, 0 outside."""
    rng = np.random.default_rng(0)
    return (100 + found + rng.random(found.shape)).astype(np.float32) * (found > 0)


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    """A NIfTI file of 1 mm, or as `affine` says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def dataset(root: Path, stems: tuple[str, ...] = ("sub-01",)) -> Path:
    """A label map and a T1w of each stem."""
    for stem in stems:
        folder = root.joinpath(*stem.split("_"), "anat")
        write(folder / f"{stem}_dseg.nii.gz", labels())
        write(folder / f"{stem}_T1w.nii.gz", scan_of(labels()))
    return root


def file(root: Path, suffix: str) -> Path:
    """Of the one subject."""
    return root / "sub-01" / "anat" / f"sub-01_{suffix}.nii.gz"


def shifted(mm: float) -> np.ndarray:
    """An affine that far to the right."""
    affine = np.eye(4)
    affine[0, 3] = mm
    return affine


@pytest.mark.parametrize(
    ("image", "affine", "message"),
    [
        (np.zeros((96,) * 3), np.diag([0.5, 0.5, 0.5, 1]), r"\(48, 48, 48\) voxels.*\(96, 96, 96"),
        (None, shifted(20), "a corner lies 20.0 mm from that of the scan"),
    ],
)
def test_an_image_on_another_grid_than_its_labels_is_refused(tmp_path, image, affine, message):
    dataset(tmp_path)
    found = scan_of(labels()) if image is None else np.random.default_rng(0).random(image.shape)
    write(file(tmp_path, "T1w"), found.astype(np.float32), affine)
    with pytest.raises(DataError, match=rf"other grid.*{message}.*sub-01_T1w.*resample the labels"):
        load_dataset(tmp_path, "x", {"images": ["T1w"]})


def test_an_image_that_is_no_number_somewhere_is_refused(tmp_path):
    broken = scan_of(labels())
    broken[12, 12, 12] = np.nan
    write(file(dataset(tmp_path), "T1w"), broken)
    with pytest.raises(ScanError, match=r"1 of 110592 voxels is NaN or Inf.*sub-01_T1w"):
        load_dataset(tmp_path, "x", {"images": ["T1w"]})


def test_labels_that_are_none_are_refused(tmp_path):
    path = file(dataset(tmp_path), "dseg")
    negative = labels()
    negative[:3, 0, 0] = -1
    write(path, negative)
    with pytest.raises(DataError, match=r"3 voxels.*negative label, down to -1.*sub-01_dseg.*0 wh"):
        load_dataset(tmp_path, "x", {})
    write(path, np.zeros_like(negative))
    with pytest.raises(DataError, match=r"no structure of the protocol is labelled.*sub-01_dseg"):
        load_dataset(tmp_path, "x", {})
    write(path, (labels() / 10).astype(np.float32))
    with pytest.raises(ScanError, match=r"voxels are not whole numbers.*sub-01_dseg"):
        load_dataset(tmp_path, "x", {})


def test_an_image_that_is_missing_is_named(tmp_path):
    file(dataset(tmp_path), "T1w").unlink()
    with pytest.raises(NoInputError, match=r"no image sub-01_T1w\.nii\.gz.*sub-01.*remove its lab"):
        load_dataset(tmp_path, "x", {"images": ["T1w"]})


def test_two_label_maps_of_one_image_are_refused(tmp_path):
    write(dataset(tmp_path) / "sub-01" / "anat" / "sub-01_seg-other_dseg.nii.gz", labels(20))
    with pytest.raises(DataError, match=r"sub-01_dseg.nii.gz and sub-01_seg-other.*both label sub"):
        load_dataset(tmp_path, "x", {})


def test_a_fold_leaves_out_a_subject_with_all_sessions(tmp_path):
    stems = ("sub-01_ses-a", "sub-01_ses-b", "sub-02_ses-a", "sub-02_ses-b", "sub-03_ses-a")
    dataset(tmp_path / "visits", stems)
    (tmp_path / "visits" / "sub-02" / "sub-02_sessions.tsv").write_text(
        "session_id\tage\nses-a\t1.0\nses-b\t2.0\n"
    )
    recipe = tiny_recipe()
    every = {"datasets": {"visits": {"images": ["T1w"]}}, "fold_datasets": ["visits"]}
    samples = load_samples(type(recipe)(**{**vars(recipe), **every, "fold": [0, 2]}), tmp_path)
    assert [s.name for s in samples["visits"]] == ["sub-02_ses-a", "sub-02_ses-b"]
    assert len({s.sha256 for s in samples["visits"]}) == 1, "the files are the same"
    assert [s.age_years for s in samples["visits"]] == pytest.approx([1.0, 2.0], abs=0.01)


def test_an_image_is_moved_to_its_labels(tmp_path):
    dataset(tmp_path)
    beside = np.roll(scan_of(labels()), (2, -1), (0, 1))
    turned = np.diag([-1.0, 1, 1, 1])
    turned[0, 3] = SIDE - 1
    write(file(tmp_path, "dseg"), labels()[::-1].copy(), turned)
    write(file(tmp_path, "T1w"), beside[::-1].copy(), turned)
    rules = {"images": ["T1w"], "fill": 24}
    as_it_is = load_dataset(tmp_path, "x", rules)[0]
    moved = load_dataset(tmp_path, "x", {**rules, "moved": {"sub-01_T1w": [2.0, -1.0, 0.0]}})[0]
    image, classes = moved.images["T1w"].numpy(), moved.classes.numpy()
    assert np.array_equal(classes, as_it_is.classes.numpy()), "labels stay where they are"
    labelled = classes > 0
    wanted = scan_of(labels())
    corner = np.argwhere(wanted > 0)[0] - np.argwhere(image > 0)[0]
    part = wanted[tuple(slice(c, c + n) for c, n in zip(corner, image.shape, strict=True))]
    np.testing.assert_allclose(image[labelled], part[labelled], rtol=1e-6)
    assert not np.array_equal(image, as_it_is.images["T1w"].numpy())


def test_half_a_voxel_is_the_mean_of_two():
    image = np.zeros((3, 3, 3), np.float32)
    image[1, 1, 1], image[2, 1, 1] = 4, 8
    found = moved_back(image, [0.43, 0, 0], [0.86, 1, 1])
    assert found[:, 1, 1].tolist() == [2, 6, 0]


def test_moves_that_make_no_sense_are_refused(tmp_path):
    dataset(tmp_path)
    rules = {"images": ["T1w"], "moved": {"sub-01_T2w": [1.0, 0.0, 0.0]}}
    with pytest.raises(UsageError, match=r"are not there: sub-01_T2w.*datasets.x.moved.*SUFFIX"):
        load_dataset(tmp_path, "x", rules)
    for wrong in ([1.0, 2.0], [1.0, float("nan"), 0.0], 2.0):
        with pytest.raises(UsageError, match=r"no way to move an image.*three numbers of mm"):
            load_dataset(tmp_path, "x", {**rules, "moved": {"sub-01_T1w": wrong}})

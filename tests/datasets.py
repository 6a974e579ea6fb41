"""Tiny BIDS datasets, sound and hostile, and a made-up segmentation of a scan in one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from tests.cards import small_card
from tlseg_bids.bids.scan import Scan
from tlseg_bids.config import Config
from tlseg_bids.flow import Job, Refusal, Segmentation
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.volume import Grid, Volume

SHAPE = (5, 6, 7)
OBLIQUE = np.array(
    [[-0.9, 0.1, 0.0, 31.5], [0.1, 1.1, 0.2, -22.25], [0.05, -0.2, 1.2, 7.0], [0, 0, 0, 1]]
)
DESCRIPTION = {"Name": "made up", "BIDSVersion": "1.10.0"}
ONE_SCAN = ("sub-01/anat/sub-01_T1w.nii.gz",)


def write_nifti(
    path: Path, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = OBLIQUE, codes=(1, 1)
) -> Path:
    """Write an int16 image of a ramp; `codes` are the codes of sform and qform."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), affine)
    image.set_sform(affine, codes[0])
    image.set_qform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def make_dataset(
    root: Path,
    scans: Iterable[str] = ONE_SCAN,
    texts: Mapping[str, str | dict[str, Any]] | None = None,
) -> Path:
    """Make a BIDS dataset.

    Parameters
    ----------
    root : Path
        Its folder.
    scans : iterable of str
        Paths of the NIfTI files below the root.
    texts : mapping of str to str or dict
        Further files; a dict becomes JSON. dataset_description.json and README have a default.
    """
    root.mkdir(parents=True, exist_ok=True)
    readme = "A dataset that a test made up. " * 6
    for name, content in {
        "dataset_description.json": DESCRIPTION, "README.md": readme, **(texts or {})
    }.items():  # fmt: skip
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        path.write_text(text, encoding="utf-8")
    for scan in scans:
        write_nifti(root / scan)
    return root


def table(*rows: str) -> str:
    """A TSV from rows whose cells are separated by ``|``."""
    return "".join(row.replace("|", "\t") + "\n" for row in rows)


def make_hostile_dataset(root: Path) -> Path:
    """One good scan (sub-01) beside every kind of file that cannot be used.

    Names that leave the folder or break a page or a table, a DataLad link without content, its
    unlocked form, Git LFS, a dangling link, an empty file, a folder and a pipe in place of a scan,
    a broken sidecar, wrong suffixes, twins, and links that run in circles.
    """
    make_dataset(
        root,
        (
            *ONE_SCAN,
            "sub-01/anat/sub-01_acq-a b_T1w.nii.gz",
            "sub-01/anat/sub-01_acq-..\\up_T1w.nii.gz",
            'sub-01/anat/sub-01_acq-"<script>"_T1w.nii.gz',
            "sub-01/anat/sub-01_acq-tab\there_T1w.nii.gz",
            "sub-01/anat/sub-01_T1.nii.gz",
            "sub-01/anat/sub-01_t2w.nii.gz",
            "sub-01/anat/sub-01_space-MNI_T1w.nii.gz",
            "sub-01/anat/sub-02_acq-other_T1w.nii.gz",
            "sub-01/anat/sub-01_ses-9_T1w.nii.gz",
            "sub-01/anat/sub-01_acq-twin_T1w.nii",
            "sub-01/anat/sub-01_acq-twin_T1w.nii.gz",
            "sub-01/anat/sub-01_acq-json_T2w.nii.gz",
            "sub-..x/anat/sub-..x_T1w.nii.gz",
        ),
        {"sub-01/anat/sub-01_acq-json_T2w.json": '{\n "SkullStripped": maybe\n}'},
    )
    anat = root / "sub-01" / "anat"
    annexed = ".git/annex/objects/Xx/Yy/MD5E-s1--0.nii.gz/MD5E-s1--0.nii.gz"
    (anat / "sub-01_acq-annex_T1w.nii.gz").symlink_to(f"../../{annexed}")
    (anat / "sub-01_acq-dangling_T1w.nii.gz").symlink_to("/nowhere/at/all.nii.gz")
    (anat / "sub-01_acq-unlocked_T1w.nii.gz").write_text("/annex/objects/MD5E-s1--0.nii.gz\n")
    (anat / "sub-01_acq-lfs_T1w.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    (anat / "sub-01_acq-empty_T1w.nii.gz").touch()
    (anat / "sub-01_acq-folder_T1w.nii.gz").mkdir()
    os.mkfifo(anat / "sub-01_acq-pipe_T1w.nii.gz")
    (anat / "circle").symlink_to("..")
    (root / "sub-01" / "circle").symlink_to("..")
    (anat / os.fsdecode(b"sub-01_acq-\xff_T1w.nii.gz")).write_bytes(b"x")
    return root


def config(bids_dir: Path, out_dir: Path | None = None, **options: Any) -> Config:
    """A `Config` for a dataset."""
    return Config(bids_dir, out_dir or bids_dir.parent / "out", "participant", **options)


def made_up_job(scan: Scan, key: str = "key-1", **card: Any) -> Job:
    """A job for `scan` with a card that has no weights on disk."""
    refused = (Refusal("other", "it is for infants"),)
    return Job(scan, small_card(**card), "only one", refused, ("no age",), key, "cpu", 1.0)


def made_up_segmentation(scan: Scan) -> Segmentation:
    """A segmentation on the grid of `scan`, with ``aseg``; its table has no background."""
    image = nib.load(scan.path)
    grid = Grid(image.shape[:3], image.affine)
    protocol = load_protocol("aseg").table
    choices = np.arange(np.prod(grid.shape)).reshape(grid.shape) % len(protocol)
    labels = protocol["index"].to_numpy(np.int16)[choices]
    count = np.bincount(choices.ravel(), minlength=len(protocol))[1:]
    structures = protocol.iloc[1:].reset_index(drop=True)
    volumes = pd.DataFrame({
        "index": structures["index"], "name": structures["name"],
        "hard_mm3": count * grid.voxel_mm3, "soft_mm3": count * grid.voxel_mm3,
        "voxels": count, "mean_confidence": np.where(count > 0, 0.5, np.nan),
    })  # fmt: skip
    confidence = np.full(grid.shape, 128, np.uint8)
    return Segmentation(
        Volume(labels, grid), confidence, labels != 0, volumes, {"score": 0.75}, ("small",)
    )


def find_real_data() -> Path | None:
    """The folder with the real datasets, if this machine has them."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TLSEG_TEST_DATA") or beside)
    return folder if (folder / "malc").is_dir() else None


def real_dataset(name: str) -> Path:
    """A real dataset; the test is skipped, with the reason, where there is none."""
    folder = find_real_data()
    if folder is None:
        pytest.skip("no real scans: set TLSEG_TEST_DATA or put them in ../shared/data")
    return folder / name

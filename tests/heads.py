"""Tiny labelled heads to train on, and a recipe small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.train.dataset import default_protocol
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.synth import Mix

PROTOCOL = default_protocol()
PARCELS = {"weight": 1.0, "real": 1.0, "protocol": "braincolor", "images": ["T1w"]}


def blob_head(path: Path, scale: float = 1.0) -> None:
    """A label map in which every paired structure is a ball on its own side, 2 mm voxels."""
    labels = np.zeros((48, 48, 48), np.int16)
    grid = np.stack(np.meshgrid(*[(np.arange(48) - 23.5) * 2] * 3, indexing="ij"), -1)
    labels[np.linalg.norm(grid, axis=-1) < 44 * scale] = 24
    rng = np.random.default_rng(0)
    for left, right in PROTOCOL.pairs():
        centre = np.array([-20, *rng.uniform(-22, 22, 2)])
        for label, side in ((left, 1), (right, -1)):
            ball = np.linalg.norm(grid - centre * [side, 1, 1] * scale, axis=-1) < 7 * scale
            labels[ball] = label
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(labels, np.diag([2.0, 2, 2, 1])), path)


def write_heads(root: Path) -> Path:
    """The dataset `balls` of two label maps under `root`."""
    for number, scale in enumerate((1.0, 0.9)):
        name = f"sub-0{number}"
        blob_head(root / "balls" / name / "anat" / f"{name}_seg-head_dseg.nii.gz", scale)
    describe(root, "balls", "CC0-1.0")
    return root


def write_parcels(heads: Path) -> Path:
    """The dataset `parcels` beside `balls`: one scan with BrainCOLOR labels and its image."""
    mapping = load_mapping("braincolor_to_aseg")
    back = {target: source for source, target in reversed(mapping.pairs.items())}
    source = nib.load(heads / "balls" / "sub-00" / "anat" / "sub-00_seg-head_dseg.nii.gz")
    labels = np.vectorize(lambda i: max(back.get(i, 0), 0))(np.asarray(source.dataobj))
    folder = heads / "parcels" / "sub-01" / "anat"
    folder.mkdir(parents=True)
    nib.save(nib.Nifti1Image(labels.astype(np.int16), source.affine),
             folder / "sub-01_seg-braincolor_dseg.nii.gz")  # fmt: skip
    nib.save(nib.Nifti1Image((labels > 0).astype(np.float32) + labels / 200, source.affine),
             folder / "sub-01_T1w.nii.gz")  # fmt: skip
    describe(heads, "parcels", "CC-BY-NC-3.0")
    return heads


def describe(root: Path, name: str, licence: str) -> None:
    """The dataset's ``dataset_description.json``."""
    (root / name / "dataset_description.json").write_text(
        json.dumps({"Name": name.title(), "BIDSVersion": "1.10.0", "License": licence})
    )


def tiny_recipe() -> Recipe:
    """A segmenter on `balls`."""
    return Recipe(
        name="tiny", role="segmenter", protocol="aseg",
        network={"network": "unet", "features": [4, 8], "stem": 2, "prior_channels": 33},
        patch=16, spacing_mm=2.0, box_mm=[[-48, 48]] * 3, datasets={"balls": {}},
        steps=6, warmup=2, checkpoint_every=3, learning_rate=1e-2, mix=Mix(thick_slices=0.5),
    )  # fmt: skip

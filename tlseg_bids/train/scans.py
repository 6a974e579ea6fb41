"""Labelled scans of a BIDS dataset, read for training."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from tlseg_bids.bids.age import AgeReader
from tlseg_bids.bids.names import DERIVATIVE_ENTITIES, entities_of
from tlseg_bids.bids.scan import Age
from tlseg_bids.errors import DataError, NoInputError, UsageError, amount
from tlseg_bids.grid import Grid, difference
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import IGNORE, Classes, Sample, default_protocol, load_classes
from tlseg_bids.volume import Volume, load_labels, load_volume
from tlseg_bids.zoo.card import age_in_years

MARGIN = 4
"""Voxels kept around what is labelled."""


def load_dataset(root: Path, name: str, rules: dict[str, Any]) -> list[Sample]:
    """Every labelled scan of a BIDS dataset, in the order of RAS+ and cropped to its labels.

    Parameters
    ----------
    root : Path
        The dataset.
    rules : dict
        From the recipe: ``protocol`` (of the labels; the template's if not given), ``labels``
        (folder of the derivative), ``merge`` (pairs of protocol
        labels that this dataset does not tell apart, [absent, merged into]), ``ignore`` (labels
        of which nothing is known), ``fill`` (protocol label of unlabelled voxels inside the
        image), ``images`` (suffixes), ``moved`` (see `moved_back`; by ``sub-01_T2w``).

    Raises
    ------
    NoInputError
        If there is no label map, or an image of one is not there.
    ScanError, DataError
        If a file is damaged, an image does not lie on the grid of its labels, a label is negative,
        or nothing is labelled.
    UsageError
        If ``moved`` names an image that is not there, or is not in mm along three axes.
    """
    protocol = load_protocol(rules["protocol"]) if "protocol" in rules else default_protocol()
    classes = load_classes(protocol)
    folder = root / rules.get("labels", ".")
    files = sorted(folder.glob("sub-*/**/*_dseg.nii.gz"))
    if not files:
        raise NoInputError(
            "no *_dseg.nii.gz found", folder,
            "check --data, and in the recipe the dataset's name and its labels",
        )  # fmt: skip
    _check_names(files)
    channel = {int(i): c for c, i in enumerate(protocol.indices)}
    group = np.arange(len(protocol))
    for absent, into in rules.get("merge", []):
        group[group == group[channel[absent]]] = group[channel[into]]
    samples, ages, moves = [], AgeReader(root), dict(rules.get("moved", {}))
    for file in files:
        labels, stem = load_labels(file), stem_of(file)
        paths = {suffix: _image(root, stem, suffix) for suffix in rules.get("images", [])}
        images = {suffix: _read(path, labels.grid) for suffix, path in paths.items()}
        numbers, affine = _canonical(labels)
        numbers = _class_numbers(numbers, file, classes, rules.get("ignore", []))
        if "fill" in rules:
            inside = np.any([i > 0 for i in images.values()], axis=0)
            fill = int(np.flatnonzero(classes.index == rules["fill"])[0])
            numbers[inside & (numbers == 0)] = fill
        for suffix in [suffix for suffix in images if f"{stem}_{suffix}" in moves]:
            by = moves.pop(f"{stem}_{suffix}")
            images[suffix] = moved_back(images[suffix], by, np.linalg.norm(affine[:3, :3], axis=0))
        box = _crop(numbers)
        shift = np.eye(4)
        shift[:3, 3] = [s.start for s in box]
        entities = dict(pair.split("-", 1) for pair in stem.split("_"))
        samples.append(Sample(
            stem, name, torch.from_numpy(numbers[box].copy()),
            {k: torch.from_numpy(v[box].copy()) for k, v in images.items()},
            affine @ shift, group, _hash([file, *paths.values()]), protocol,
            age_years=_years(ages.age(file, entities)),
        ))  # fmt: skip
    if moves:
        raise UsageError(
            f"images that are to be moved are not there: {', '.join(moves)}",
            f"recipe, datasets.{name}.moved", "write sub-LABEL_SUFFIX of images that it names",
        )  # fmt: skip
    return samples


def stem_of(file: Path) -> str:
    """What a label map and its images have in common: ``sub-01_ses-2`` of their names."""
    own = entities_of(file).items()
    return "_".join(f"{key}-{label}" for key, label in own if key not in DERIVATIVE_ENTITIES)


def subject_of(name: str) -> str:
    """``sub-01`` of ``sub-01_ses-2``."""
    return name.split("_", 1)[0]


def _check_names(files: Iterable[Path]) -> None:
    """Refuse two label maps of the same images."""
    known: dict[str, Path] = {}
    for file in files:
        other = known.setdefault(stem_of(file), file)
        if other is not file:
            raise DataError(
                f"{other.name} and {file.name} both label {stem_of(file)}", file.parent,
                "keep one of them, or name the derivative that holds one in the recipe (labels)",
            )  # fmt: skip


def _image(root: Path, stem: str, suffix: str) -> Path:
    """The image that goes with a label map."""
    folder = root / subject_of(stem)
    found = sorted(folder.glob(f"**/{stem}_{suffix}.nii*"))
    if not found:
        raise NoInputError(
            f"{stem} is labelled and has no image {stem}_{suffix}.nii.gz", folder,
            "bring it, remove its labels, or name other images in the recipe",
        )  # fmt: skip
    return found[0]


def _read(path: Path, grid: Grid) -> np.ndarray:
    """An image that has to lie on the grid of its labels, in the order of RAS+."""
    image = load_volume(path)
    apart = difference(image.grid, grid)
    if apart:
        raise DataError(
            f"the labels lie on another grid than the image: {apart}", path,
            "resample the labels to the image (nearest neighbour)",
        )  # fmt: skip
    return _canonical(image)[0]


def _canonical(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Voxels in the order of RAS+, and their affine."""
    image = nib.as_closest_canonical(nib.Nifti1Image(volume.data, volume.grid.affine))
    return np.asarray(image.dataobj), image.affine


def _class_numbers(
    labels: np.ndarray, file: Path, classes: Classes, ignored: Sequence[int]
) -> np.ndarray:
    """Class numbers (I, J, K) uint8 of the labels, `IGNORE` for those of which nothing is known."""
    if labels.min() < 0:
        raise DataError(
            f"{amount(np.count_nonzero(labels < 0), 'voxel has', 'voxels have')} a negative label, "
            f"down to {labels.min()}", file, "write 0 where nothing is labelled",
        )  # fmt: skip
    lut = np.zeros(labels.max() + 1, np.uint8)
    for number, index in enumerate(classes.index):
        if index < len(lut):
            lut[index] = number
    for index in ignored:
        if index < len(lut):
            lut[index] = IGNORE
    numbers = lut[labels]
    if not numbers.any():
        raise DataError(
            "no structure of the protocol is labelled", file,
            "label it, remove the file, or name the protocol of its labels in the recipe",
        )  # fmt: skip
    return numbers


def _crop(numbers: np.ndarray) -> tuple[slice, ...]:
    return tuple(
        slice(max(int(hit.min()) - MARGIN, 0), int(hit.max()) + 1 + MARGIN)
        for hit in np.nonzero(numbers)
    )


def moved_back(image: np.ndarray, by_mm: Sequence[float], voxel_mm: Sequence[float]) -> np.ndarray:
    """An image put where its labels are, (I, J, K) float32, by trilinear interpolation.

    A visit's images share one label map, and where one of them was registered a little beside it, a
    network learns a border that lies nowhere.

    Parameters
    ----------
    image : (I, J, K)
        In the order of RAS+.
    by_mm : three floats
        How far it lies beside the labels along its own axes: to the right, the front and the top.
    voxel_mm : three floats
        Its voxel size.

    Raises
    ------
    UsageError
        If `by_mm` is not three finite numbers.
    """
    if np.shape(by_mm) != (3,) or not np.isfinite(by_mm).all():
        raise UsageError(
            f"{by_mm!r} is no way to move an image", "recipe, moved of a dataset",
            "write three numbers of mm: [x, y, z]",
        )  # fmt: skip
    voxels = np.divide(by_mm, voxel_mm)
    return ndimage.shift(image, -voxels, order=1, mode="constant", cval=float(image.min()))


def _hash(files: Iterable[Path]) -> str:
    """SHA-256 of the files one after another."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _years(age: Age) -> float:
    years = age_in_years(age)
    return math.nan if years is None else years

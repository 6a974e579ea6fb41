"""The damages of `damage.py`: what scanners, patients and converters do to a scan."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import nibabel as nib
import numpy as np
from scipy import ndimage
from slices import thicker


def noise(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Rician noise of 20 % of the mean of what is not background.

    Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618.
    """
    data, inside = _data(image)
    sd = 0.2 * data[inside].mean()
    real, other = (sd * rng.standard_normal(data.shape, np.float32) for _ in range(2))
    return _like(image, _kept(np.hypot(data + real, other), data))


def motion(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """The head takes six poses while k-space is filled, turns of sd 4° and shifts of sd 3 mm.

    Shaw et al. 2019, https://proceedings.mlr.press/v102/shaw19a.html.
    """
    data, _ = _data(image)
    axis = int(rng.integers(3))
    spectrum = np.zeros(data.shape, np.complex64)
    edges = np.linspace(0, data.shape[axis], 7).astype(int)
    spacing = np.array(image.header.get_zooms()[:3], float)
    for first, last in pairwise(edges):
        x, y, z = np.radians(rng.normal(0, 4, 3))
        turn = np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turn = np.diag(1 / spacing) @ turn @ np.diag(spacing)
        middle = (np.array(data.shape) - 1) / 2
        shift = middle - turn @ middle + rng.normal(0, 3, 3) / spacing
        pose = ndimage.affine_transform(data, turn, shift, order=1, mode="nearest")
        lines = (slice(None),) * axis + (slice(first, last),)
        spectrum[lines] = np.fft.fftshift(np.fft.fft(pose, axis=axis), axes=axis)[lines]
    moved = np.abs(np.fft.ifft(np.fft.ifftshift(spectrum, axes=axis), axis=axis))
    return _like(image, _kept(moved.astype(np.float32), data))


def wrap(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """A field of view of 80 % of the object along one axis: what is outside folds over."""
    data, inside = _data(image)
    axis = int(rng.integers(3))
    low, high = _extent(inside, axis)
    size = round(0.8 * (high - low))
    start = low + (high - low - size) // 2
    folded = np.zeros((*data.shape[:axis], size, *data.shape[axis + 1 :]), np.float32)
    for first in range(start - size, data.shape[axis], size):
        begin, end = max(first, 0), min(first + size, data.shape[axis])
        if begin < end:
            into = (slice(None),) * axis + (slice(begin - first, end - first),)
            folded[into] += np.take(data, range(begin, end), axis)
    return _moved(image, folded, axis, start)


def crop(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """The slab ends 25 % of the object's length before the object does, at one of its ends."""
    data, inside = _data(image)
    axis = int(rng.integers(3))
    low, high = _extent(inside, axis)
    cut = round(0.25 * (high - low))
    first, last = (low + cut, data.shape[axis]) if rng.random() < 0.5 else (0, high - cut)
    return _moved(image, np.take(data, range(first, last), axis), axis, first)


def thick(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Slices of 6 to 7 mm along one axis: means of the thin ones."""
    axis = int(rng.integers(3))
    return thicker(image, axis, int(np.ceil(6 / image.header.get_zooms()[axis])))


def header(image: nib.Nifti1Image, rng: np.random.Generator) -> nib.Nifti1Image:
    """Two axes of the header swapped, or front and back, or head and feet."""
    swap = np.eye(4)
    change = int(rng.integers(4))
    if change < 2:
        swap = swap[:, [0, 2, 1, 3] if change else [1, 0, 2, 3]]
    else:
        swap[change - 1, change - 1] = -1
    return _with_affine(np.asanyarray(image.dataobj), swap @ image.affine)


def age(image: nib.Nifti1Image, _: np.random.Generator) -> nib.Nifti1Image:
    """The image stays; `damage.copies` writes a wrong age."""
    return image


DAMAGES: dict[str, Callable[[nib.Nifti1Image, np.random.Generator], nib.Nifti1Image]] = {
    "noise": noise, "motion": motion, "wrap": wrap, "crop": crop, "thick": thick,
    "header": header, "age": age,
}  # fmt: skip


def _data(image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """Intensities, and where they are no background (above 10 % of the 99th percentile)."""
    data = image.get_fdata(dtype=np.float32).reshape(image.shape[:3])
    return data, data > 0.1 * np.percentile(data[data > data.min()], 99)


def _kept(damaged: np.ndarray, data: np.ndarray) -> np.ndarray:
    """A constant background stays: such scans were stripped after they were made."""
    corner = data[0, 0, 0]
    return np.where(data == corner, corner, damaged) if (data == corner).mean() > 0.3 else damaged


def _extent(inside: np.ndarray, axis: int) -> tuple[int, int]:
    there = np.flatnonzero(inside.sum(axis=tuple(a for a in range(3) if a != axis)) > 20)
    return int(there[0]), int(there[-1]) + 1


def _like(image: nib.Nifti1Image, data: np.ndarray) -> nib.Nifti1Image:
    return _with_affine(data, image.affine)


def _moved(image: nib.Nifti1Image, data: np.ndarray, axis: int, start: int) -> nib.Nifti1Image:
    step = np.eye(4)
    step[axis, 3] = start
    return _with_affine(data, image.affine @ step)


def _with_affine(data: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    image = nib.Nifti1Image(data.astype(np.float32), affine)
    image.set_sform(affine, 1)
    image.set_qform(None, 0)
    return image

"""Intensities of any scanner to one range.

The unit of an MR scan is arbitrary, so a scan is scaled between two of its own percentiles. Where
the background is exactly one value (a skull-stripped or a defaced scan), it is left out of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.volume import Volume

PERCENTILES = (1, *range(10, 100, 10), 99)

_SAMPLE = 2_000_000
_LEAST = 1e-6
_OFFSET_SHARE = 0.1
"""Of a scan's range: a background that lies nearer to 0 stays where it is."""


def from_zero(volume: Volume) -> Volume:
    """A scan whose intensities are counted from its background.

    Whatever looks at a scan takes 0 for nothing, also beyond the scan's faces. A rescale
    intercept or standardised intensities put the background elsewhere.

    Parameters
    ----------
    volume : Volume
        Intensities of any unit.

    Returns
    -------
    Volume
        The same object where the background is about 0, as in nearly every scan, and where a scan
        that ends inside the head shows none. The background is the constant one (see
        `constant_background`), else the darkest of the voxels but 1 in 200, if most voxels of the
        scan's faces are as dark.
    """
    zero, high = np.percentile(_sample(volume.data, None), (0.5, 99.5))
    most = _OFFSET_SHARE * (high - zero)
    if abs(zero) <= most:
        return volume
    background = constant_background(volume.data)
    if background is None and np.median(_faces(volume.data)) - zero <= most:
        background = zero
    if background is None or abs(background) <= most:
        return volume
    return Volume(volume.data - np.float32(background), volume.grid)


def _faces(data: np.ndarray) -> np.ndarray:
    """The voxels of the six faces, (n,)."""
    return np.concatenate([data.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])


def robust_scale(
    data: np.ndarray, low: float = 0.5, high: float = 99.5, mask: np.ndarray | None = None
) -> np.ndarray:
    """Scale so that percentile `low` becomes 0 and `high` becomes 1, clipped to 0 and 1.

    Parameters
    ----------
    data : ndarray
        Intensities, any shape and unit.
    low, high : float
        Percentiles, 0 to 100.
    mask : ndarray of bool, optional
        Voxels that count for the percentiles; if not given, every voxel that is not exactly the
        background (see `constant_background`).

    Returns
    -------
    ndarray of float32
        Same shape, 0 to 1. A constant image becomes 0. The constant background is 0 too,
        whatever its value was.
    """
    data = np.asarray(data, np.float32)
    background = constant_background(data)
    sample = _sample(data, mask)
    if mask is None and background is not None:
        sample = sample[sample != background]
    if sample.size == 0:
        return np.zeros_like(data)
    bottom, top = np.percentile(sample, (low, high))
    if not top > bottom:
        bottom, top = float(sample.min()), float(sample.max())
    if not top > bottom:
        return np.zeros_like(data)
    out = data - np.float32(bottom)
    out *= np.float32(1 / (top - bottom))
    np.clip(out, 0, 1, out=out)
    if background is not None:
        out[data == background] = 0
    return out


def scaled(
    data: Tensor, low: float = 0.5, high: float = 99.5, mask: Tensor | None = None
) -> Tensor:
    """`robust_scale` of a float32 tensor in one block of memory, on the device on which it lies.

    On a processor NumPy does it, in a quarter of the time that one thread of PyTorch takes.
    """
    if data.device.type == "cpu":
        own = None if mask is None else mask.numpy()
        return torch.from_numpy(robust_scale(data.numpy(), low, high, own))
    background = _background(data)
    sample = data.reshape(-1) if mask is None else data[mask]
    sample = sample[:: max(1, len(sample) // _SAMPLE) | 1]
    if mask is None and background is not None:
        sample = sample[sample != background]
    if not len(sample):
        return torch.zeros_like(data)
    bottom, top = _percentile(sample, low), _percentile(sample, high)
    if not top > bottom:
        bottom, top = float(sample.min()), float(sample.max())
    if not top > bottom:
        return torch.zeros_like(data)
    out = (data - bottom).mul_(float(np.float32(1 / (top - bottom)))).clamp_(0, 1)
    if background is not None:
        out.masked_fill_(data == background, 0)
    return out


def standard_landmarks(images: Iterable[np.ndarray]) -> np.ndarray:
    """The standard scale of some scans: mean landmarks (11,) from 0 to 1.

    Landmarks are the percentiles 1, 10, 20, …, 90 and 99 of the voxels above 0; before the mean is
    taken each scan's first and last are put at 0 and 1. Source: Nyúl et al. 2000,
    doi:10.1109/42.836373.
    """
    found = [_percentiles(image) for image in images]
    return np.mean([(p - p[0]) / max(p[-1] - p[0], _LEAST) for p in found], axis=0)


def standardise(image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """Intensities on the standard scale: linear between landmarks, and on beyond them.

    Parameters
    ----------
    image : ndarray
        Any shape and unit; voxels of 0 or less are background and become 0.
    landmarks : ndarray, shape (11,)
        As `standard_landmarks` gives.

    Returns
    -------
    ndarray of float32
        Never below 0.
    """
    data, inside = np.asarray(image, np.float32), np.asarray(image) > 0
    if not inside.any():
        return np.zeros_like(data)
    own = np.maximum.accumulate(_percentiles(data) + np.arange(len(PERCENTILES)) * _LEAST)
    slope = (landmarks[-1] - landmarks[-2]) / max(own[-1] - own[-2], _LEAST)
    first = (landmarks[1] - landmarks[0]) / max(own[1] - own[0], _LEAST)
    out = np.interp(data, own, landmarks)
    out += np.maximum(data - own[-1], 0) * slope - np.maximum(own[0] - data, 0) * first
    return np.where(inside, np.maximum(out, 0), 0).astype(np.float32)


def _percentiles(image: np.ndarray) -> np.ndarray:
    inside = image[image > 0]
    return np.percentile(_sample(inside, None), PERCENTILES) if inside.size else np.zeros(11)


def normalise(image: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """`robust_scale` with its default percentiles."""
    return robust_scale(image, mask=mask)


def constant_background(data: np.ndarray, share: float = 0.05) -> float | None:
    """The exact value that fills the background, or None if the background is noise.

    Parameters
    ----------
    data : ndarray, at least 3 voxels along each axis
    share : float
        Least share of all voxels that must hold the value.

    Notes
    -----
    It is the commonest value on the faces of the array; on a scan with noise no single value fills
    this share of the volume.
    """
    values, counts = np.unique(outer_faces(data), return_counts=True)
    value = values[np.argmax(counts)]
    return float(value) if np.mean(data == value) >= share else None


def _background(data: Tensor, share: float = 0.05) -> float | None:
    """`constant_background` of a tensor."""
    ends = [data.select(axis, end) for axis in range(data.ndim) for end in (0, -1)]
    faces = torch.cat([one.reshape(-1) for one in ends])
    values, counts = faces.unique(return_counts=True)
    value = values[counts == counts.max()][0]
    return float(value) if float((data == value).float().mean()) >= share else None


def _percentile(sample: Tensor, percent: float) -> float:
    """`numpy.percentile` of a sample (n,): linear between the two values around it."""
    place = percent / 100 * (len(sample) - 1)
    below = int(place)
    near, far = (float(sample.kthvalue(k + 1).values) for k in (below, int(np.ceil(place))))
    return near + (place - below) * (far - near)


def outer_faces(data: np.ndarray) -> np.ndarray:
    """Every voxel of the two outermost layers along each axis, in one row."""
    views = [np.moveaxis(data, axis, 0)[end] for axis in range(data.ndim) for end in (0, -1)]
    return np.concatenate([view.ravel() for view in views])


def _sample(data: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """At most about `_SAMPLE` voxels, evenly spread (percentiles of 512³ need no more)."""
    flat = data.ravel(order="K") if mask is None else data[np.asarray(mask, bool)]
    step = max(1, flat.size // _SAMPLE)
    return flat[:: step | 1]

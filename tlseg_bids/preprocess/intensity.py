"""Intensities of any scanner to one range.

The unit of an MR scan is arbitrary, so a scan is scaled between two of its own percentiles. Where
the background is exactly one value (a skull-stripped or a defaced scan), it is left out of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.background import CONSTANT_SHARE, constant_background, spread

PERCENTILES = (1, *range(10, 100, 10), 99)

_LEAST = 1e-6


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
    sample = spread(data.ravel(order="K") if mask is None else data[np.asarray(mask, bool)])
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
    sample = spread(data.reshape(-1) if mask is None else data[mask])
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
    return np.percentile(spread(inside), PERCENTILES) if inside.size else np.zeros(11)


def _background(data: Tensor) -> float | None:
    """`constant_background` of a tensor."""
    ends = [data.select(axis, end) for axis in range(data.ndim) for end in (0, -1)]
    faces = torch.cat([one.reshape(-1) for one in ends])
    values, counts = faces.unique(return_counts=True)
    value = values[counts == counts.max()][0]
    return float(value) if float((data == value).float().mean()) >= CONSTANT_SHARE else None


def _percentile(sample: Tensor, percent: float) -> float:
    """`numpy.percentile` of a sample (n,): linear between the two values around it."""
    place = percent / 100 * (len(sample) - 1)
    below = int(place)
    near, far = (float(sample.kthvalue(k + 1).values) for k in (below, int(np.ceil(place))))
    return near + (place - below) * (far - near)

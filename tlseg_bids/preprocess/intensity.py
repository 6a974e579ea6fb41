"""Intensities of any scanner to one range.

The unit of an MR scan is arbitrary, so a scan is scaled between two of its own percentiles. Where
the background is exactly one value (a skull-stripped or a defaced scan), it is left out of them.
"""

from __future__ import annotations

import numpy as np

_SAMPLE = 2_000_000


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


def outer_faces(data: np.ndarray) -> np.ndarray:
    """Every voxel of the two outermost layers along each axis, in one row."""
    views = [np.moveaxis(data, axis, 0)[end] for axis in range(data.ndim) for end in (0, -1)]
    return np.concatenate([view.ravel() for view in views])


def _sample(data: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """At most about `_SAMPLE` voxels, evenly spread (percentiles of 512³ need no more)."""
    flat = data.ravel(order="K") if mask is None else data[np.asarray(mask, bool)]
    step = max(1, flat.size // _SAMPLE)
    return flat[:: step | 1]

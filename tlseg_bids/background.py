"""Which intensity of a scan shows nothing, and a scan counted from it."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

_Row = TypeVar("_Row")

CONSTANT_SHARE = 0.05
"""Of all voxels: the least that one value fills where it is the background."""
_SAMPLE = 2_000_000
_OFFSET_SHARE = 0.1
"""Of a scan's range: a background that lies nearer to 0 stays where it is."""


def from_zero(data: np.ndarray) -> np.ndarray:
    """Intensities counted from the background.

    Whatever looks at a scan takes 0 for nothing, also beyond the scan's faces. A rescale
    intercept or standardised intensities put the background elsewhere.

    Parameters
    ----------
    data : ndarray of float32, shape (I, J, K)
        Intensities of any unit.

    Returns
    -------
    ndarray of float32, shape (I, J, K)
        The same object where the background is about 0, as in nearly every scan, and where a scan
        that ends inside the head shows none. The background is the constant one (see
        `constant_background`), else the darkest of the voxels but 1 in 200, if most voxels of the
        scan's faces are as dark.
    """
    zero, high = np.percentile(spread(data.ravel(order="K")), (0.5, 99.5))
    most = _OFFSET_SHARE * (high - zero)
    if abs(zero) <= most:
        return data
    background = constant_background(data)
    if background is None and np.median(outer_faces(data)) - zero <= most:
        background = zero
    if background is None or abs(background) <= most:
        return data
    return data - np.float32(background)


def constant_background(data: np.ndarray) -> float | None:
    """The exact value that fills the background, or None if the background is noise.

    Parameters
    ----------
    data : ndarray, at least 3 voxels along each axis

    Notes
    -----
    It is the commonest value on the faces of the array; on a scan with noise no single value fills
    `CONSTANT_SHARE` of the volume.
    """
    values, counts = np.unique(outer_faces(data), return_counts=True)
    value = values[np.argmax(counts)]
    return float(value) if np.mean(data == value) >= CONSTANT_SHARE else None


def outer_faces(data: np.ndarray) -> np.ndarray:
    """Every voxel of the faces of an array, in one row."""
    views = [np.moveaxis(data, axis, 0)[end] for axis in range(data.ndim) for end in (0, -1)]
    return np.concatenate([view.ravel() for view in views])


def spread(row: _Row) -> _Row:
    """At most about `_SAMPLE` of an array or tensor (n,), evenly spread.

    Percentiles of 512³ voxels need no more.
    """
    return row[:: max(1, len(row) // _SAMPLE) | 1]

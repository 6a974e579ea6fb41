"""How good the image is in which the brain was labelled: noise, contrast, sharpness, motion, cover.

Everything is measured inside the brain, on the scan's own grid: a skull-stripped scan has no air
around it from which noise and ghosts could be read.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess.cleaning import bounding_box
from tlseg_bids.postprocess.quality import OUTER_FLUID
from tlseg_bids.volume import Volume

LEAST_VOXELS = 500
MOST_BELOW_ZERO = 0.1
"""Share of the brain: where more of it is negative, 0 is no absence of signal."""
_MAD = 0.6745  # median of |x| of a normal distribution with standard deviation 1


def image_quality(
    scan: Volume, labels: np.ndarray, mask: np.ndarray, protocol: LabelProtocol
) -> dict[str, float]:
    """Quality scores of a scan, as far as it can be measured.

    Parameters
    ----------
    scan : Volume
        Intensities (I, J, K), any unit.
    labels, mask : ndarray, shape (I, J, K)
        Indices of the protocol, and the brain as bool.
    protocol : LabelProtocol
        Its groups ``cortex`` and ``white-matter`` are the two tissues.

    Returns
    -------
    dict
        Without a score for which there are fewer than `LEAST_VOXELS` voxels.

        ``snr``: mean of white matter ÷ standard deviation of the noise in it; not of intensities
        that were standardised inside the brain, of which more than `MOST_BELOW_ZERO` is negative.
        ``cnr``: |mean of white matter − mean of cortex| ÷ that noise; Magnotta & Friedman 2006,
        doi:10.1007/s10278-006-0264-x.
        ``cjv``: (standard deviation of white matter + that of cortex) ÷ |difference of their
        means|, large with motion and bias fields; Ganzetti et al. 2016,
        doi:10.3389/fninf.2016.00010.
        ``fwhm_mm``: full width at half maximum of the smoothness, of the axis with the largest;
        Forman et al. 1995, doi:10.1002/mrm.1910330508.
        ``noise_direction``: noise along the axis with most of it ÷ that along the axis in the
        middle; motion while k-space is filled shows along the phase-encoding axis.
        ``explained``: share of the variance inside the brain that the labels explain, 0 to 1 (the
        square of the correlation ratio): low where labels do not lie where the image has tissues.
        ``cut_mm2``: area of the brain, without the fluid around it, on that outer face of the
        scan where it is largest.

        Noise is the median absolute finest Haar coefficient ÷ 0.6745, after Donoho & Johnstone
        1994, doi:10.1093/biomet/81.3.425.
    """
    scores = {"cut_mm2": cut_mm2(mask, scan.grid.spacing_mm)}
    if scores["cut_mm2"]:
        fluid = np.isin(labels, protocol.indices[protocol.channels(group=OUTER_FLUID)])
        scores["cut_mm2"] = cut_mm2(mask & ~fluid, scan.grid.spacing_mm)
    box = bounding_box(mask, margin=1)
    data, names, inside = scan.data[box].astype(np.float64), labels[box], mask[box]
    white, grey = (
        np.isin(names, protocol.indices[protocol.channels(group=group)])
        for group in ("white-matter", "cortex")
    )
    if min(np.count_nonzero(white), np.count_nonzero(grey)) < LEAST_VOXELS:
        return scores
    scores["explained"] = explained(data[inside], names[inside])
    contrast = abs(data[white].mean() - data[grey].mean())
    pure = ndimage.binary_erosion(white)
    pure = pure if np.count_nonzero(pure) >= LEAST_VOXELS else white
    noise = haar_noise(data, pure, (0, 1, 2))
    if noise and np.mean(data[inside] < 0) <= MOST_BELOW_ZERO:
        scores["snr"] = float(data[pure].mean() / noise)
    if noise:
        scores["cnr"] = float(contrast / noise)
    if contrast:
        scores["cjv"] = float((data[white].std() + data[grey].std()) / contrast)
    along = sorted(haar_noise(data, pure, (axis,)) for axis in range(3))
    if along[1]:
        scores["noise_direction"] = along[2] / along[1]
    scores["fwhm_mm"] = max(smoothness_mm(data, inside, scan.grid.spacing_mm))
    return scores


def explained(values: np.ndarray, names: np.ndarray) -> float:
    """Variance between groups ÷ variance of all values, 0 to 1; both of shape (n,)."""
    _, group = np.unique(names, return_inverse=True)
    count, total = np.bincount(group), values.var()
    means = np.bincount(group, values) / count
    return float(count @ (means - values.mean()) ** 2 / len(values) / total) if total else 0.0


def cut_mm2(mask: np.ndarray, spacing_mm: np.ndarray) -> float:
    """Area of a mask (I, J, K) on the outer face of the array where it is largest, mm²."""
    areas = []
    for axis in range(3):
        pixel = float(np.prod(np.delete(spacing_mm, axis)))
        areas += [pixel * int(np.take(mask, end, axis).sum()) for end in (0, -1)]
    return max(areas)


def haar_noise(data: np.ndarray, mask: np.ndarray, axes: tuple[int, ...]) -> float:
    """Standard deviation of the noise: finest Haar differences along `axes`, means along the rest.

    Parameters
    ----------
    data, mask : ndarray, shape (I, J, K)
        Intensities, and where they count (blocks of 2 × 2 × 2 voxels that lie in it entirely).
    axes : tuple of int

    Returns
    -------
    float
        In the unit of the data; 0 where no block lies inside.
    """
    for axis in range(3):
        one, other = neighbours(data, axis)
        data = (other - one if axis in axes else other + one) * 0.5**0.5
        mask = np.logical_and(*neighbours(mask, axis))
    return float(np.median(np.abs(data[mask])) / _MAD) if mask.any() else 0.0


def smoothness_mm(data: np.ndarray, mask: np.ndarray, spacing_mm: np.ndarray) -> list[float]:
    """Full width at half maximum along each axis, mm, of a field as smooth as the data.

    With r the correlation of neighbours d apart it is d · √(−2 ln 2 ÷ ln r): Forman et al. 1995,
    doi:10.1002/mrm.1910330508. 0 where neighbours are not correlated.
    """
    variance, out = float(data[mask].var()), []
    for axis in range(3):
        here, beyond = neighbours(data, axis)
        step = (beyond - here)[np.logical_and(*neighbours(mask, axis))]
        r = 1 - float((step**2).mean()) / (2 * variance) if variance and step.size else 0.0
        width = np.sqrt(-2 * np.log(2) / np.log(r)) if 0 < r < 1 else 0.0
        out.append(float(spacing_mm[axis] * width))
    return out


def neighbours(data: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The voxels that have a next one along an axis, and those next ones; views."""
    before = (slice(None),) * axis
    return data[(*before, slice(None, -1))], data[(*before, slice(1, None))]

"""A scan and its labels turned for the eye: closest canonical axes, a grey window, millimetres.

Axes of everything here run to the Right, Anterior and Superior (RAS+), by the header alone: the
voxels are reordered, never interpolated, so an oblique scan is shown in its own slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.volume import MAX_SPACING_MM, MIN_SPACING_MM

SAMPLES = 200_000
MARGIN_MM = 12.0
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, eq=False)
class Display:
    """What the figures and the viewer draw.

    Parameters
    ----------
    image : ndarray or None, shape (I, J, K)
        Stored intensities in RAS+ order, any number type; None if the scan is not on disk.
    channels : ndarray, shape (I, J, K), uint8 or uint16
        Row of the protocol for every voxel, 0 for background and for labels it does not know.
    affine : ndarray, shape (4, 4)
        Voxel index of this order → RAS+ mm.
    window : tuple of float
        Intensities shown as black and as white.
    core : tuple of slice
        The labelled region; the whole volume if nothing is labelled.
    box : tuple of slice
        The same with a margin.
    """

    image: np.ndarray | None
    channels: np.ndarray
    affine: np.ndarray
    window: tuple[float, float]
    core: Box
    box: Box

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between voxel centres along R, A, S in mm, shape (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def oblique_degrees(self) -> float:
        """Largest angle between a voxel axis and its closest world axis."""
        return float(np.degrees(nib.affines.obliquity(self.affine)).max())

    def grey(self, part: np.ndarray) -> np.ndarray:
        """Intensities of `part` as uint8 through the window; NaN becomes black."""
        low, high = self.window
        scaled = (part.astype(np.float32) - low) * (255.0 / (high - low))
        return np.nan_to_num(scaled, nan=0.0).clip(0, 255).astype(np.uint8)


def load_display(dseg: Path, image: Path | None, protocol: LabelProtocol) -> Display:
    """Read a dseg and, if it is there, its scan.

    Raises
    ------
    DataError
        If the dseg cannot be read. A scan that cannot be read, or has another shape, is left out.
    """
    try:
        labels_image = nib.load(dseg)
        labels = np.asanyarray(labels_image.dataobj)
        orientation = nib.io_orientation(labels_image.affine)
        affine = labels_image.affine @ nib.orientations.inv_ornt_aff(orientation, labels.shape)
    except Exception as error:
        raise DataError(f"not readable: {error}", dseg, "run the scan again") from error
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    plausible = labels.ndim == 3 and (spacing >= MIN_SPACING_MM).all()
    if not plausible or spacing.max() > MAX_SPACING_MM:
        raise DataError(
            f"shape {labels.shape} with voxels of {' × '.join(f'{s:.3g}' for s in spacing)} mm is "
            "no label map of a head", dseg, "run the scan again",
        )  # fmt: skip
    stored = None if image is None else _stored(image, labels.shape)
    channels = nib.apply_orientation(_channels(labels, protocol), orientation)
    turned = None if stored is None else nib.apply_orientation(stored, orientation)
    core = _labelled(channels)
    box = _grown(core, np.ceil(MARGIN_MM / spacing).astype(int), channels.shape)
    window = (0.0, 1.0) if turned is None else _window(turned, channels, box)
    return Display(turned, channels, affine, window, core, box)


def _stored(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Intensities as stored, with the sign of the header's slope; None if they do not fit."""
    try:
        proxy = nib.load(path).dataobj
        data = np.asanyarray(proxy.get_unscaled())
    except Exception:  # a report shows what there is: a scan that has gone is said in the page
        return None
    if data.ndim > 3 and set(data.shape[3:]) == {1}:
        data = data.reshape(data.shape[:3])
    if data.shape != shape or data.dtype.kind not in "iuf":
        return None
    return -data.astype(np.float32) if proxy.slope < 0 else data


def _channels(labels: np.ndarray, protocol: LabelProtocol) -> np.ndarray:
    """Protocol row of every voxel, a slab at a time (an index array of 512³ would be 1 GiB)."""
    rows = len(protocol)
    top = int(max(labels.max(initial=0), protocol.indices.max()))
    table = np.zeros(top + 1, np.uint8 if rows <= 256 else np.uint16)
    table[protocol.indices] = np.arange(rows)
    channels = np.empty_like(labels, dtype=table.dtype)
    for slab in range(labels.shape[2]):
        channels[..., slab] = table[np.maximum(labels[..., slab], 0).astype(np.intp)]
    return channels


def _labelled(channels: np.ndarray) -> Box:
    ranges = []
    filled = channels > 0
    for axis in range(3):
        line = np.flatnonzero(filled.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (line[0], line[-1] + 1) if line.size else (0, channels.shape[axis])
        ranges.append(slice(int(low), int(high)))
    return tuple(ranges)  # type: ignore[return-value]


def _grown(box: Box, margin: np.ndarray, shape: tuple[int, ...]) -> Box:
    return tuple(
        slice(max(span.start - int(more), 0), min(span.stop + int(more), size))
        for span, more, size in zip(box, margin, shape, strict=True)
    )  # type: ignore[return-value]


def _window(image: np.ndarray, channels: np.ndarray, box: Box) -> tuple[float, float]:
    """Black at the darkest of the box, white a little above the brightest of the brain."""
    step = max(1, round((np.prod([s.stop - s.start for s in box]) / SAMPLES) ** (1 / 3)))
    thin = tuple(slice(s.start, s.stop, step) for s in box)
    values = np.asarray(image[thin], np.float32)
    inside = values[(channels[thin] > 0) & np.isfinite(values)]
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low = float(np.percentile(values, 0.5))
    top = float(np.percentile(inside if inside.size > 50 else values, 99.5))
    return low, low + max((top - low) * 1.1, 1e-6)

"""Skull-stripped or whole head? The voxels are asked where the sidecar says nothing.

Three things set a stripped scan apart, and all three must hold:

- nearly every voxel on the outer faces of the scan has one and the same background value
  (a head reaches the lower face, and air is noise);
- what is not background is no larger than a brain;
- below its surface no dark layer follows. In a head, skull and air lie a few millimetres under the
  skin, whatever the contrast; under the surface of a brain lies brain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import ndimage

from tlseg_bids.background import outer_faces
from tlseg_bids.preprocess.geometry import block_means, in_memory_order
from tlseg_bids.volume import Volume

MIN_FACE_SHARE = 0.92
MAX_LITRES = 2.3
MIN_DARKEST_LAYER = 0.43

_COARSE_MM = 2.5
_BACKGROUND_TOLERANCE = 1e-3
_FOREGROUND = 0.03
_LAYER_MM = 3.0

Piece = tuple[tuple[slice, ...], np.ndarray]
"""A box, and which of its voxels belong to a piece."""


@dataclass(frozen=True, eq=False)
class SkullEvidence:
    """What `looks_skull_stripped` decides on, each measured when it is asked for.

    Parameters
    ----------
    volume : Volume
        The scan, its axes in the order of its memory.
    """

    volume: Volume

    @property
    def is_stripped(self) -> bool:
        """Whether all three speak for a brain without skull; what costs least is asked first."""
        return (
            self.face_share >= MIN_FACE_SHARE
            and self._litres_of(self._largest) <= MAX_LITRES
            and self.litres <= MAX_LITRES
            and self.darkest_layer >= MIN_DARKEST_LAYER
        )

    @cached_property
    def face_share(self) -> float:
        """Share of the voxels on the outer faces that hold the background value, 0 to 1."""
        tolerance = _BACKGROUND_TOLERANCE * max(self._top, 0.0)
        return float(np.mean(np.abs(self._faces - self._background) <= tolerance))

    @cached_property
    def litres(self) -> float:
        """Volume of the largest filled foreground piece."""
        return self._litres_of(self._filled)

    @cached_property
    def darkest_layer(self) -> float:
        """How dark it is under the surface.

        Lowest, over 3 mm layers from 3 to 21 mm under the surface, 15th percentile of brightness,
        as a share of the median brightness further inside.
        """
        (box, piece), (brightness, spacing) = self._filled, self._coarse
        return _darkest_layer(brightness[box], piece, spacing) if piece.size else 0.0

    @cached_property
    def _faces(self) -> np.ndarray:
        return outer_faces(self.volume.data)

    @cached_property
    def _background(self) -> float:
        """The most frequent value on the faces."""
        values, counts = np.unique(self._faces, return_counts=True)
        return float(values[counts.argmax()])

    @cached_property
    def _top(self) -> float:
        """Brightness of the brightest voxels but one in a hundred."""
        data = self.volume.data
        spread = data.reshape(-1)[:: max(1, data.size // 1_000_000) | 1]
        above = spread[spread > self._background]
        return float(np.percentile(above, 99)) - self._background if above.size else 0.0

    @cached_property
    def _coarse(self) -> tuple[np.ndarray, np.ndarray]:
        """Brightness over the background in blocks, and their spacing."""
        coarse, spacing = _block_means(self.volume.data, self.volume.grid.spacing_mm)
        return coarse - self._background, spacing

    @cached_property
    def _largest(self) -> Piece:
        if self._top <= 0:
            return (slice(0),) * 3, np.zeros((0, 0, 0), bool)
        return _largest(self._coarse[0] > _FOREGROUND * self._top)

    @cached_property
    def _filled(self) -> Piece:
        box, piece = self._largest
        return box, _filled(piece)

    def _litres_of(self, found: Piece) -> float:
        return float(found[1].sum() * np.prod(self._coarse[1]) / 1e6)


def looks_skull_stripped(volume: Volume) -> bool:
    """Whether the scan shows a brain without skull and skin.

    Parameters
    ----------
    volume : Volume
        A scan of any contrast; a defaced head is a head.
    """
    return skull_evidence(volume).is_stripped


def skull_evidence(volume: Volume) -> SkullEvidence:
    """The three things for a scan on any grid."""
    return SkullEvidence(in_memory_order(volume))


def _block_means(data: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of blocks of about 2.5 mm, and their spacing."""
    blocks = np.minimum(np.maximum(1, np.round(_COARSE_MM / spacing)), data.shape).astype(int)
    if blocks.max() > 1:
        tensor = torch.from_numpy(np.ascontiguousarray(data, np.float32))
        data = block_means(tensor, blocks.tolist()).numpy()
    return data, spacing * blocks


def _largest(foreground: np.ndarray) -> Piece:
    """The largest piece, in its box."""
    pieces, count = ndimage.label(ndimage.binary_opening(foreground))
    if count == 0:
        return (slice(0),) * 3, np.zeros((0, 0, 0), bool)
    largest = int(np.bincount(pieces.ravel())[1:].argmax())
    box = ndimage.find_objects(pieces)[largest]
    return box, pieces[box] == largest + 1


def _filled(piece: np.ndarray) -> np.ndarray:
    """A piece, every cavity filled in 3-D and in every slice (nose, ears)."""
    piece = piece.copy()
    for axis in range(3):
        for index in range(piece.shape[axis]):
            plane = (slice(None),) * axis + (index,)
            piece[plane] = ndimage.binary_fill_holes(piece[plane])
    return piece


def _darkest_layer(brightness: np.ndarray, piece: np.ndarray, spacing: np.ndarray) -> float:
    """See `SkullEvidence.darkest_layer`; 0 where there is no inside."""
    depth = ndimage.distance_transform_edt(np.pad(piece, 1), sampling=spacing)[1:-1, 1:-1, 1:-1]
    inner = brightness[depth > 4 * _LAYER_MM]
    if inner.size == 0 or np.median(inner) <= 0:
        return 0.0
    layers = []
    for start in np.arange(_LAYER_MM, 7 * _LAYER_MM, _LAYER_MM):
        layer = brightness[(depth > start) & (depth <= start + _LAYER_MM)]
        if layer.size >= 100:
            layers.append(np.percentile(layer, 15))
    return float(min(layers) / np.median(inner)) if layers else 0.0

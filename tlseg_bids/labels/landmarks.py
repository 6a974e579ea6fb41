"""The template's structures as landmarks, each as far as a scan shows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tlseg_bids.volume import Grid

LEAST_SHOWN = 0.25


@dataclass(frozen=True, eq=False)
class BoxAtlas:
    """Where a template has its structures.

    Parameters
    ----------
    probabilities : ndarray, shape (channels, I, J, K)
        Of every channel, background included.
    box_mm : ndarray, shape (3, 2)
        The region that they fill, [low, high] in template mm along each axis.
    """

    probabilities: np.ndarray
    box_mm: np.ndarray

    @cached_property
    def _flat(self) -> np.ndarray:
        return self.probabilities.reshape(len(self.probabilities), -1).astype(np.float64)

    @cached_property
    def _points(self) -> np.ndarray:
        """Centres of the voxels, (n, 3) in template mm."""
        shape = self.probabilities.shape[1:]
        low, high = np.asarray(self.box_mm, float).T
        index = np.indices(shape).reshape(3, -1).T
        return low + (index + 0.5) * (high - low) / shape

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        return self._of(np.ones(len(self._points)))

    def _of(self, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums (channels,) and centroids (channels, 3) with a weight for each voxel, (n,)."""
        total = self._flat @ inside
        with np.errstate(invalid="ignore", divide="ignore"):
            return total, (self._flat @ (inside[:, None] * self._points)) / total[:, None]

    def _inside(self, to_index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Share of each voxel, (n,), that lies in a grid: 0 to 1 over the width of a voxel."""
        voxel_mm = np.ptp(np.asarray(self.box_mm, float), axis=1) / self.probabilities.shape[1:]
        inside = np.ones(len(self._points))
        for axis, last in enumerate(shape):
            place = self._points @ to_index[axis, :3] + to_index[axis, 3]
            width = np.abs(to_index[axis, :3]) @ voxel_mm
            for depth in (place + 0.5, last - 0.5 - place):
                inside *= np.clip(depth / width + 0.5, 0, 1)
        return inside

    def shown(
        self, template_from_native: np.ndarray, native: Grid
    ) -> tuple[np.ndarray, np.ndarray]:
        """How much of each structure lies within a scan, and what the rest means for its centroid.

        Parameters
        ----------
        template_from_native : ndarray, shape (4, 4)
            World mm to template mm.
        native : Grid
            Of the scan.

        Returns
        -------
        shares : ndarray, shape (channels,)
            From 0 to 1; NaN where the atlas has nothing of the structure.
        shifts : ndarray, shape (channels, 3)
            Centroid of what the scan shows less that of the whole, template mm; NaN where it shows
            nothing.
        """
        to_index = np.linalg.inv(template_from_native @ native.affine)
        inside = self._inside(to_index, native.shape)
        total, centres = self._whole if inside.min() == 1 else self._of(inside)
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / self._whole[0], centres - self._whole[1]


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Centroids of a template's structures, (channels, 3) in mm, NaN where there is none.

    With an `atlas` of the same channels they can be asked for what a scan shows.
    """

    centroids: np.ndarray
    atlas: BoxAtlas | None = None

    def shown(self, template_from_native: np.ndarray, native: Grid | None) -> np.ndarray:
        """Centroids of those parts of the structures that lie within the scan.

        A scan that ends in the cerebellum shows the centroid of its upper part, which must not be
        taken for that of the whole. Structures of which less than `LEAST_SHOWN` is within have
        none (NaN). Without an atlas or a grid, and for structures that lie within the scan as a
        whole, they are the template's own.
        """
        if self.atlas is None or native is None:
            return self.centroids
        shares, shifts = self.atlas.shown(template_from_native, native)
        unknown = np.isnan(shares)
        moved = np.where(unknown[:, None], 0.0, shifts)
        moved[shares < LEAST_SHOWN] = np.nan
        return self.centroids + moved

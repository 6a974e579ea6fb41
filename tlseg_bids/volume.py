"""Voxels that know where they lie.

Axes I, J, K are voxel indices; x, y, z are millimetres in RAS+ world space.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Grid:
    """A lattice of voxels in the world.

    Parameters
    ----------
    shape : tuple of int
        Voxels along I, J, K.
    affine : ndarray, shape (4, 4), float64
        Voxel index to RAS+ millimetres; voxel centres at integer indices.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """Distance between neighbouring voxel centres along I, J, K, in mm, shape (3,)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm³."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def index_from(self, other: Grid) -> np.ndarray:
        """The 4×4 matrix that takes voxel indices of `other` to voxel indices of this grid."""
        return np.linalg.inv(self.affine) @ other.affine

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and self.shape == other.shape
            and np.array_equal(self.affine, other.affine)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Volume:
    """An array on a grid.

    Parameters
    ----------
    data : ndarray, shape `grid.shape`
        Intensities or labels.
    grid : Grid
        Where the voxels lie.
    """

    data: np.ndarray
    grid: Grid

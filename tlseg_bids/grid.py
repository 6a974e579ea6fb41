"""Where voxels lie in the world: axes I, J, K are voxel indices, x, y, z millimetres in RAS+."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAME_GRID_MM = 0.1


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

    def coarser(self, factor: int, shape: tuple[int, int, int]) -> Grid:
        """A grid of `shape` from the same corner, whose voxels hold `factor`³ of this one's."""
        step = np.diag([factor, factor, factor, 1.0])
        step[:3, 3] = (factor - 1) / 2
        return Grid(tuple(shape), self.affine @ step)

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


def difference(one: Grid, other: Grid, owner: str = "the scan") -> str | None:
    """How a grid differs from that of a scan, or of another `owner`, in words.

    Parameters
    ----------
    one : Grid
        The owner's.
    other : Grid

    Returns
    -------
    str or None
        None if they are the same: as many voxels, and every corner within `SAME_GRID_MM`.
    """
    if one.shape != other.shape:
        return f"{other.shape} voxels, {owner} has {one.shape}"
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in one.shape], [1], indexing="ij"))
    apart = np.linalg.norm(((one.affine - other.affine) @ corners.reshape(4, -1))[:3], axis=0)
    if apart.max() > SAME_GRID_MM:
        return f"a corner lies {apart.max():.1f} mm from that of {owner}"
    return None

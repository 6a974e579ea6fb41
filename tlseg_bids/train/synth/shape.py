"""Random shape: an affine and elastic deformation, and what is read at the deformed positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.train.dataset import Sample
from tlseg_bids.train.synth.draws import Random

# A field interpolated linearly between control points of unit variance has, on average over its
# positions, this standard deviation: (2/3 per axis)^(3/2). `Shape.elastic_mm` is meant that way.
_LINEAR_SD = (2 / 3) ** 1.5


@dataclass(frozen=True)
class Shape:
    """Ranges of the random deformation; lengths in mm, angles in degrees.

    `elastic_mm` is the largest standard deviation of the displacement at control points that are
    `elastic_spacing_mm` apart.
    """

    rotation: float = 8.0
    log_scale: tuple[float, float] = (-0.08, 0.08)
    anisotropy: float = 0.08
    shear: float = 0.05
    shift_mm: float = 4.0
    elastic_mm: tuple[float, float] = (2.5, 1.2)
    elastic_spacing_mm: tuple[float, float] = (32.0, 14.0)


class Place(NamedTuple):
    """Where a patch lies: template positions (3, I, J, K) in mm, and its voxel size in mm."""

    positions: Tensor
    spacing_mm: float


def random_affine(rng: Random, shape: Shape) -> np.ndarray:
    """A random affine (4, 4) about the origin."""
    rx, ry, rz = np.radians([rng.one(-shape.rotation, shape.rotation) for _ in range(3)])
    cos, sin = np.cos, np.sin
    rotation = (
        np.array([[cos(rz), -sin(rz), 0], [sin(rz), cos(rz), 0], [0, 0, 1]])
        @ np.array([[cos(ry), 0, sin(ry)], [0, 1, 0], [-sin(ry), 0, cos(ry)]])
        @ np.array([[1, 0, 0], [0, cos(rx), -sin(rx)], [0, sin(rx), cos(rx)]])
    )
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = [rng.one(-shape.shear, shape.shear) for _ in range(3)]
    whole = math.exp(rng.one(*shape.log_scale))
    scale = [whole * math.exp(rng.one(-shape.anisotropy, shape.anisotropy)) for _ in range(3)]
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ shear @ np.diag(scale)
    matrix[:3, 3] = [rng.one(-shape.shift_mm, shape.shift_mm) for _ in range(3)]
    return matrix


def spline_basis(size: int, spacing: float) -> Tensor:
    """Cubic B-splines (size, controls), rows of unit length: white controls, unit variance.

    Source: Rueckert et al. 1999, doi:10.1109/42.796284 (free-form deformations).
    """
    at = torch.arange(size, dtype=torch.float32) / spacing
    distance = (at[:, None] - torch.arange(-1, math.ceil((size - 1) / spacing) + 2)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp_min(0) ** 3 / 6
    basis = torch.where(distance < 1, near, far)
    return basis / basis.norm(dim=1, keepdim=True)


def along_axes(matrices: list[Tensor], values: Tensor) -> Tensor:
    """Apply a matrix (out, in) along each of the last three axes of values (..., I, J, K)."""
    first, second, third = matrices
    values = values @ third.T
    values = second @ values
    lead, (i, j, k) = values.shape[:-3], values.shape[-3:]
    return (first @ values.reshape(*lead, i, j * k)).reshape(*lead, len(first), j, k)


def smooth_field(rng: Random, channels: int, size: tuple[int, ...], spacing: float) -> Tensor:
    """Smooth random field (channels, *size) of unit variance; `spacing` in voxels."""
    bases = [spline_basis(n, spacing) for n in size]
    control = rng.vector(channels, *(b.shape[1] for b in bases))
    return along_axes(
        [b.to(rng.device, non_blocking=True) for b in bases],
        control.to(rng.device, non_blocking=True),
    )


def deformed_positions(
    rng: Random, shape: Shape, corner_mm: np.ndarray, size: int | Sequence[int], spacing_mm: float
) -> Tensor:
    """Template positions in mm (3, I, J, K) that a patch's voxels are read from.

    `size` is I, J and K in voxels, or one number for all three.
    """
    sides = (size,) * 3 if isinstance(size, int) else tuple(size)
    matrix = torch.as_tensor(random_affine(rng, shape), dtype=torch.float32)
    # (3 template axes, n) for each patch axis: a sum of three lines is cheaper than a full product.
    lines = []
    for axis, n in enumerate(sides):
        along = float(corner_mm[axis]) + torch.arange(n, dtype=torch.float32) * spacing_mm
        lines.append((matrix[:3, axis, None] * along).to(rng.device, non_blocking=True))
    start = matrix[:3, 3, None].to(rng.device, non_blocking=True)
    moved = (
        (lines[0] + start)[:, :, None, None] + lines[1][:, None, :, None] + lines[2][:, None, None]
    )
    for sd, every in zip(shape.elastic_mm, shape.elastic_spacing_mm, strict=True):
        field = smooth_field(rng, 3, sides, every / spacing_mm)
        moved.add_(field, alpha=sd * rng.one() * _LINEAR_SD)
    return moved


def voxel_positions(positions: Tensor, matrix: np.ndarray) -> Tensor:
    """Voxel coordinates (3, I, J, K) of positions in the frame of `matrix` (frame from voxel)."""
    inverse = torch.as_tensor(np.linalg.inv(matrix), dtype=torch.float32).to(
        positions.device, non_blocking=True
    )
    flat = inverse[:3, :3] @ positions.reshape(3, -1) + inverse[:3, 3:]
    return flat.reshape(positions.shape)


def read_classes(
    sample: Sample, positions: Tensor, matrix: np.ndarray, classes: Tensor | None = None
) -> Tensor:
    """Class numbers uint8 (I, J, K) at positions in the frame of `matrix` (frame from voxel).

    Nearest voxel; `sample.outside` beyond the map. `classes` is the sample's map on the positions'
    device, if it is there already.
    """
    classes = sample.classes.to(positions.device, non_blocking=True) if classes is None else classes
    nearest = voxel_positions(positions, matrix).round_()
    ends = (
        torch.tensor(classes.shape, dtype=torch.float32).to(positions.device, non_blocking=True) - 1
    )
    held = torch.minimum(nearest.clamp_min(0), ends[:, None, None, None])
    inside = (held == nearest).all(0)
    i, j, k = held.to(torch.int32)
    index = ((i * classes.shape[1] + j) * classes.shape[2] + k).flatten()
    found = classes.reshape(-1).index_select(0, index).reshape(inside.shape)
    return found.masked_fill_(~inside, sample.outside)


def read_image(
    sample: Sample,
    suffix: str,
    positions: Tensor,
    matrix: np.ndarray,
    image: Tensor | None = None,
) -> Tensor:
    """Intensities (I, J, K) of one image at the positions, trilinear; 0 outside.

    `image` is the sample's image on the positions' device, if it is there already.
    """
    image = (
        sample.images[suffix].to(positions.device, non_blocking=True) if image is None else image
    )
    ends = (
        torch.tensor(image.shape, dtype=torch.float32).to(positions.device, non_blocking=True) - 1
    )
    grid = voxel_positions(positions, matrix) * (2 / ends)[:, None, None, None] - 1
    grid = grid.flip(0).permute(1, 2, 3, 0)[None]
    return F.grid_sample(image[None, None], grid, align_corners=True)[0, 0]

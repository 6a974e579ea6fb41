"""An analytic head: nested ellipsoids whose volumes in mm³ are known exactly.

It lives in RAS+ millimetres and can be drawn on any grid, so that a flip, a half-voxel shift or a
swapped spacing cannot hide. Left and right differ in size and place on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.volume import Grid, Volume

PROTOCOL = load_protocol("aseg")


@dataclass(frozen=True)
class Ellipsoid:
    """A structure: its name in the protocol, centre and half-axes in mm, parent, brightness."""

    name: str
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    parent: str | None
    brightness: float

    @property
    def label(self) -> int:
        """Index in the protocol."""
        table = PROTOCOL.table
        return int(table.loc[table["name"] == self.name, "index"].iloc[0])

    @property
    def full_mm3(self) -> float:
        """Volume with everything inside it."""
        return float(4 / 3 * np.pi * np.prod(self.radii))


STRUCTURES = (
    Ellipsoid("Left cerebral cortex", (-34, 0, 20), (31, 74, 50), None, 0.5),
    Ellipsoid("Right cerebral cortex", (33, 2, 19), (30, 71, 48), None, 0.5),
    Ellipsoid(
        "Left cerebral white matter", (-34, 0, 18), (26, 66, 42), "Left cerebral cortex", 0.9
    ),
    Ellipsoid(
        "Right cerebral white matter", (33, 1, 18), (25, 62, 41), "Right cerebral cortex", 0.9
    ),
    Ellipsoid(
        "Left lateral ventricle", (-22, -4, 32), (7, 26, 9), "Left cerebral white matter", 0.1
    ),
    Ellipsoid(
        "Right lateral ventricle", (21, 3, 31), (6, 22, 8), "Right cerebral white matter", 0.1
    ),
    Ellipsoid("Left thalamus", (-19, -14, 12), (8, 13, 9), "Left cerebral white matter", 0.6),
    Ellipsoid("Right thalamus", (18, -12, 12), (7, 12, 9), "Right cerebral white matter", 0.6),
    Ellipsoid("Left putamen", (-36, 10, 12), (7, 16, 10), "Left cerebral white matter", 0.65),
    Ellipsoid("Right putamen", (35, 14, 11), (7, 14, 9), "Right cerebral white matter", 0.65),
    Ellipsoid("Left hippocampus", (-36, -22, -6), (7, 17, 7), "Left cerebral white matter", 0.55),
    Ellipsoid("Right hippocampus", (34, -20, -5), (6, 15, 7), "Right cerebral white matter", 0.55),
    Ellipsoid("Left cerebellum cortex", (-28, -42, -56), (24, 28, 22), None, 0.45),
    Ellipsoid("Right cerebellum cortex", (26, -41, -55), (23, 27, 21), None, 0.45),
    Ellipsoid("Brain stem", (0, 2, -46), (12, 10, 28), None, 0.8),
)


@dataclass(frozen=True)
class Phantom:
    """All structures, scaled about the origin."""

    scale: float = 1.0

    def exact_mm3(self) -> dict[int, float]:
        """Label → mm³ without what is nested inside."""
        volumes = {s.name: s.full_mm3 for s in STRUCTURES}
        own = dict(volumes)
        for s in STRUCTURES:
            if s.parent:
                own[s.parent] -= volumes[s.name]
        return {s.label: own[s.name] * self.scale**3 for s in STRUCTURES}

    def centres_mm(self) -> dict[int, np.ndarray]:
        """Label → centre of its ellipsoid, for the structures that hold nothing else."""
        parents = {s.parent for s in STRUCTURES}
        return {
            s.label: np.array(s.centre) * self.scale for s in STRUCTURES if s.name not in parents
        }

    def labels(self, grid: Grid) -> Volume:
        """Label at every voxel centre, int16."""
        return Volume(self._paint(grid, np.zeros(3), "label").astype(np.int16), grid)

    def image(self, grid: Grid, sub: int = 2) -> Volume:
        """Brightness, the mean of `sub`³ points per voxel, float32."""
        total = np.zeros(grid.shape, np.float32)
        for offset in _offsets(sub):
            total += self._paint(grid, offset, "brightness")
        return Volume(total / sub**3, grid)

    def probabilities(self, grid: Grid, sub: int = 2) -> np.ndarray:
        """A perfect network's answer: shares of each voxel, float16 (channels, I, J, K)."""
        counts = np.zeros((len(PROTOCOL), *grid.shape), np.float16)
        channel = {int(label): c for c, label in enumerate(PROTOCOL.indices)}
        for offset in _offsets(sub):
            labels = self._paint(grid, offset, "label")
            for label in np.unique(labels):
                counts[channel[int(label)]] += labels == label
        return counts / np.float16(sub**3)

    def _paint(self, grid: Grid, offset: np.ndarray, value: str) -> np.ndarray:
        out = np.zeros(grid.shape, np.float32)
        back = np.linalg.inv(grid.affine)
        for s in STRUCTURES:
            centre, radii = np.array(s.centre) * self.scale, np.array(s.radii) * self.scale
            box = _reach(back, centre, radii, grid.shape)
            index = np.ogrid[box]
            axes = [axis + shift for axis, shift in zip(index, offset, strict=True)]
            distance = 0.0
            for row, middle, radius in zip(grid.affine, centre, radii, strict=False):
                world = sum((row[a] / radius * axes[a]).astype(np.float32) for a in range(3))
                distance = distance + (world + np.float32((row[3] - middle) / radius)) ** 2
            out[box][distance <= 1] = getattr(s, value)
        return out


def _reach(
    back: np.ndarray, centre: np.ndarray, radii: np.ndarray, shape: tuple[int, ...]
) -> tuple[slice, ...]:
    """The index box that an ellipsoid can touch."""
    middle = back[:3, :3] @ centre + back[:3, 3]
    room = np.linalg.norm(back[:3, :3] * radii, axis=1) + 1
    low = np.clip(np.floor(middle - room), 0, shape).astype(int)
    high = np.clip(np.ceil(middle + room) + 1, 0, shape).astype(int)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _offsets(sub: int) -> list[np.ndarray]:
    axis = (np.arange(sub) + 0.5) / sub - 0.5
    return [np.array(o) for o in product(axis, axis, axis)]


def orientations() -> list[np.ndarray]:
    """The 48 signed permutation matrices: every way to store a scan without rotating it."""
    out = []
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            matrix[order, range(3)] = signs
            out.append(matrix)
    return out


def rotation(x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
    """Rotation by degrees about x, then y, then z."""
    out = np.eye(3)
    for axis, angle in enumerate(np.deg2rad((x, y, z))):
        a, b = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        out = turn @ out
    return out


def grid_over(
    phantom: Phantom, spacing: tuple[float, float, float], axes: np.ndarray | None = None,
    offset: tuple[float, float, float] = (0, 0, 0), margin_mm: float = 6.0,
) -> Grid:  # fmt: skip
    """A grid that covers the phantom.

    Parameters
    ----------
    phantom : Phantom
        What to cover.
    spacing : tuple of float
        Along the voxel axes I, J, K, mm.
    axes : ndarray, shape (3, 3)
        Orthonormal columns, the directions of I, J, K in the world (`rotation @ orientation`).
    offset : tuple of float
        Shift of the lattice, mm.
    margin_mm : float
        Room around the head.
    """
    axes = np.eye(3) if axes is None else axes
    low = np.min([np.subtract(s.centre, s.radii) for s in STRUCTURES], axis=0) * phantom.scale
    high = np.max([np.add(s.centre, s.radii) for s in STRUCTURES], axis=0) * phantom.scale
    corners = np.array(list(product(*zip(low, high, strict=True)))) @ axes
    first, last = corners.min(axis=0) - margin_mm, corners.max(axis=0) + margin_mm
    affine = np.eye(4)
    affine[:3, :3] = axes * np.array(spacing)
    affine[:3, 3] = axes @ first + np.array(offset)
    shape = np.ceil((last - first) / spacing).astype(int) + 1
    return Grid(tuple(int(n) for n in shape), affine)

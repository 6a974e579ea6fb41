"""Class probabilities that can be asked at any voxel of the scan.

A network's output is rows of a table, channels side by side, one per model voxel or shared by
several; a trilinear value is then a weighted sum of eight rows. Only native voxels that touch model
voxels in which something else than background is possible are looked at. The table stays on the
device on which it was found, and what is asked of it is found there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import SharedRows
from tlseg_bids.volume import Grid

_CERTAIN = 1 - 1 / 512
_POINTS_PER_SLAB = 2**16, 2**20
"""On a core, and on a GPU."""
Found = TypeVar("Found")


class ProbabilityField:
    """Class probabilities that can be asked at the voxels of a native grid.

    Parameters
    ----------
    probabilities : ndarray or SharedRows, shape (channels, I, J, K)
        float16 or float32, channel 0 the background; sums to 1 over the channels. An array whose
        channels lie side by side in memory is not copied.
    grid : Grid
        Where they lie; `affine` leads to native millimetres.
    native : Grid
        The grid of the scan.
    """

    def __init__(self, probabilities: np.ndarray | SharedRows, grid: Grid, native: Grid) -> None:
        self.channels, self.native, self.shape = len(probabilities), native, grid.shape
        self._index: torch.Tensor | None = None
        if isinstance(probabilities, SharedRows):
            self._table, self._index = probabilities.rows, probabilities.index.reshape(-1)
            background = self._table[:, 0][self._index].reshape(grid.shape)
        else:
            field = torch.from_numpy(probabilities)
            self._table = field.permute(1, 2, 3, 0).reshape(-1, self.channels)
            background = field[0]
        self.device = self._table.device
        possible = background < _CERTAIN
        self.border_share = _border_share(background)
        self.is_empty = not bool(possible.any())
        if self.is_empty:
            return
        where = possible.nonzero()
        ends = torch.stack([where.amin(0), where.amax(0)]).cpu()
        self._low = (ends[0] - 1).clamp(min=0)
        high = torch.minimum(ends[1] + 2, torch.tensor(grid.shape))
        box = tuple(slice(int(a), int(b)) for a, b in zip(self._low, high, strict=True))
        self._size = (high - self._low).tolist()
        self._reaches_edge = bool(
            (self._low == 0).any() or (high == torch.tensor(grid.shape)).any()
        )
        cells = F.pad(possible[box][None, None].float(), (0, 1) * 3)
        self._cells = (F.max_pool3d(cells, 2, 1)[0, 0] > 0).reshape(-1)
        self._matrix = grid.index_from(native)
        self._matrix[:3, 3] -= self._low.numpy()
        self._sub_points = self._offsets()

    def slabs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Walk over the native voxels that may hold something.

        Yields
        ------
        voxels : ndarray of int64, shape (n,)
            Flat (C order) indices into the native grid, ascending over the walk.
        probabilities : ndarray of float32, shape (n, channels)
            All voxels that are never yielded are background with a probability above 0.998.
        """
        for voxels, probabilities in self.each(lambda *found: found):
            yield voxels.cpu().numpy(), probabilities.cpu().numpy()

    def each(
        self, function: Callable[[torch.Tensor, torch.Tensor], Found], crew: Crew = ALONE
    ) -> Iterator[Found]:
        """What `function` makes of the voxels and probabilities of each of the `slabs`, in order.

        They are tensors on `device`. `crew` shares out the slabs.
        """
        if self.is_empty:
            return
        first, last = self._native_box()
        depth = max(1, self._points // int(np.prod(last[1:] - first[1:])))

        def slab(start: int) -> tuple[Found] | None:
            begin = np.array([start, *first[1:]])
            end = np.array([min(start + depth, last[0]), *last[1:]])
            found = self._slab(begin, end)
            return None if found is None else (function(*found),)

        for found in crew.map(slab, range(first[0], last[0], depth)):
            if found is not None:
                yield found[0]

    @property
    def _points(self) -> int:
        """How many are asked for at a time."""
        return Crew(device=self.device).pieces_of(*_POINTS_PER_SLAB)

    def _slab(self, begin: np.ndarray, end: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Voxels and probabilities of a box of the native grid; None if nothing can be there."""
        centre = self._lattice(begin, end)
        hit = torch.zeros(centre[0].numel(), dtype=torch.bool, device=self.device)
        for offset in self._sub_points:
            x, y, z = (self._clamped(c, axis, offset).int() for axis, c in enumerate(centre))
            hit |= self._cells[((x * self._size[1] + y) * self._size[2] + z).reshape(-1)]
        found = hit.nonzero()[:, 0]
        if not len(found):
            return None
        points = [c.reshape(-1)[found] for c in centre]
        rows, length = hit.reshape(-1, int(end[2] - begin[2])), len(found)
        ahead = self._ahead(begin, end).repeat_interleave(rows.sum(1), output_size=length)
        return found + ahead, self._interpolate(points)

    def _ahead(self, begin: np.ndarray, end: np.ndarray) -> torch.Tensor:
        """What is added to a flat index into a box of the native grid, for one into the grid.

        int64, for every row of the box, (n,).
        """
        (_, height, width), size = self.native.shape, (end - begin).tolist()
        i, j = (torch.arange(n, device=self.device) for n in size[:2])
        there = ((i + int(begin[0])) * height)[:, None] + (j + int(begin[1]))
        own = (i * size[1])[:, None] + j
        return (there * width + int(begin[2]) - own * size[2]).reshape(-1)

    def at(self, voxels: np.ndarray) -> np.ndarray:
        """Probabilities at some native voxels (flat indices), float32 (n, channels)."""
        out = np.zeros((len(voxels), self.channels), np.float32)
        out[:, 0] = 1
        if self.is_empty:
            return out
        for start in range(0, len(voxels), self._points):
            part = slice(start, start + self._points)
            index = np.stack(np.unravel_index(voxels[part], self.native.shape), axis=-1)
            centre = index @ self._matrix[:3, :3].T + self._matrix[:3, 3]
            points = [self._there(c) for c in centre.T]
            out[part] = self._interpolate(points).cpu().numpy()
        return out

    def _there(self, positions: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(positions.astype(np.float32)).to(self.device)

    def _offsets(self) -> list[np.ndarray]:
        """Steps, in model voxels, to the places in a native voxel whose mean stands for it."""
        ratio = np.linalg.norm(self._matrix[:3, :3], axis=0)
        counts = [max(1, round(float(r))) for r in ratio]
        axes = [(np.arange(n) + 0.5) / n - 0.5 for n in counts]
        return [self._matrix[:3, :3] @ np.array(step) for step in product(*axes)]

    def _native_box(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last+1 native index that the possible part of the field reaches."""
        corners = np.array(list(product(*((-0.5, n - 0.5) for n in self._size))))
        back = np.linalg.inv(self._matrix)
        corners = corners @ back[:3, :3].T + back[:3, 3]
        first = np.clip(np.floor(corners.min(axis=0) - 0.5), 0, self.native.shape).astype(int)
        last = np.clip(np.ceil(corners.max(axis=0) + 1.5), 0, self.native.shape).astype(int)
        return first, last if (last > first).all() else first

    def _lattice(self, begin: np.ndarray, end: np.ndarray) -> list[torch.Tensor]:
        """Positions in the box of a lattice of native voxels: three float32 arrays (I, J, K)."""
        index = [np.arange(a, b) for a, b in zip(begin, end, strict=True)]
        out = []
        for row in self._matrix[:3]:
            i, j, k = (self._there(row[a] * index[a]) for a in range(3))
            out.append((i[:, None, None] + float(row[3])) + j[None, :, None] + k)
        return out

    def _clamped(self, position: torch.Tensor, axis: int, offset: np.ndarray) -> torch.Tensor:
        """Positions along an axis, moved by the offset and held inside the box."""
        moved = position + float(offset[axis]) if offset[axis] else position
        return moved.clamp(0, self._size[axis] - 1)

    def _interpolate(self, points: list[torch.Tensor]) -> torch.Tensor:
        """Mean over the sub-points of a voxel, float32 (n, channels)."""
        out = self._trilinear(points, self._sub_points[0])
        for offset in self._sub_points[1:]:
            out += self._trilinear(points, offset)
        return out.div_(len(self._sub_points))

    def _trilinear(self, points: list[torch.Tensor], offset: np.ndarray) -> torch.Tensor:
        """One weighted sum of eight rows per point; background outside the model's grid."""
        position = [self._clamped(p, axis, offset) for axis, p in enumerate(points)]
        last = [max(n - 2, 0) for n in self._size]  # a cell has a far side, but for a flat box
        cell = [p.int().clamp_max(n) for p, n in zip(position, last, strict=True)]
        share = [p - c for p, c in zip(position, cell, strict=True)]
        (x, y, z) = (torch.stack((1 - f, f), dim=-1) for f in share)
        weights = (x[:, :, None] * y[:, None, :])[..., None] * z[:, None, None, :]
        weights = weights.reshape(-1, 8)
        strides = (self.shape[1] * self.shape[2], self.shape[2], 1)
        steps = [s if n > 1 else 0 for s, n in zip(strides, self._size, strict=True)]
        corners = [int(np.dot(c, steps)) for c in product((0, 1), repeat=3)]
        outside = self._outside(points, offset) if self._reaches_edge else None
        if outside is not None:
            weights.masked_fill_(outside[:, None], 0)
        first = sum((c + int(n)) * s for c, n, s in zip(cell, self._low, strides, strict=True))
        rows = first[:, None] + torch.tensor(corners, dtype=torch.int32, device=self.device)
        if self._index is not None:
            rows = self._index[rows]
        kind = self._table.dtype
        out = F.embedding_bag(
            rows, self._table, per_sample_weights=weights.to(kind), mode="sum"
        ).float()
        if outside is not None:
            out[:, 0] += outside
        return out

    def _outside(self, points: list[torch.Tensor], offset: np.ndarray) -> torch.Tensor:
        """Whether points lie beyond the outer faces of the model's grid."""
        outside = torch.zeros(len(points[0]), dtype=torch.bool, device=self.device)
        for axis, point in enumerate(points):
            low = -0.5 - float(self._low[axis]) - float(offset[axis])
            outside |= (point < low) | (point > low + self.shape[axis])
        return outside


def _border_share(background: torch.Tensor) -> float:
    """Voxels on the outer faces of the model's grid that hold brain ÷ all that hold brain."""
    brain = background < 0.5
    inner = brain[1:-1, 1:-1, 1:-1].sum()
    return float((brain.sum() - inner) / brain.sum().clamp(min=1))


def resample_probabilities(
    probabilities: np.ndarray | SharedRows, grid: Grid, native: Grid
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`ProbabilityField(...).slabs()`: flat native voxels and their probabilities, by slabs."""
    return ProbabilityField(probabilities, grid, native).slabs()


def probability_maps(
    probabilities: np.ndarray | SharedRows, grid: Grid, native: Grid
) -> Iterator[np.ndarray]:
    """Every channel's probability on the native grid, one after the other.

    The interpolation is done once; what it found is held as bytes, for the voxels alone that may
    hold something (2 million of them and 33 channels: 66 MB).

    Yields
    ------
    ndarray of float32, shape `native.shape`
        Probability 0 to 1 in steps of 1/255; the background is 1 wherever nothing can be.
    """
    field = ProbabilityField(probabilities, grid, native)
    parts = [(v, np.rint(found.T * 255).astype(np.uint8)) for v, found in field.slabs()]
    for channel in range(field.channels):
        out = np.full(native.shape, float(channel == 0), np.float32)
        for voxels, found in parts:
            out.reshape(-1)[voxels] = found[channel] / np.float32(255)
        yield out

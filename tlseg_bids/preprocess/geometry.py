"""One interpolation there: a scan on any grid.

Everything happens in the scan's own millimetres: a target grid is any lattice there, oblique or
not, and one trilinear step takes the scan to it. Where the target is coarser than the scan, the
scan is first blurred along its own axes, so that small voxels are averaged and not skipped.

Voxel centres lie at integer indices; a scan covers half a voxel around its outermost centres, and
what lies further out is `fill`. The way back is `tlseg_bids.postprocess`.

References
----------
Cardoso et al., scale factor point spread function matching, MICCAI 2015,
doi:10.1007/978-3-319-24571-3_81 (the width of the blur).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from tlseg_bids.crew import ALONE, CPU, Crew
from tlseg_bids.volume import Grid, Volume

_FWHM_PER_SIGMA = 2 * np.sqrt(2 * np.log(2))
_POINTS_PER_SLAB = 2**18, 2**20
"""Whose coordinates and values stay in a core's cache; on a GPU so few that float32 tells rows of a
picture apart (`_interpolate`)."""
_ROUNDING = 1e-3
"""Of spacings in headers: two voxels of 1.0001 mm are a block of 2 mm."""
_PLANES = 4, 256
"""Of a scan, that are blurred at a time, on a core and on a GPU."""


def resample(
    volume: Volume, grid: Grid, order: str = "linear", fill: float = 0.0, crew: Crew = ALONE
) -> np.ndarray:
    """Interpolate a volume at the voxel centres of another grid.

    Parameters
    ----------
    volume : Volume
        The scan (or labels, with `order` "nearest").
    grid : Grid
        Where to; its affine leads to the same millimetres as `volume.grid`.
    order : {"linear", "nearest"}
        Trilinear with anti-aliasing, or the value of the nearest voxel.
    fill : float
        Value outside the volume.
    crew : Crew
        Shares out the target's voxels.

    Returns
    -------
    ndarray, shape `grid.shape`
        float32 for "linear", the input's type for "nearest".
    """
    if order == "linear":
        return interpolated(volume, grid, fill, crew).cpu().numpy()
    if order != "nearest":
        raise ValueError(f"order is '{order}'; it must be 'linear' or 'nearest'")
    own = in_memory_order(volume)
    part = _reach(own.grid, grid)
    data, matrix = own.data[part], _from(own.grid, part).index_from(grid)
    if data.size == 0:
        return np.full(grid.shape, fill, data.dtype)
    return _nearest(data, matrix, grid.shape, fill)


def interpolated(volume: Volume, grid: Grid, fill: float = 0.0, crew: Crew = ALONE) -> torch.Tensor:
    """As `resample` with trilinear interpolation, on the device of the crew.

    A scan that is read on a GPU is brought there once and kept with the volume.
    """
    own = in_memory_order(volume)
    part = _reach(own.grid, grid)
    native = _from(own.grid, part)
    if 0 in native.shape:
        return torch.full(grid.shape, float(fill), device=crew.device)
    if crew.device.type == "cpu":
        data = torch.from_numpy(np.ascontiguousarray(own.data[part], np.float32))
    else:
        if crew.device not in volume.there:
            whole = torch.from_numpy(np.ascontiguousarray(own.data, np.float32))
            volume.there[crew.device] = whole.to(crew.device)
        data = volume.there[crew.device][part]
    data, native = _antialias(data, native, grid, crew)
    return _interpolate(data, native.index_from(grid), grid.shape, fill, crew)


def block_means(tensor: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
    """Means of blocks of voxels (I, J, K); what does not fill a block at the end is left out."""
    i, j, k = blocks
    shape = [n // b for n, b in zip(tensor.shape, blocks, strict=True)]
    out, share = tensor.new_empty(shape), 1 / (i * j * k)
    with torch.inference_mode():
        for plane in range(shape[0]):  # which stays in the cache, and its rows are added as rows
            rows = tensor[i * plane : i * (plane + 1), : j * shape[1], : k * shape[2]].sum(0)
            row = sum(rows[start::j] for start in range(j))
            out[plane] = sum(row[:, start::k] for start in range(k)) * share
    return out


def thinned(volume: Volume, spacing_mm: float) -> Volume:
    """The volume in the largest blocks of its voxels that are not larger than `spacing_mm`.

    What looks at a scan several times, coarsely, need not read all of its voxels each time. Found
    once, and kept with the volume.
    """
    blocks = _blocks_within(volume.grid, spacing_mm)
    if max(blocks) == 1:
        return volume
    if blocks not in volume.thin:
        own = in_memory_order(volume)
        tensor = torch.from_numpy(np.ascontiguousarray(own.data, np.float32))
        there = _filled_blocks(tensor, own.grid.affine, _blocks_within(own.grid, spacing_mm))
        volume.thin[blocks] = Volume(there[0].numpy(), Grid(tuple(there[0].shape), there[1]))
    return volume.thin[blocks]


def _blocks_within(grid: Grid, spacing_mm: float) -> tuple[int, ...]:
    """How many voxels along each axis fit into `spacing_mm`, at least one."""
    return tuple(max(1, int(spacing_mm / own * (1 + _ROUNDING))) for own in grid.spacing_mm)


def in_memory_order(volume: Volume) -> Volume:
    """The same voxels with axes swapped so that the last runs fastest in memory; a view.

    Files are stored with the first axis fastest; walking them along the last is many times slower.
    """
    order = np.argsort(-np.abs(volume.data.strides), kind="stable")
    affine = volume.grid.affine.copy()
    affine[:, :3] = affine[:, order]
    data = volume.data.transpose(order)
    return Volume(data, Grid(data.shape, affine))


def _reach(native: Grid, grid: Grid) -> tuple[slice, ...]:
    """The part of a volume that `grid` can reach, with room for the blur."""
    to_native = native.index_from(grid)
    ends = np.array(list(product(*((0, n - 1) for n in grid.shape))))
    corners = ends @ to_native[:3, :3].T + to_native[:3, 3]
    room = 3 * np.linalg.norm(to_native[:3, :3], axis=1) + 2
    low = np.clip(np.floor(corners.min(axis=0) - room), 0, None).astype(int)
    high = np.minimum(np.ceil(corners.max(axis=0) + room) + 1, native.shape).astype(int)
    high = np.maximum(high, low)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _from(native: Grid, part: tuple[slice, ...]) -> Grid:
    """The grid of a part of a volume, whose slices may begin at its end."""
    sizes = [len(range(n)[some]) for n, some in zip(native.shape, part, strict=True)]
    affine = native.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [some.start for some in part]
    return Grid(tuple(sizes), affine)


def _antialias(
    tensor: torch.Tensor, native: Grid, grid: Grid, crew: Crew = ALONE
) -> tuple[torch.Tensor, Grid]:
    """Blur (and thin out) along native axes where a step of `grid` spans several voxels."""
    footprint = np.linalg.norm(native.index_from(grid)[:3, :3], axis=1)
    affine = native.affine.copy()
    blocks = [max(1, int(f / 1.5)) for f in footprint]
    if max(blocks) > 1:
        tensor, affine = _filled_blocks(tensor, affine, blocks)
    sigmas = {
        axis: float(np.sqrt(step**2 - 1) / _FWHM_PER_SIGMA)
        for axis, step in enumerate(footprint / blocks)
        if step > 1.1
    }
    if sigmas:
        tensor = _blur(tensor, sigmas, crew)
    return tensor, Grid(tuple(tensor.shape), affine)


def _filled_blocks(
    tensor: torch.Tensor, affine: np.ndarray, blocks: Sequence[int]
) -> tuple[torch.Tensor, np.ndarray]:
    """Means of blocks and their affine; the last voxel is repeated to fill the last block."""
    short = [-n % b for n, b in zip(tensor.shape, blocks, strict=True)]
    room = (0, short[2], 0, short[1], 0, short[0])
    if any(short):
        tensor = F.pad(tensor[None, None], room, mode="replicate")[0, 0]
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ ((np.array(blocks) - 1) / 2)
    affine[:3, :3] = affine[:3, :3] * blocks
    return block_means(tensor, blocks), affine


def _blur(tensor: torch.Tensor, sigmas: dict[int, float], crew: Crew) -> torch.Tensor:
    """Gaussian along some axes, `sigmas` in voxels; the border values are repeated.

    A few planes at a time, along all axes, so that they stay in the processor's cache.
    """
    taps = {axis: _gaussian(sigma) for axis, sigma in sigmas.items()}
    room = len(taps.get(0, [1])) // 2
    planes = F.pad(tensor[None, None], (0, 0, 0, 0, room, room), mode="replicate")[0, 0]
    out = torch.empty_like(tensor)
    at_once = crew.pieces_of(*_PLANES)

    def some(start: int) -> None:
        slab = out[start : start + at_once]
        source = planes[start : start + len(slab) + 2 * room]
        with torch.inference_mode():  # a mode of each thread, and the caller's may be in it
            for axis, weights in taps.items():
                source = _weighted(source, axis, weights, padded=axis == 0)
            slab.copy_(source)

    crew.each(some, range(0, len(out), at_once))
    return out


def _gaussian(sigma: float) -> list[float]:
    """Weights of neighbours from -n to n that add up to 1; `sigma` in voxels."""
    radius = max(1, int(np.ceil(2.5 * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return (taps / taps.sum()).tolist()


def _weighted(tensor: torch.Tensor, axis: int, taps: Sequence[float], padded: bool) -> torch.Tensor:
    """Weighted sums of neighbours along an axis, at whose ends they may be there already."""
    radius = len(taps) // 2
    if not padded:
        room = [0] * 6
        room[2 * (2 - axis)] = room[2 * (2 - axis) + 1] = radius
        tensor = F.pad(tensor[None, None], room, mode="replicate")[0, 0]
    length = tensor.shape[axis] - 2 * radius
    out = tensor.narrow(axis, 0, length) * taps[0]
    for shift, tap in enumerate(taps[1:], 1):
        out.add_(tensor.narrow(axis, shift, length), alpha=tap)
    return out


def _positions(
    matrix: np.ndarray, ends: tuple[int, int], shape: Sequence[int], device: torch.device = CPU
) -> list[torch.Tensor]:
    """Source voxel positions of a slab of a grid: three float32 (n, J, K) on a device."""
    start, stop = ends
    axes = [np.arange(start, stop), np.arange(shape[1]), np.arange(shape[2])]
    found = []
    for row in matrix[:3]:
        i, j, k = (row[a] * axis for a, axis in enumerate(axes))
        plane = torch.from_numpy((i[:, None] + row[3] + j).astype(np.float32)).to(device)
        found.append(plane[:, :, None] + torch.from_numpy(k.astype(np.float32)).to(device))
    return found


def _slabs(shape: Sequence[int], crew: Crew = ALONE) -> list[tuple[int, int]]:
    """Ranges of the first axis that keep the coordinates in little memory."""
    depth = max(1, crew.pieces_of(*_POINTS_PER_SLAB) // max(1, shape[1] * shape[2]))
    return [(a, min(a + depth, shape[0])) for a in range(0, shape[0], depth)]


def _interpolate(
    source: torch.Tensor, matrix: np.ndarray, shape: tuple[int, ...], fill: float, crew: Crew
) -> torch.Tensor:
    """Trilinear; the border voxel's value up to its outer face, `fill` beyond.

    PyTorch reads pictures an order of magnitude faster than volumes: a point is read from the two
    planes around it, which lie below one another in one picture, and lies between the two values.
    The slabs follow the source's planes, so that few of them make a picture and float32 tells its
    rows apart.
    """
    depth, height, width = source.shape
    along = int(np.abs(matrix[0, :3]).argmax())
    order = [along, *(axis for axis in range(3) if axis != along)]
    out = torch.empty(shape, device=source.device)
    matrix, shape, turned = matrix[:, [*order, 3]], [shape[a] for a in order], out.permute(order)

    def slab(ends: tuple[int, int]) -> None:
        with torch.inference_mode():  # a mode of each thread, and the caller's may be in it
            z, y, x = _positions(matrix, ends, shape, source.device)
            outside = None
            if not _within(matrix, ends, shape, source.shape):
                outside = _beyond(z, depth) | _beyond(y, height) | _beyond(x, width)
            near = z.clamp_(0, depth - 1).floor().clamp_max_(max(depth - 2, 0))
            share = z.sub_(near)
            first, last = int(near.min()), min(int(near.max()) + 2, depth)
            picture = source[first:last].reshape(1, 1, -1, width)
            rows = picture.shape[2]
            y.clamp_(0, height - 1).add_(near.sub_(first), alpha=height)
            points = torch.stack(
                (x.add_(0.5).mul_(2 / width), y.add_(0.5).mul_(2 / rows)), -1
            ).sub_(1)
            found = _read(picture, points)
            points[..., 1] += 2 * height / rows * (depth > 1)
            found.lerp_(_read(picture, points), share.flatten(1))
            found = found.reshape(z.shape)
            if outside is not None:
                found.masked_fill_(outside, fill)
            turned[slice(*ends)] = found

    crew.each(slab, _slabs(shape, crew))
    return out


def _read(picture: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values (n, m) of a picture (1, 1, H, W) at points (n, …, 2) from -1 to 1."""
    points = points.flatten(1, -2)[None]
    return F.grid_sample(picture, points, padding_mode="border", align_corners=False)[0, 0]


def _beyond(position: torch.Tensor, size: int) -> torch.Tensor:
    """Whether positions along an axis lie beyond the outer faces."""
    return (position < -0.5) | (position > size - 0.5)


def _within(
    matrix: np.ndarray, ends: tuple[int, int], shape: Sequence[int], size: Sequence[int]
) -> bool:
    """Whether all points of a slab lie inside the source: its corners are the outermost."""
    spans = [(ends[0], ends[1] - 1), *((0, n - 1) for n in shape[1:])]
    corners = np.array(list(product(*spans))) @ matrix[:3, :3].T + matrix[:3, 3]
    return bool((corners > -0.499).all() and (corners < np.array(size) - 0.501).all())


def _nearest(
    data: np.ndarray, matrix: np.ndarray, shape: tuple[int, ...], fill: float
) -> np.ndarray:
    """Value of the voxel whose centre is nearest in voxel units."""
    flat = np.ascontiguousarray(data).reshape(-1)
    out = np.full(shape, fill, data.dtype)
    size = torch.tensor(data.shape)
    strides = torch.tensor([data.shape[1] * data.shape[2], data.shape[2], 1])
    for start, stop in _slabs(shape):
        index = torch.stack(_positions(matrix, (start, stop), shape), -1)
        index = index.add_(0.5).floor_().long()
        inside = ((index >= 0) & (index < size)).all(dim=-1)
        out[start:stop][inside.numpy()] = flat[(index[inside] * strides).sum(dim=-1).numpy()]
    return out

"""The answer at the image's own resolution, found only where it can differ from the coarse one.

A network with a sub-voxel answer gives logits and features at the stem's resolution. These are
blended over the windows; then the eight sub-voxels of a coarse voxel are computed one by one where
the voxel is not settled: near a border between structures, or where the network is in doubt.
Elsewhere all eight take the coarse probabilities. On a brain that is a fifth of the voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SETTLED = 0.98
_VOXELS_AT_ONCE = 2**14
_SHARES = [a * b * c for a, b, c in product((0.75, 0.25), repeat=3)]
"""Of a voxel and its neighbours at a point a quarter of a voxel off its centre, as `product`."""

Sub = Callable[[Tensor], Tensor]


def open_voxels(coarse: Tensor) -> Tensor:
    """Coarse voxels whose sub-voxels may differ: (n, 3) int64.

    Parameters
    ----------
    coarse : Tensor, shape (I, J, K, channels)
        Probabilities.
    """
    top = coarse.max(3)
    label = top.indices.to(torch.float32)[None, None]
    highest = F.max_pool3d(label, 3, 1, 1)
    lowest = -F.max_pool3d(-label, 3, 1, 1)
    return ((highest != lowest)[0, 0] | (top.values < SETTLED)).nonzero()


def refine(coarse: Tensor, sub: Sub, heat: float) -> Tensor:
    """Probabilities at twice the resolution.

    Parameters
    ----------
    coarse : Tensor, shape (I, J, K, channels)
        Logits.
    sub : callable
        Coarse voxels (n, 3) to logits of their sub-voxels (n, 8, channels).
    heat : float
        Temperature that the logits are divided by.

    Returns
    -------
    Tensor, float16, shape (channels, 2I, 2J, 2K)
        On the CPU; the channels of a voxel lie side by side in memory.
    """
    i, j, k, channels = coarse.shape
    settled = F.softmax(coarse / heat, 3)
    where = open_voxels(settled)
    out = torch.empty((i, 2, j, 2, k, 2, channels), dtype=torch.float16)
    out[:] = settled.half().cpu()[:, None, :, None, :, None]
    for some in where.split(_VOXELS_AT_ONCE):
        found = F.softmax(sub(some) / heat, 2).half().cpu().reshape(-1, 2, 2, 2, channels)
        x, y, z = some.cpu().T
        out[x, :, y, :, z] = found
    return out.reshape(2 * i, 2 * j, 2 * k, channels).permute(3, 0, 1, 2)


class Quarters:
    """A volume read linearly a quarter of a voxel off the centres of its voxels.

    Parameters
    ----------
    volume : Tensor, float32, shape (I, J, K, channels)
        Its border voxels stand for what lies outside.
    """

    def __init__(self, volume: Tensor) -> None:
        *shape, channels = volume.shape
        for axis, n in enumerate(shape):
            around = torch.arange(-1, n + 1, device=volume.device).clamp(0, n - 1)
            volume = volume.index_select(axis, around)
        self._table = volume.reshape(-1, channels)
        steps = ((shape[1] + 2) * (shape[2] + 2), shape[2] + 2, 1)
        self._steps = torch.tensor(steps, device=volume.device)
        towards = torch.tensor(list(product((-1, 1), repeat=3)), device=volume.device)
        far = torch.tensor(list(product((0, 1), repeat=3)), device=volume.device)
        self._corners = (towards[:, None] * far[None] * self._steps).sum(2).int()
        self._shares = volume.new_tensor(_SHARES)

    def __call__(self, where: Tensor) -> Tensor:
        """Around some voxels, int64 (n, 3), the eight points (n, 8, channels) as `product` has
        them."""
        rows = ((where + 1) * self._steps).sum(1).int()[:, None, None] + self._corners
        rows = rows.reshape(-1, 8)
        shares = self._shares.expand(len(rows), 8).contiguous()
        found = F.embedding_bag(rows, self._table, mode="sum", per_sample_weights=shares)
        return found.reshape(len(where), 8, found.shape[1])


def both_sides(
    network: nn.Module, head: int, straight: Tensor, mirrored: Tensor | None, swap: Tensor
) -> tuple[Tensor, Sub]:
    """Coarse logits and the way to the fine ones, the mean of an image's and its mirror image's.

    Parameters
    ----------
    network : Module
        With `corrections`.
    head : int
        Which head answers.
    straight : Tensor, shape (channels + detail, I, J, K)
        What the network's `body` gave for the image.
    mirrored : Tensor or None
        The same for the image turned over along the first axis, as it came.
    swap : Tensor of int, shape (channels,)
        The channel on the other side of each.

    Returns
    -------
    coarse : Tensor, shape (I, J, K, channels)
    sub : callable
        As `refine` takes it.
    """
    channels = len(swap)
    coarse, edges = _split(straight, channels)
    if mirrored is None:
        between = Quarters(coarse)
        return coarse, lambda where: between(where) + _corrected(network, head, edges, where)
    turned, turned_edges = _split(mirrored, channels)
    last = len(coarse) - 1
    coarse = (coarse + turned.flip(0)[..., swap]) / 2
    between = Quarters(coarse)  # linear, so that of the mean is the mean of both

    def sub(where: Tensor) -> Tensor:
        other = torch.stack((last - where[:, 0], where[:, 1], where[:, 2]), 1)
        found = _corrected(network, head, turned_edges, other).reshape(-1, 2, 4, channels)
        found = found.flip(1).reshape(-1, 8, channels)[..., swap]
        return between(where).add_(_corrected(network, head, edges, where).add_(found), alpha=0.5)

    return coarse, sub


def _corrected(network: nn.Module, head: int, edges: Tensor, where: Tensor) -> Tensor:
    """The corrections (n, 8, channels) of some voxels of a volume of features."""
    return network.corrections(edges[where[:, 0], where[:, 1], where[:, 2]], head)


def _split(body: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Coarse logits (I, J, K, channels) and features (I, J, K, detail), each contiguous."""
    rows = body.permute(1, 2, 3, 0)
    return rows[..., :channels].contiguous(), rows[..., channels:].contiguous()

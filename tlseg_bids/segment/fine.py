"""The answer at the image's own resolution, found only where it can differ from the coarse one.

A network with a sub-voxel answer gives logits and features at the stem's resolution. These are
blended over the windows; then the eight sub-voxels of a coarse voxel are computed one by one where
the voxel is not settled: near a border between structures, or where the network is in doubt.
Elsewhere all eight take the coarse probabilities. On a brain that is a fifth of the voxels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SETTLED = 0.98
_VOXELS_AT_ONCE = 2**14

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


def both_sides(
    network: nn.Module, head: int, straight: Tensor, mirrored: Tensor | None, swap: Tensor
) -> tuple[Tensor, Sub]:
    """Coarse logits and the way to the fine ones, the mean of an image's and its mirror image's.

    Parameters
    ----------
    network : Module
        With `sub_voxels`.
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
        return coarse, lambda where: network.sub_voxels(coarse, edges, where, head)
    turned, turned_edges = _split(mirrored, channels)
    last = len(coarse) - 1

    def sub(where: Tensor) -> Tensor:
        other = torch.stack((last - where[:, 0], where[:, 1], where[:, 2]), 1)
        found = network.sub_voxels(turned, turned_edges, other, head).reshape(-1, 2, 4, channels)
        found = found.flip(1).reshape(-1, 8, channels)[..., swap]
        return (network.sub_voxels(coarse, edges, where, head) + found) / 2

    return (coarse + turned.flip(0)[..., swap]) / 2, sub


def _split(body: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Coarse logits (I, J, K, channels) and features (I, J, K, detail), each contiguous."""
    rows = body.permute(1, 2, 3, 0)
    return rows[..., :channels].contiguous(), rows[..., channels:].contiguous()

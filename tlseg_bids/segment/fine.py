"""The answer at the image's own resolution, found only where it can differ from the coarse one.

A network with a sub-voxel answer gives logits and features at the stem's resolution. These are
blended over the windows; then the eight sub-voxels of a coarse voxel are computed one by one where
the voxel is not settled: near a border between structures, or where the network is in doubt.
Elsewhere all eight share the coarse probabilities. On a brain a fifth of the voxels are open.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import SharedRows

SETTLED = 0.98
_VOXELS_AT_ONCE = {"cpu": 2**11, "cuda": 2**16}
"""On a processor so few that what is made of them stays in its cache."""
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


def refine(coarse: Tensor, sub: Sub, heat: float, crew: Crew = ALONE) -> SharedRows:
    """Probabilities at twice the resolution.

    Parameters
    ----------
    coarse : Tensor, shape (I, J, K, channels)
        Logits.
    sub : callable
        Coarse voxels (n, 3) to logits of their sub-voxels (n, 8, channels).
    heat : float
        Temperature that the logits are divided by.
    crew : Crew
        Shares out the open voxels.

    Returns
    -------
    SharedRows
        Of (channels, 2I, 2J, 2K): a row for each coarse voxel, which its sub-voxels share if it is
        settled, then the rows of the sub-voxels of the open ones.
    """
    shape, channels = coarse.shape[:3], coarse.shape[3]
    settled = likely(coarse, heat)
    where = open_voxels(settled)
    count = settled[..., 0].numel()
    rows = torch.empty((count + 8 * len(where), channels), dtype=torch.float16)
    rows[:count] = settled.reshape(-1, channels)
    at_once = _VOXELS_AT_ONCE.get(coarse.device.type, 2**11)

    def fill(start: int) -> None:
        some = where[start : start + at_once]
        first = count + 8 * start
        with torch.inference_mode():
            found = F.softmax(sub(some).div_(heat), 2)
            rows[first : first + 8 * len(some)] = found.reshape(-1, channels)

    for _ in crew.map(fill, range(0, len(where), at_once)):
        pass
    index = torch.arange(count, dtype=torch.int32).reshape(shape)
    index = index[:, None, :, None, :, None].repeat(1, 2, 1, 2, 1, 2)
    x, y, z = where.cpu().T
    index[x, :, y, :, z] = torch.arange(count, len(rows), dtype=torch.int32).reshape(-1, 2, 2, 2)
    return SharedRows(rows.numpy(), index.reshape([2 * n for n in shape]).numpy())


def likely(logits: Tensor, heat: float = 1.0) -> Tensor:
    """Probabilities, float16 on the logits' device, of logits (I, J, K, channels)."""
    out = torch.empty_like(logits, dtype=torch.float16)
    for plane, found in zip(logits, out, strict=True):
        found.copy_(F.softmax(plane / heat, 2))
    return out


class Quarters:
    """A volume read linearly a quarter of a voxel off the centres of its voxels.

    Parameters
    ----------
    volume : Tensor, float32, shape (I, J, K, channels)
        Its border voxels stand for what lies outside.
    """

    def __init__(self, volume: Tensor) -> None:
        *shape, channels = volume.shape
        self._table = volume.reshape(-1, channels)
        self._steps = (shape[1] * shape[2], shape[2], 1)
        self._last = torch.tensor(shape, device=volume.device) - 1
        self._sides = torch.arange(-1, 2, device=volume.device)
        towards = torch.tensor(list(product((0, 2), repeat=3)), device=volume.device)
        far = torch.tensor(list(product((0, 1), repeat=3)), device=volume.device)
        corners = torch.where(far[None] == 1, towards[:, None], 1)
        self._corners = [corner.reshape(-1) for corner in corners.unbind(2)]
        self._shares = volume.new_tensor(_SHARES)

    def __call__(self, where: Tensor) -> Tensor:
        """Around some voxels, int64 (n, 3), the eight points (n, 8, channels) as `product` has
        them."""
        near = (where[:, :, None] + self._sides).clamp_min(0).minimum(self._last[:, None])
        x, y, z = (
            (near[:, axis] * self._steps[axis])[:, corner]
            for axis, corner in enumerate(self._corners)
        )
        rows = (x + y + z).reshape(-1, 8)
        shares = self._shares.expand(len(rows), 8).contiguous()
        found = F.embedding_bag(rows, self._table, mode="sum", per_sample_weights=shares)
        return found.reshape(len(where), 8, found.shape[1])


def both_sides(
    straight: Tensor,
    mirrored: Tensor | None,
    swap: Tensor,
    prior: Tensor | None,
    corrections: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Sub | None]:
    """Coarse logits and the way to the fine ones, the mean of an image's and its mirror image's.

    Parameters
    ----------
    straight : Tensor, shape (channels [+ detail], I, J, K)
        What the network's `body` gave for the image.
    mirrored : Tensor or None
        The same for the image turned over along the first axis, as it came.
    swap : Tensor of int, shape (channels,)
        The channel on the other side of each.
    prior : Tensor or None, shape (I, J, K, channels)
        What a prior adds to the logits.
    corrections : (Tensor, Tensor) or None
        What the network's `corrections` gave; None where only the coarse logits are wanted.

    Returns
    -------
    coarse : Tensor, float32, shape (I, J, K, channels)
    sub : callable
        As `refine` takes it; None without `corrections`.
    """
    channels = len(swap)
    straight = straight.permute(1, 2, 3, 0)
    coarse = torch.empty((*straight.shape[:3], channels), device=straight.device)
    if mirrored is not None:
        mirrored = mirrored.permute(1, 2, 3, 0)
    for i, plane in enumerate(coarse):  # one by one: no copy of the whole is made
        plane.copy_(straight[i, ..., :channels])
        if mirrored is not None:
            plane.add_(mirrored[-1 - i][..., swap]).div_(2)
        if prior is not None:
            plane.add_(prior[i])
    if corrections is None:
        return coarse, None
    sides: list[tuple[Tensor, int | None]] = [(straight, None)]
    if mirrored is not None:
        # The corrections are linear: those of both sides are one product with both weights.
        weight, bias = corrections
        turned = weight.reshape(2, 4, channels, -1).flip(0)[:, :, swap].reshape(weight.shape)
        turned_bias = bias.reshape(2, 4, channels).flip(0)[:, :, swap].reshape(bias.shape)
        corrections = torch.cat((weight, turned), 2) / 2, (bias + turned_bias) / 2
        sides.append((mirrored, len(coarse) - 1))
    return coarse, partial(_sub, Quarters(coarse), sides, corrections)


def _sub(
    between: Quarters, sides: list[tuple[Tensor, int | None]], corrections: tuple[Tensor, Tensor],
    where: Tensor,
) -> Tensor:  # fmt: skip
    """Logits (n, 8, channels) of the sub-voxels of some coarse voxels (n, 3).

    `sides`: bodies (I, J, K, channels + detail), each with the last index along the first axis if
    it is mirrored; `corrections`: weights (8, channels, sides · detail) and bias (8, channels).
    """
    weight, bias = corrections
    x, y, z = where.T
    channels = bias.shape[1]
    edges = torch.cat(
        [body[x if last is None else last - x, y, z][:, channels:] for body, last in sides], 1
    ).float()
    out = torch.addmm(bias.flatten(), edges, weight.flatten(0, 1).T)
    return out.reshape(len(where), 8, channels).add_(between(where))

"""The answer at the image's own resolution, found only where it can differ from the coarse one.

A network with a sub-voxel answer gives logits and features at the stem's resolution. These are
blended over the windows; then the eight sub-voxels of a coarse voxel are computed one by one where
the voxel is not settled: at a border between structures, or where the network is in doubt.
Elsewhere all eight share the coarse probabilities. Of the box around a brain a quarter to a third
of the voxels are open.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import SharedRows
from tlseg_bids.segment.walk import blend

SETTLED = 0.98
_VOXELS_AT_ONCE = 2**11, 2**17
"""On a core, and on a GPU."""
_SHARES = [a * b * c for a, b, c in product((0.75, 0.25), repeat=3)]
"""Of a voxel and its neighbours at a point a quarter of a voxel off its centre, as `product`."""

Sub = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Around:
    """A volume of coarse voxels (I, J, K) in which a smaller one begins at `corner`."""

    shape: Sequence[int]
    corner: Sequence[int]

    def place(self, size: Sequence[int], factor: int = 1) -> tuple[slice, ...]:
        """Where a volume of `size` lies in it, in voxels `factor` times as small."""
        ends = zip(self.corner, size, strict=True)
        return tuple(slice(factor * c, factor * (c + n)) for c, n in ends)


def open_voxels(coarse: Tensor, crew: Crew = ALONE) -> Tensor:
    """Coarse voxels whose sub-voxels may differ: (n, 3) int64.

    Parameters
    ----------
    coarse : Tensor, shape (I, J, K, channels)
        Probabilities.
    crew : Crew
        Shares out the planes.
    """
    label = torch.empty(coarse.shape[:3], dtype=torch.int16, device=coarse.device)
    doubt = torch.empty(coarse.shape[:3], dtype=torch.bool, device=coarse.device)

    def look(i: int) -> None:
        with torch.inference_mode():
            values, labels = coarse[i].max(2)
            label[i] = labels
            doubt[i] = values < SETTLED

    crew.each(look, range(len(coarse)))
    return (doubt | _borders(label)).nonzero()


def _borders(label: Tensor) -> Tensor:
    """Voxels (I, J, K) that share a face with one of another label."""
    found = torch.zeros_like(label, dtype=torch.bool)
    for axis, size in enumerate(label.shape):
        low, high = (slice(n, n + size - 1) for n in (0, 1))
        low, high = ((slice(None),) * axis + (part,) for part in (low, high))
        differ = label[low] != label[high]
        found[low] |= differ
        found[high] |= differ
    return found


def refine(
    coarse: Tensor, sub: Sub, heat: float, crew: Crew = ALONE, around: Around | None = None
) -> SharedRows:
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
    around : Around, optional
        The coarse voxels that these lie among; none but these if not given.

    Returns
    -------
    SharedRows
        Of (channels, 2I, 2J, 2K), or of what is around: a row for each coarse voxel, which its
        sub-voxels share if it is settled, the rows of the sub-voxels of the open ones, and that of
        the background around them; on the logits' device.
    """
    shape, channels, there = coarse.shape[:3], coarse.shape[3], coarse.device
    settled = likely(coarse, heat, crew)
    where = open_voxels(settled, crew)
    plane = shape[1] * shape[2]
    count = shape[0] * plane
    last = count + 8 * len(where)
    rows = torch.empty((last + 1, channels), dtype=torch.float16, device=there)
    rows[last] = 0
    rows[last, 0] = 1
    around = around or Around(shape, (0, 0, 0))
    index = torch.full([2 * n for n in around.shape], last, dtype=torch.int32, device=there)
    own = index[around.place(shape, 2)]
    for axis, size in zip((0, 2, 4), shape, strict=True):
        own = own.unflatten(axis, (size, 2))
    first = torch.arange(count, dtype=torch.int32, device=there).reshape(*shape)
    step = torch.zeros_like(first)
    x, y, z = where.T
    first[x, y, z] = torch.arange(count, last, 8, dtype=torch.int32, device=there)
    step[x, y, z] = 1
    parts = torch.arange(8, dtype=torch.int32, device=there).reshape(2, 1, 2, 1, 2)

    def share(i: int) -> None:
        with torch.inference_mode():
            rows[i * plane : (i + 1) * plane] = settled[i].reshape(-1, channels)
            own[i] = first[i, :, None, :, None] + step[i, :, None, :, None] * parts

    def fill(start: int) -> None:
        some = where[start : start + at_once]
        ends = [count + 8 * n for n in (start, start + len(some))]
        with torch.inference_mode():
            found = F.softmax(sub(some).div_(heat), 2)
            rows[slice(*ends)] = found.reshape(-1, channels)

    at_once = crew.pieces_of(*_VOXELS_AT_ONCE)
    crew.each(share, range(shape[0]))
    crew.each(fill, range(0, len(where), at_once))
    return SharedRows(rows, index)


def likely(logits: Tensor, heat: float = 1.0, crew: Crew = ALONE) -> Tensor:
    """Probabilities, float16 on the logits' device, of logits (I, J, K, channels)."""
    out = torch.empty_like(logits, dtype=torch.float16)

    def fill(i: int) -> None:
        with torch.inference_mode():
            out[i].copy_(F.softmax(logits[i] / heat if heat != 1 else logits[i], 2))

    crew.each(fill, range(len(out)))
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
        self._steps = torch.tensor([shape[1] * shape[2], shape[2], 1], device=volume.device)
        self._last = torch.tensor(shape, device=volume.device) - 1
        towards = torch.tensor(list(product((-1, 1), repeat=3)), device=volume.device)
        far = torch.tensor(list(product((0, 1), repeat=3)), device=volume.device)
        self._corners = (towards[:, None] * far[None]).reshape(-1, 3)
        self._off = (self._corners * self._steps).sum(1)
        self._shares = torch.tensor(_SHARES, device=volume.device)

    def __call__(self, where: Tensor) -> Tensor:
        """Around some voxels, int64 (n, 3), the eight points (n, 8, channels) as `product` has
        them."""
        rows = sum(one * step for one, step in zip(where.unbind(1), self._steps, strict=True))
        rows = rows[:, None] + self._off
        edge = ((where == 0) | (where == self._last)).any(1).nonzero()[:, 0]
        if len(edge):
            near = (where[edge][:, None] + self._corners).clamp_min(0).minimum(self._last)
            rows[edge] = (near * self._steps).sum(2)
        rows = rows.reshape(-1, 8)
        shares = self._shares.expand(len(rows), 8).contiguous()
        found = F.embedding_bag(rows, self._table, mode="sum", per_sample_weights=shares)
        return found.reshape(len(where), 8, found.shape[1])


@dataclass(frozen=True, eq=False)
class Side:
    """What a network's `body` gave for an image, or for its mirror image, as it came.

    Parameters
    ----------
    logits : Tensor, shape (channels, i, J, K)
        The planes are the first `i` of I of the image, or of the mirror image.
    edges : Tensor, shape (detail, i, J, K), or None
    share : Tensor, float32, shape (I,)
        How much of it is in each plane of the answer; 0 where it has no plane.
    swap : Tensor of int, shape (channels,), or None
        The channel on the other side of each, where the image was turned over.
    """

    logits: Tensor
    edges: Tensor | None
    share: Tensor
    swap: Tensor | None = None

    def planes(self, x: Tensor | int) -> Tensor | int:
        """Where some planes of the answer lie here."""
        return x if self.swap is None else len(self.share) - 1 - x

    @cached_property
    def table(self) -> Tensor:
        """The edges' voxels as rows, (i·J·K, detail)."""
        return self.edges.permute(1, 2, 3, 0).flatten(0, 2)


def shares(size: int, reach: int) -> Tensor:
    """Of two sides that reach over `reach` of `size` planes, the first one's shares, (size,).

    Where both are, they are blended like windows; the other side's shares are those turned over.
    """
    found = torch.zeros(size)
    found[:reach] = blend(size, reach, [0, size - reach], 1)[0]
    return found


def both_sides(
    sides: Sequence[Side],
    prior: Tensor | None,
    corrections: tuple[Tensor, Tensor] | None,
    crew: Crew = ALONE,
) -> tuple[Tensor, Sub | None]:
    """Coarse logits and the way to the fine ones, from an image and its mirror image.

    Parameters
    ----------
    sides : sequence of Side
        Whose shares add up to 1 in every plane.
    prior : Tensor or None, shape (I, J, K, channels)
        What a prior adds to the logits.
    corrections : (Tensor, Tensor) or None
        What the network's `corrections` gave; None where only the coarse logits are wanted.
    crew : Crew
        Shares out the planes.

    Returns
    -------
    coarse : Tensor, float32, shape (I, J, K, channels)
    sub : callable
        As `refine` takes it; None without `corrections`.
    """
    (channels, _, *plane), size = sides[0].logits.shape, len(sides[0].share)
    coarse = torch.empty((size, *plane, channels), device=sides[0].logits.device)

    def fill(i: int) -> None:  # one plane at a time: no copy of the whole is made
        with torch.inference_mode():
            there = [(side, float(side.share[i])) for side in sides if side.share[i] > 0]
            plane = coarse[i]
            for number, (side, share) in enumerate(there):
                found = side.logits[:, side.planes(i)].permute(1, 2, 0)
                found = found if side.swap is None else found[..., side.swap]
                if number:
                    plane.add_(found, alpha=share)
                else:
                    torch.mul(found, share, out=plane)
            if prior is not None:
                plane.add_(prior[i])

    crew.each(fill, range(size))
    if corrections is None:
        return coarse, None
    own = [_turned(*corrections, side) for side in sides]
    return coarse, partial(_sub, Quarters(coarse), list(zip(sides, own, strict=True)))


def _turned(weight: Tensor, bias: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Corrections (8, channels, detail) and (8, channels) as (detail, 8·channels), (8·channels,).

    Those of a mirror image for the sub-voxels and channels that they are once it is turned back.
    Features in bfloat16 are multiplied with weights in bfloat16, to which `tlseg-train export` has
    rounded them before.
    """
    if (swap := side.swap) is not None:
        weight, bias = (
            one.reshape(2, 4, *one.shape[1:]).flip(0)[:, :, swap].reshape(one.shape)
            for one in (weight, bias)
        )
    kind = torch.bfloat16 if side.edges.dtype == torch.bfloat16 else torch.float32
    return weight.flatten(0, 1).T.to(kind).contiguous(), bias.flatten()


def _sub(
    between: Quarters, sides: list[tuple[Side, tuple[Tensor, Tensor]]], where: Tensor
) -> Tensor:
    """Logits (n, 8, channels) of the sub-voxels of some coarse voxels (n, 3).

    `sides` with their corrections as `_turned` gives them.
    """
    x, y, z = where.T
    out = between(where).flatten(1)
    for side, (weight, bias) in sides:
        share = side.share.to(x.device)[x][:, None]
        if not share.any():
            continue
        _, rows, columns = side.edges.shape[1:]
        planes = side.planes(x).clamp(0, side.edges.shape[1] - 1)  # one of no share is not read
        edges = side.table.index_select(0, (planes * rows + y) * columns + z)
        found = torch.mm(edges.to(weight.dtype), weight)
        if (share == 1).all():
            out.add_(found).add_(bias)
        else:
            out.add_(share * (found + bias))
    return out.reshape(len(where), 8, -1)

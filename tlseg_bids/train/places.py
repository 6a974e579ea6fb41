"""Where in the template a training example lies, and which of several networks learns from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.errors import UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.synth import Random

KINDS = ("patches", "windows", "tiles", "views", "voxels")
PLACED = ("windows", "tiles", "views")


@dataclass(frozen=True)
class Places:
    """The table ``[places]`` of a recipe.

    Parameters
    ----------
    kind : str
        ``patches`` anywhere in the box; ``windows``, where a card's strategy has them, all for one
        network; ``tiles``, each with a network of its own; ``views``, slabs of slices across an
        axis, each axis with a network of its own; ``voxels`` of a patch, for a network that answers
        voxel by voxel.
    begins : list of 3 lists of int
        Of windows and tiles: first voxels along each axis of the box, as in the card's strategy.
    axes : list of int
        Of views: for each network the axis that its slices are stacked along.
    slices : int
        Of views: how many an example has; the recipe's `patch` gives their sides.
    merged : list of int
        Networks that are not taught to tell left from right (sagittal slices).
    voxels, rim : int
        Of voxels: how many an example has, half of them in structures, the others up to `rim`
        voxels (diagonals count) around them.
    """

    kind: str = "patches"
    begins: list[list[int]] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)
    slices: int = 8
    merged: list[int] = field(default_factory=list)
    voxels: int = 128
    rim: int = 5

    def __post_init__(self) -> None:
        where = "the recipe's table [places]"
        if self.kind not in KINDS:
            raise UsageError(f"unknown kind '{self.kind}'", where, f"use {', '.join(KINDS)}")
        needed = {"windows": "begins", "tiles": "begins", "views": "axes"}.get(self.kind)
        if needed and not getattr(self, needed):
            raise UsageError(f"{self.kind} lack '{needed}'", where, "see the docstring of Places")

    @property
    def count(self) -> int:
        """How many networks share the volume; 0 where there is one for all of it."""
        return {"tiles": len(list(product(*self.begins))), "views": len(self.axes)}.get(
            self.kind, 0
        )


class Spot(NamedTuple):
    """Centre of the first voxel in template mm, voxels along each axis, number of the network."""

    corner: np.ndarray
    sides: tuple[int, int, int]
    member: int | None


def draw_spot(
    rng: Random, places: Places, sides: Sequence[int], box_mm: list[list[float]],
    spacing_mm: float,
) -> Spot:  # fmt: skip
    """A window, a tile, or a slab of slices.

    Parameters
    ----------
    sides : sequence of 3 int
        Voxels of the recipe's patch.
    """
    low = np.array([ends[0] for ends in box_mm]) + spacing_mm / 2
    if places.kind != "views":
        begins = list(product(*places.begins))
        number = rng.below(len(begins))
        member = number if places.kind == "tiles" else None
        return Spot(low + np.array(begins[number]) * spacing_mm, tuple(sides), member)
    member = rng.below(places.count)
    axis = places.axes[member]
    shape = list(sides)
    shape[axis] = places.slices
    free = [
        max((high - bottom) / spacing_mm - n, 0)
        for (bottom, high), n in zip(box_mm, shape, strict=True)
    ]
    first = np.array([int(rng.one(0, n + 0.999)) for n in free])
    return Spot(low + first * spacing_mm, tuple(shape), member)


def one_sided(protocol: str) -> np.ndarray:
    """Channel of each channel of a protocol where left and right are one: the first of both."""
    mirror = load_protocol(protocol).mirror
    return np.minimum(mirror, np.arange(len(mirror)))


def draw_voxels(rng: Random, target: Tensor, known: Tensor, places: Places) -> Tensor:
    """Voxels (n, 3) that an example learns from: in structures, and close around them.

    Parameters
    ----------
    target, known : Tensor, shapes (1, channels, I, J, K) and (1, I, J, K)
        Where nothing is known of the whole patch, voxels that teach nothing are drawn.
    """
    inside = target[0, 1:].sum(0) > 0.5
    near = F.max_pool3d(inside[None].float(), 2 * places.rim + 1, 1, places.rim)[0] > 0
    found = []
    for some in (inside, near & ~inside):
        pool = torch.nonzero(some & (known[0] > 0))
        if not len(pool):
            pool = torch.nonzero(known[0] > 0)
        if not len(pool):
            pool = torch.nonzero(known[0] >= 0)
        chosen = [rng.below(len(pool)) for _ in range(places.voxels // 2)]
        found.append(pool[chosen])
    return torch.cat(found)

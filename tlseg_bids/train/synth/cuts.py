"""What is missing from a scan: the skull, the face, or what lay outside the field of view."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import IGNORE, Classes
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.shape import Place, along_axes, smooth_field

_REACH = 3


def brain_mask(rng: Random, classes: Classes, numbers: Tensor, fluid: bool = False) -> Tensor:
    """True in the brain (I, J, K), and where nothing is known; `fluid`: around it too."""

    def make() -> Tensor:
        keep = np.zeros(256, bool)
        keep[: len(classes.target)] = (classes.target > 0) & (fluid | (classes.kind != "csf"))
        keep[IGNORE] = True
        return torch.as_tensor(keep)

    table = rng.resident(classes, f"brain mask, fluid {fluid}", make)
    return table.index_select(0, numbers.flatten().to(torch.int32)).reshape(numbers.shape)


def _tent(size: int) -> Tensor:
    """A smoothing matrix (size, size) that reaches `_REACH` voxels."""
    apart = torch.arange(size, dtype=torch.float32)
    weight = (_REACH + 1 - (apart[:, None] - apart).abs()).clamp_min(0)
    return weight / (_REACH + 1) ** 2


def strip_skull(rng: Random, classes: Classes, numbers: Tensor) -> Tensor:
    """True (I, J, K) where a skull-stripped scan keeps its voxels.

    All brain stays, and up to 3 voxels around it; how much differs from place to place, as
    between the tools that strip skulls.
    """
    brain = brain_mask(rng, classes, numbers)
    kept = rng.one()
    if kept < 0.15:
        return brain
    share = brain.float()
    near = along_axes([_tent(n).to(rng.device, non_blocking=True) for n in numbers.shape], share)
    level = smooth_field(rng, 1, tuple(numbers.shape), 20)[0]
    level = level.mul_(rng.one(0, 0.12)).add_(rng.one(0.03, 0.4)).clamp_(0.01, 0.6)
    return brain | (near > level)


def deface(rng: Random, classes: Classes, numbers: Tensor, place: Place) -> Tensor:
    """True (I, J, K) where a defaced scan keeps its voxels.

    A plane that leans from the forehead to the neck takes away what lies in front of it and below;
    it passes the brain and its fluid by 2 to 20 mm (cf. Schimke & Hale 2011, "Quickshear").
    Template y points to the front, z up.
    """
    angle = math.radians(rng.one(15, 60))
    _, y, z = place.positions
    ahead = (y * math.cos(angle)).sub_(z, alpha=math.sin(angle))
    brain = brain_mask(rng, classes, numbers, fluid=True)
    front = torch.where(brain, ahead, -math.inf).amax()
    return brain | (ahead <= front + rng.one(2, 20))


def field_of_view(rng: Random, size: tuple[int, ...], spacing_mm: float) -> Tensor:
    """True inside a random box that cuts up to 60 mm off any side (a cropped scan)."""
    inside = torch.ones(size, dtype=torch.bool, device=rng.device)
    for axis in range(3):
        for side in range(2):
            if rng.chance(0.4):
                cut = min(int(rng.one(0, 60) / spacing_mm), size[axis])
                inside.narrow(axis, (size[axis] - cut) * side, cut).fill_(False)
    return inside

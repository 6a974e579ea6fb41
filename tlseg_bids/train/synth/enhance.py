"""Contrast agent: where gadolinium makes a T1w scan bright.

What lacks a blood-brain barrier, and blood itself, takes it up (Smirniotopoulos et al. 2007,
doi:10.1148/rg.272065154): vessels and sinuses, dura and falx, choroid plexus, mucosa, muscle.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import Classes
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.shape import Place, smooth_field

_DURA_MM = 1.0
_FALX_ABOVE_MM = 5.0
# Slope of a cubic B-spline field of unit variance, times the distance of its control points:
# the integral of the basis' squared slope (2/3) over that of its square (151/315).
_SLOPE2 = (2 / 3) / (151 / 315)


def kinds(rng: Random, classes: Classes, *names: str) -> Tensor:
    """Table (256,) of bool on the device: the class is of one of these kinds (`extra`: any)."""

    def make() -> Tensor:
        found = np.isin(classes.kind, names) | (classes.extra & ("extra" in names))
        return torch.as_tensor(np.pad(found, (0, 256 - len(found))))

    return rng.resident(classes, "kinds " + " ".join(names), make)


def has_kind(rng: Random, classes: Classes, numbers: Tensor, *names: str) -> Tensor:
    """True where a voxel of numbers (I, J, K) is of one of these kinds."""
    table = kinds(rng, classes, *names)
    return table.index_select(0, numbers.flatten().to(torch.int32)).reshape(numbers.shape)


def grown(mask: Tensor) -> Tensor:
    """A mask (I, J, K) and the six neighbours of its voxels."""
    out = mask.clone()
    for axis in range(3):
        n = mask.shape[axis]
        out.narrow(axis, 1, n - 1).logical_or_(mask.narrow(axis, 0, n - 1))
        out.narrow(axis, 0, n - 1).logical_or_(mask.narrow(axis, 1, n - 1))
    return out


def uptake(rng: Random, classes: Classes, numbers: Tensor) -> Tensor:
    """Share (I, J, K) by which whole classes enhance: column `gadolinium` of the contrast table."""
    row = classes.tissue.clip(0)
    usual = np.where(classes.tissue >= 0, classes.contrasts["gadolinium"].to_numpy()[row], 0)
    table = torch.as_tensor(usual, dtype=torch.float32) * (0.3 + 0.9 * rng.shares(len(row)))
    table = torch.nn.functional.pad(table.clamp_max(1), (0, 256 - len(table))).to(
        rng.device, non_blocking=True
    )
    return table.index_select(0, numbers.flatten().to(torch.int32)).reshape(numbers.shape)


def dura(rng: Random, classes: Classes, numbers: Tensor, place: Place | None) -> Tensor:
    """Share (I, J, K) by which the outer rim of the fluid around the brain enhances, and the falx.

    The rim lies against skull, sinus or skin; a label map without them has none. The falx is the
    fluid in the mid-sagittal plane (template x = 0) above the middle of the brain.
    """
    spacing_mm = place.spacing_mm if place else 1.0
    fluid = has_kind(rng, classes, numbers, "csf")
    where = fluid & grown(has_kind(rng, classes, numbers, "extra"))
    if place is not None:
        x, _, z = place.positions
        half = max(_DURA_MM, spacing_mm) / 2
        where |= fluid & (x.abs() <= half) & (z > _FALX_ABOVE_MM)
    patchy = smooth_field(rng, 1, tuple(numbers.shape), 25 / spacing_mm)[0]
    amount = patchy.mul_(0.25).add_(rng.one(0.2, 0.8)).clamp_(0, 1)
    return amount.mul_(where).mul_(min(1.0, _DURA_MM / spacing_mm))


def choroid_plexus(rng: Random, classes: Classes, numbers: Tensor, spacing_mm: float) -> Tensor:
    """Share (I, J, K) by which tufts of 3 to 6 mm inside the ventricles enhance."""
    tuft = smooth_field(rng, 1, tuple(numbers.shape), rng.one(3, 6) / spacing_mm)[0]
    tuft.sub_(rng.one(0.5, 1.3)).mul_(3).clamp_(0, 1)
    return tuft.mul_(has_kind(rng, classes, numbers, "ventricle"))


def vessels(rng: Random, classes: Classes, numbers: Tensor, spacing_mm: float) -> Tensor:
    """Share (I, J, K) by which thin tubes enhance: inside the brain, wider in its sulci.

    A tube is where two smooth random fields are both zero: the intersection of two surfaces. Its
    Gaussian profile is narrower than a voxel in the brain, so that it fills it in part only.
    """
    size, every = tuple(numbers.shape), rng.one(10, 22)
    one, other = (smooth_field(rng, 1, size, every / spacing_mm)[0] for _ in range(2))
    off_axis = one.square_().add_(other.square_())
    fluid = has_kind(rng, classes, numbers, "csf")
    amount = torch.zeros_like(off_axis)
    narrow, wide = rng.one(0.25, 0.5), rng.one(0.4, 0.9)
    brain = rng.resident(
        classes,
        "brain",
        lambda: torch.as_tensor(np.pad(classes.target > 0, (0, 256 - len(classes.target)))),
    )
    inside = brain.index_select(0, numbers.flatten().to(torch.int32)).reshape(size) & ~fluid
    for where, radius in ((inside, narrow), (fluid, wide)):
        seen = max(radius, 0.4 * spacing_mm)
        spread = 4 * _SLOPE2 * (seen / every) ** 2
        amount.add_(torch.exp(off_axis * (-1 / spread)).mul_(where), alpha=(radius / seen) ** 2)
    return amount


def enhance(
    rng: Random, classes: Classes, numbers: Tensor, image: Tensor, place: Place | None = None
) -> Tensor:
    """An image (I, J, K) after contrast agent: nothing gets darker.

    Each compartment joins in by chance, so that a scan may show vessels alone.
    """
    spacing_mm = place.spacing_mm if place else 1.0
    amount = uptake(rng, classes, numbers)
    if rng.chance(0.7):
        amount = torch.maximum(amount, dura(rng, classes, numbers, place))
    if rng.chance(0.8):
        amount = torch.maximum(amount, choroid_plexus(rng, classes, numbers, spacing_mm))
    if rng.chance(0.9):
        amount = torch.maximum(amount, vessels(rng, classes, numbers, spacing_mm))
    bright = rng.one(0.95, 1.6)
    rise = (bright - image).clamp_min_(0).mul_(amount.clamp_(0, 1))
    return image + rise.mul_(rng.one(0.4, 1.0))

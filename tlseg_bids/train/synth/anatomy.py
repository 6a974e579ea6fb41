"""An image of a label map: means, sub-structures, grain and contrast agent."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import Classes
from tlseg_bids.train.synth.contrast import Contrast, Own, draw_contrast
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.enhance import enhance
from tlseg_bids.train.synth.mix import Mix
from tlseg_bids.train.synth.shape import Place, smooth_field

_PARTS_MM = ((15.0, 40.0), (4.0, 10.0))


def per_number(values: Tensor, rest: float) -> Tensor:
    """A table (..., 256) over class numbers from values (..., classes); `rest`: of the unknown."""
    return torch.nn.functional.pad(values, (0, 256 - values.shape[-1]), value=rest)


def sub_structure(
    rng: Random, steps: Tensor, index: Tensor, size: tuple[int, ...], spacing_mm: float
) -> Tensor:
    """What parts of structures differ by from their mean, (I, J, K).

    A smooth field squeezed to two plateaus divides every structure into parts: one field
    of 15 to 40 mm (regions of white matter or muscle and fat), one of 4 to 10 mm (nuclei, layers).
    How far the parts lie apart is in `steps` (2, 256), per class: together a mixture of up to four
    components per structure (cf. Ashburner & Friston 2005, doi:10.1016/j.neuroimage.2005.02.018).
    """
    total = None
    for (low, high), apart in zip(_PARTS_MM, steps.to(rng.device, non_blocking=True), strict=True):
        part = smooth_field(rng, 1, size, rng.one(low, high) / spacing_mm)[0]
        part = part.add_(rng.one(-0.5, 0.5)).mul_(rng.one(0.8, 4.0)).tanh_()
        part.mul_(apart.index_select(0, index).reshape(size))
        total = part if total is None else total.add_(part)
    return total


def grain(rng: Random, size: tuple[int, ...], spacing_mm: float) -> Tensor:
    """Texture (I, J, K) that every voxel has: white, and smooth over about 6 mm."""
    values = rng.normal(*size).mul_(rng.one(0.3, 1))
    return values.add_(smooth_field(rng, 1, size, 6 / spacing_mm)[0], alpha=rng.one(0, 0.45))


def paint(
    rng: Random, classes: Classes, numbers: Tensor, mix: Mix, place: Place | None = None,
    own: Own | None = None,
) -> Tensor:  # fmt: skip
    """An image (I, J, K) of a map of class numbers (I, J, K).

    `place` tells where the falx can be and how large a voxel is; without it, voxels are 1 mm.
    `own` is how the classes look in the scan that the map is of.
    """
    contrast = draw_contrast(rng, classes, mix, own)
    spacing_mm = place.spacing_mm if place else 1.0
    parts = rng.chance(mix.substructure)
    image = tissue(rng, classes, contrast, numbers, spacing_mm, parts)
    if contrast.weighting != "T2w" and rng.chance(mix.gadolinium):
        image = enhance(rng, classes, numbers, image, place)
    return image


def tissue(
    rng: Random, classes: Classes, contrast: Contrast, numbers: Tensor, spacing_mm: float,
    parts: bool,
) -> Tensor:  # fmt: skip
    """Intensities (I, J, K) of class numbers in a contrast; `parts`: with sub-structures.

    What nothing is known of looks like the mean of the brain.
    """
    size = tuple(numbers.shape)
    index = numbers.flatten().to(torch.int32)
    brain = torch.as_tensor(np.asarray(classes.target) > 0)
    middle = float(contrast.means[brain].mean()) + 0.1 * rng.one(-1, 1)
    means = per_number(contrast.means, middle).to(rng.device, non_blocking=True)
    deviations = per_number(contrast.deviations, 0.03).to(rng.device, non_blocking=True)
    image = grain(rng, size, spacing_mm)
    image.mul_(deviations.index_select(0, index).reshape(size))
    image.add_(means.index_select(0, index).reshape(size))
    if parts:
        partner = torch.as_tensor(np.minimum(classes.mirror, np.arange(len(classes.mirror))))
        drawn = rng.vector(2, len(partner))[:, partner] * math.exp(rng.one(-0.7, 0.5))
        steps = per_number(drawn * contrast.texture, 0.03)
        image.add_(sub_structure(rng, steps, index, size, spacing_mm))
    return image

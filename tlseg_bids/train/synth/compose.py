"""One training example: read, paint or take the real image, cut, acquire."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import IGNORE, Classes, Sample
from tlseg_bids.train.synth.anatomy import paint
from tlseg_bids.train.synth.contrast import Own, own_contrast
from tlseg_bids.train.synth.cuts import deface, field_of_view, strip_skull
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.mix import Mix
from tlseg_bids.train.synth.scanner import Kept, acquire
from tlseg_bids.train.synth.shape import Place, read_classes, read_image

_FEWEST = 1000
"""Voxels of a brain that can say how bright it is."""


def example(
    rng: Random, sample: Sample, classes: Classes, positions: Tensor, spacing_mm: float, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Image and protocol channels (`IGNORE` where unknown), (I, J, K) each, on `rng.device`.

    The image is (C, I, J, K) where the sample shows several together.

    Parameters
    ----------
    positions : Tensor
        (3, I, J, K) template positions in mm on `rng.device`, see `deformed_positions`.
    spacing_mm : float
        Voxel size of the patch.
    """
    matrix, place = sample.template_from_voxel, Place(positions, spacing_mm)
    here = rng.resident(sample, "classes", lambda: sample.classes)
    numbers = read_classes(sample, positions, matrix, here)
    bare = bool(sample.images)
    real = bare and rng.chance(mix.real)
    further = []
    if real:
        names = sorted(sample.images)
        shown = sample.channels or (names[rng.below(len(names))],)
        stored = [rng.resident(sample, f"image {n}", lambda n=n: sample.images[n]) for n in shown]
        image, *further = (
            read_image(sample, name, positions, matrix, one)
            for name, one in zip(shown, stored, strict=True)
        )
    else:
        image, *further = (
            paint(
                rng, classes, numbers, mix.weighted(suffix), place,
                _own(rng, sample, classes, suffix) if bare and mix.own else None,
            )
            for suffix in sample.channels or ("",)
        )  # fmt: skip
    masks = [image > 0] if real else _post_processed(rng, classes, numbers, place, mix, bare)
    if rng.chance(mix.cropped):
        masks.append(field_of_view(rng, tuple(numbers.shape), spacing_mm))
    visible = reduce(torch.logical_and, masks) if masks else None
    for mask in masks[real:]:  # a real image may be 0 where there is brain
        numbers = numbers * mask
    brain = None
    if mix.scaled_by_brain and not real and rng.chance(mix.scaled_by_brain):
        brain = _brain(rng, sample, classes, numbers)
    how = spacing_mm, mix, real, Kept(visible, brain)
    image = acquire(rng, image, *how)
    if further:
        image = torch.stack([image, *(acquire(rng, one, *how) for one in further)])
    return image, _channels(rng, sample, classes, numbers)


def _own(rng: Random, sample: Sample, classes: Classes, suffix: str = "") -> Own:
    """How one of the sample's images, or that of a suffix, shows its classes; measured once."""
    names = [suffix] if suffix in sample.images else sorted(sample.images)
    name, count = names[rng.below(len(names))], len(classes.index)
    table = rng.resident(
        sample, f"contrast {name}",
        lambda: own_contrast(sample.images[name].cpu(), sample.classes.cpu(), count),
    )  # fmt: skip
    return Own(table.cpu(), name)


def _post_processed(
    rng: Random, classes: Classes, numbers: Tensor, place: Place, mix: Mix, bare: bool
) -> list[Tensor]:
    """Where a painted image remains after its skull or face was taken away; none: everywhere.

    `bare`: the sample has no skull, so that its image is never a whole head.
    """
    if bare or rng.chance(mix.skull_stripped):
        return [strip_skull(rng, classes, numbers)]
    if rng.chance(mix.defaced):
        return [deface(rng, classes, numbers, place)]
    return []


def _brain(rng: Random, sample: Sample, classes: Classes, numbers: Tensor) -> Tensor:
    """Where the label map has a structure of the protocol; everywhere if it has hardly any."""

    def make() -> Tensor:
        table = torch.zeros(256, dtype=torch.bool)
        table[: len(classes.target)] = torch.as_tensor(classes.target > 0)
        return table

    table = rng.resident(sample, "brain", make)
    brain = table.index_select(0, numbers.flatten().to(torch.int32)).reshape(numbers.shape)
    return brain | (brain.sum() < _FEWEST)


def _channels(rng: Random, sample: Sample, classes: Classes, numbers: Tensor) -> Tensor:
    """Protocol channels int64 (I, J, K) that the sample's labels tell apart."""

    def make() -> Tensor:
        table = np.zeros(256, np.int64)
        table[: len(classes.target)] = np.asarray(sample.group)[classes.target]
        table[IGNORE] = IGNORE
        return torch.as_tensor(table)

    table = rng.resident(sample, "channels", make)
    return table.index_select(0, numbers.flatten().to(torch.int32)).reshape(numbers.shape)

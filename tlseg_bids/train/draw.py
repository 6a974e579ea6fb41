"""Training examples drawn by a recipe, and the atlas that a segmenter is handed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import IGNORE, Sample, folded, load_classes
from tlseg_bids.train.losses import soft_target
from tlseg_bids.train.places import PLACED, Spot, draw_spot, draw_voxels, one_sided
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.synth import Random, aged, deformed_positions, example, read_classes


def atlas(
    samples: list[Sample], box_mm: list[list[float]], spacing_mm: float, mirror: bool = True
) -> Tensor:
    """Mean labels of aligned samples of one protocol and, if `mirror`, their mirror images.

    Where they are known, in the protocol that the samples are learned in.

    Returns
    -------
    Tensor, shape (channels, I, J, K), float32
        Its voxels fill the box and are as near to `spacing_mm` as they can be along each axis;
        voxel (0, 0, 0) is centred half a voxel inside the box's low corner.
    """
    first, matrix = samples[0], samples[0].folding()
    classes = load_classes(first.protocol)
    protocol = first.protocol if matrix is None else load_protocol(first.taught)
    target = torch.as_tensor(np.append(classes.target, np.zeros(256 - len(classes.target), int)))
    target[IGNORE] = IGNORE
    if matrix is not None:
        target = folded(target, first.group, matrix)[0]
    places = _half_voxels(box_mm, spacing_mm)
    mean = _mean_labels(samples, places, target, len(protocol))
    if mirror:
        places[0].neg_()
        other = _mean_labels(samples, places, target, len(protocol))
        mean = (mean + other[torch.as_tensor(protocol.mirror)]) / 2
    smooth = torch.nn.functional.avg_pool3d(mean[None], 3, 1, 1, count_include_pad=False)
    return (mean + smooth[0]) / 2


def _half_voxels(box_mm: list[list[float]], spacing_mm: float) -> Tensor:
    """Centres (3, 2I, 2J, 2K) in mm of the halves, along each axis, of voxels that fill a box."""
    axes = []
    for low, high in box_mm:
        count = 2 * round((high - low) / spacing_mm)
        half = (high - low) / count
        axes.append(torch.arange(count, dtype=torch.float32) * half + (low + half / 2))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _mean_labels(samples: list[Sample], places: Tensor, target: Tensor, channels: int) -> Tensor:
    """Mean share (channels, I, J, K) of the channels in 2³ places each, background if unknown.

    `target` (256,) holds the channel of each class number.
    """
    total, known = 0, 0
    for sample in samples:
        numbers = read_classes(sample, places, sample.template_from_voxel)
        share, told = soft_target(target[numbers.long()].to(torch.uint8), channels, 2)
        total, known = total + share[0], known + told[0]
    total = total / known.clamp_min(1e-3)
    total[0] = torch.where(known > 0, total[0], 1.0)
    return total


def prior_patch(
    prior: Tensor, box_mm: list[list[float]], corner_mm: np.ndarray, sides: Sequence[int],
    spacing_mm: float,
) -> Tensor:  # fmt: skip
    """An atlas read linearly at the voxel centres of a patch of `sides` voxels.

    (1, channels, I, J, K); beyond the faces of the box the outermost voxels are repeated. The
    patch has the atlas's axes, so that each is read by a matrix of its own.
    """
    read = prior.float()
    for axis in (2, 1, 0):
        (low, high), count = box_mm[axis], prior.shape[axis + 1]
        mm = corner_mm[axis] + spacing_mm * torch.arange(sides[axis], device=prior.device)
        place = ((mm - low) / (high - low) * count - 0.5).clamp(0, count - 1)
        far = (place[:, None] - torch.arange(count, device=prior.device)).abs()
        weights = (1 - far).clamp_min(0).float()
        # the axes behind are columns of the product
        read = (weights @ read.flatten(axis + 2)) if axis < 2 else read @ weights.T
        read = read.reshape(*prior.shape[: axis + 1], *sides[axis:])
    return read[None]


def mirror_sample(sample: Sample) -> Sample:
    """The same head seen in a mirror: template x negated, left and right labels exchanged."""
    classes, mirror = load_classes(sample.protocol), sample.protocol.mirror
    lut = torch.arange(256, dtype=torch.uint8)
    lut[: len(classes.mirror)] = torch.as_tensor(classes.mirror.astype(np.uint8))
    flip = np.diag([-1.0, 1, 1, 1])
    twin = Sample(**{k: getattr(sample, k) for k in sample.__dataclass_fields__})
    twin.classes = lut.to(sample.classes.device)[sample.classes.long()]
    twin.group = mirror[sample.group[mirror]]
    twin.template_from_voxel = flip @ sample.template_from_voxel
    return twin


@dataclass(frozen=True, eq=False)
class Example:
    """What one step learns from.

    `image` (1, 1, n, n, n); `target` (1, channels, i, m, m) shares of the merged channels and
    `known` (1, i, m, m), where the network answers; `group` (channels,) merges channels; `prior`
    (1, prior channels, m, m, m) or None; `head` and `parts`: what the network is asked for;
    `source`: the dataset that it was drawn from; `age`: in years, NaN where it is not known;
    `member`: the network that learns from it, where several share the volume; `voxels` (n, 3): the
    only ones that are asked for, then `target` is (1, channels, n, 1, 1) and `known` (1, n, 1, 1).
    """

    image: Tensor
    target: Tensor
    known: Tensor
    group: Tensor
    prior: Tensor | None
    head: int = 0
    parts: tuple[tuple[int, ...], ...] = ()
    source: str = ""
    age: float = math.nan
    member: int | None = None
    voxels: Tensor | None = None

    @property
    def asked(self) -> tuple:
        """What must be the same for examples that go through the network together."""
        alone = None if self.voxels is None else id(self)
        return self.head, self.parts, self.member, self.image.shape, alone

    @property
    def more(self) -> dict[str, Any]:
        """What else the network is told."""
        told = {"member": self.member, "voxels": self.voxels}
        return {key: value for key, value in told.items() if value is not None}


class Draw:
    """Draws training examples by the recipe.

    Parameters
    ----------
    samples : dict of str to list of Sample
        Aligned with the template; each is used as it is and, by the recipe, in the mirror.
    priors : list of Tensor
        Atlases, for a network that takes them: those of the last heads, in the heads' order.
    network : Module
        Says how coarse its answers are.
    """

    def __init__(
        self, recipe: Recipe, samples: dict[str, list[Sample]], priors: list[Tensor],
        network: torch.nn.Module,
    ) -> None:  # fmt: skip
        self.recipe, self.priors = recipe, priors
        self.stem, self.fine = network.stem, not network.coarse_only
        self.names = list(samples)
        weights = np.array([recipe.datasets[n].get("weight", 1.0) for n in self.names])
        self.edges = np.cumsum(weights / weights.sum())
        self.samples = {
            n: [t for s in found for t in ((s, mirror_sample(s)) if recipe.mirror else (s,))]
            for n, found in samples.items()
        }

    def __call__(self, rng: Random) -> Example:
        """The next example."""
        recipe = self.recipe
        name = self.names[int(np.searchsorted(self.edges, rng.one() * 0.999999))]
        pool = self.samples[name]
        sample = pool[rng.below(len(pool))]
        classes = load_classes(sample.protocol)
        place = self._place(rng)
        corner, sides = place.corner, place.sides
        positions = deformed_positions(rng, recipe.shape, corner, sides, recipe.spacing_mm)
        rules = recipe.datasets[name]
        mix = replace(recipe.mix, **{**rules.get("mix", {}), "real": rules.get("real", 0.0)})
        positions = aged(rng, recipe.ageing, sample, positions)
        image, channels = example(rng, sample, classes, positions, recipe.spacing_mm, mix)
        parts = self._parts(rng)
        count, merged = len(sample.protocol), sample.group
        if (matrix := sample.folding()) is not None:
            channels, merged = folded(channels, merged, matrix)
            count = len(matrix)
        target, known = self._target(channels, count, parts)
        group = torch.as_tensor(merged, device=image.device)
        if place.member in recipe.places.merged:
            target, group = self._one_sided(target, group, sample.taught)
        voxels = None
        if recipe.places.kind == "voxels":
            voxels = draw_voxels(rng, target, known, recipe.places)
            i, j, k = voxels.T
            target, known = target[:, :, i, j, k, None, None], known[:, i, j, k, None, None]
        head = recipe.heads.index(sample.taught)
        return Example(
            image.reshape(1, -1, *image.shape[-3:]), target, known, group,
            self._prior(corner, sides), head, parts, name, sample.age_years, place.member,
            voxels,
        )  # fmt: skip

    def _parts(self, rng: Random) -> tuple[tuple[int, ...], ...]:
        """Sub-voxels that are asked for; none means the coarse answer."""
        if not self.fine or rng.one() < self.recipe.coarse:
            return ()
        order = [rng.below(8) for _ in range(self.recipe.parts)]
        return tuple(tuple(int(bit) for bit in f"{number:03b}") for number in sorted(set(order)))

    def _target(self, channels: Tensor, count: int, parts: tuple) -> tuple[Tensor, Tensor]:
        """Shares of the channels where the network answers, and the share that is known."""
        if not parts:
            return soft_target(channels, count, self.stem)
        chosen = torch.cat([channels[i::2, j::2, k::2] for i, j, k in parts])
        return soft_target(chosen, count, 1)

    def _one_sided(self, target: Tensor, group: Tensor, protocol: str) -> tuple[Tensor, Tensor]:
        """Target and group without left and right."""
        into = torch.as_tensor(one_sided(protocol), device=target.device)
        return torch.zeros_like(target).index_add_(1, into, target), into[group]

    def _place(self, rng: Random) -> Spot:
        recipe = self.recipe
        if recipe.places.kind in PLACED:
            return draw_spot(rng, recipe.places, recipe.sides, recipe.box_mm, recipe.spacing_mm)
        return Spot(self._corner(rng), recipe.sides, None)

    def _corner(self, rng: Random) -> np.ndarray:
        """Centre of a patch's first voxel, in template mm."""
        recipe = self.recipe
        length = np.array(recipe.sides) * recipe.spacing_mm
        if rng.one() < recipe.centred:
            corner = np.array([rng.one(-14, 14) for _ in range(3)]) - length / 2
        else:
            ranges = [
                (low, max(high - n, low))
                for (low, high), n in zip(recipe.box_mm, length, strict=True)
            ]
            corner = np.array([rng.one(*ends) for ends in ranges])
        return corner + recipe.spacing_mm / 2

    def _prior(self, corner: np.ndarray, sides: Sequence[int]) -> Tensor | None:
        if not self.priors:
            return None
        recipe, stem = self.recipe, self.stem
        first = corner + (stem - 1) / 2 * recipe.spacing_mm
        size, spacing_mm = [n // stem for n in sides], recipe.spacing_mm * stem
        return torch.cat(
            [prior_patch(p, recipe.box_mm, first, size, spacing_mm) for p in self.priors], 1
        )

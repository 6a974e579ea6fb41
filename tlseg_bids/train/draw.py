"""Training examples drawn by a recipe, and the atlas that a segmenter is handed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import Classes, Sample, default_protocol, load_classes
from tlseg_bids.train.losses import soft_target
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.synth import Random, deformed_positions, example, read_classes

PRIOR_SPACING_MM = 4.0


def atlas(
    samples: list[Sample], classes: Classes, channels: int, box_mm: list[list[float]]
) -> Tensor:
    """Mean labels of aligned samples and their mirror images: (channels, I, J, K) at 4 mm.

    Voxel (0, 0, 0) is centred half a voxel inside the box's low corner.
    """
    protocol = default_protocol()
    low = np.array([b[0] for b in box_mm]) + PRIOR_SPACING_MM / 2 - 1.0
    size = [round((b[1] - b[0]) / PRIOR_SPACING_MM) for b in box_mm]
    axes = [
        torch.arange(2 * n, dtype=torch.float32) * PRIOR_SPACING_MM / 2 + float(start)
        for n, start in zip(size, low, strict=True)
    ]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    target = torch.as_tensor(np.append(classes.target, np.zeros(256 - len(classes.target), int)))
    total = torch.zeros(channels, *size)
    for sample in samples:
        numbers = read_classes(sample, positions, sample.template_from_voxel)
        total += soft_target(target[numbers.long()].to(torch.uint8), channels, 2)[0][0]
    total = total / len(samples)
    mirrored = total.flip(1)[torch.as_tensor(protocol.mirror)]
    mean = (total + mirrored)[None] / 2
    smooth = torch.nn.functional.avg_pool3d(mean, 3, 1, 1, count_include_pad=False)
    return (mean + smooth)[0] / 2


def prior_patch(
    prior: Tensor, box_mm: list[list[float]], corner_mm: np.ndarray, size: int, spacing_mm: float
) -> Tensor:
    """The 4 mm atlas read at the voxel centres of a patch: (1, channels, size, size, size)."""
    theta = torch.zeros(1, 3, 4)
    for axis in range(3):
        low, high = box_mm[axis]
        middle = corner_mm[axis] + (size - 1) / 2 * spacing_mm
        theta[0, 2 - axis, 2 - axis] = (size * spacing_mm) / (high - low)
        theta[0, 2 - axis, 3] = (2 * middle - low - high) / (high - low)
    grid = torch.nn.functional.affine_grid(theta, (1, 1, size, size, size), align_corners=False)
    return torch.nn.functional.grid_sample(
        prior[None].float(), grid, padding_mode="border", align_corners=False
    )


def mirror_sample(sample: Sample, classes: Classes, mirror: np.ndarray) -> Sample:
    """The same head seen in a mirror: template x negated, left and right labels exchanged."""
    lut = torch.arange(256, dtype=torch.uint8)
    lut[: len(classes.mirror)] = torch.as_tensor(classes.mirror.astype(np.uint8))
    flip = np.diag([-1.0, 1, 1, 1])
    twin = Sample(**{k: getattr(sample, k) for k in sample.__dataclass_fields__})
    twin.classes = lut[sample.classes.long()]
    twin.group = mirror[sample.group[mirror]]
    twin.template_from_voxel = flip @ sample.template_from_voxel
    return twin


@dataclass(frozen=True, eq=False)
class Example:
    """What one step learns from.

    `image` (1, 1, n, n, n); `target` (1, channels, m, m, m) shares of the merged channels and
    `known` (1, m, m, m) at the network's output resolution; `group` (channels,) merges channels;
    `prior` (1, channels, m, m, m) or None.
    """

    image: Tensor
    target: Tensor
    known: Tensor
    group: Tensor
    prior: Tensor | None


class Draw:
    """Draws training examples by the recipe.

    Parameters
    ----------
    samples : dict of str to list of Sample
        Aligned with the template; each is used as it is and in the mirror.
    prior : Tensor or None
        The atlas, for a network that takes one.
    stem : int
        How much coarser the network's answer is than its input.
    """

    def __init__(
        self, recipe: Recipe, samples: dict[str, list[Sample]], prior: Tensor | None, stem: int
    ) -> None:
        protocol = default_protocol()
        self.recipe, self.prior, self.stem = recipe, prior, stem
        self.classes, self.channels = load_classes(protocol), len(protocol)
        self.names = list(samples)
        weights = np.array([recipe.datasets[n].get("weight", 1.0) for n in self.names])
        self.edges = np.cumsum(weights / weights.sum())
        self.samples = {
            n: [t for s in found for t in (s, mirror_sample(s, self.classes, protocol.mirror))]
            for n, found in samples.items()
        }

    def __call__(self, rng: Random) -> Example:
        """The next example."""
        recipe = self.recipe
        name = self.names[int(np.searchsorted(self.edges, rng.one() * 0.999999))]
        pool = self.samples[name]
        sample = pool[rng.below(len(pool))]
        corner = self._corner(rng)
        positions = deformed_positions(rng, recipe.shape, corner, recipe.patch, recipe.spacing_mm)
        mix = replace(recipe.mix, real=recipe.datasets[name].get("real", 0.0))
        image, channels = example(rng, sample, self.classes, positions, recipe.spacing_mm, mix)
        target, known = soft_target(channels, self.channels, self.stem)
        return Example(
            image[None, None], target, known, torch.as_tensor(sample.group), self._prior(corner)
        )

    def _corner(self, rng: Random) -> np.ndarray:
        """Centre of a patch's first voxel, in template mm."""
        recipe = self.recipe
        length = recipe.patch * recipe.spacing_mm
        if rng.one() < recipe.centred:
            corner = np.array([rng.one(-14, 14) for _ in range(3)]) - length / 2
        else:
            ranges = [(low, max(high - length, low)) for low, high in recipe.box_mm]
            corner = np.array([rng.one(*ends) for ends in ranges])
        return corner + recipe.spacing_mm / 2

    def _prior(self, corner: np.ndarray) -> Tensor | None:
        if self.prior is None:
            return None
        recipe, stem = self.recipe, self.stem
        first = corner + (stem - 1) / 2 * recipe.spacing_mm
        return prior_patch(
            self.prior, recipe.box_mm, first, recipe.patch // stem, recipe.spacing_mm * stem
        )

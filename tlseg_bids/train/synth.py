"""Training examples made on the training device: random shape, contrast, resolution and artefacts.

A label map is deformed and every class receives a random intensity (Billot et al. 2023, SynthSeg,
doi:10.1016/j.media.2023.102789), here drawn mostly near what T1w and T2w look like at each age and
a share of it freely. Real images go through the same deformation and artefacts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.train.dataset import IGNORE, Classes, Sample


@dataclass(frozen=True)
class Shape:
    """Ranges of the random deformation; lengths in mm, angles in degrees, elastic as sd."""

    rotation: float = 8.0
    log_scale: tuple[float, float] = (-0.08, 0.08)
    anisotropy: float = 0.08
    shear: float = 0.05
    shift_mm: float = 4.0
    elastic_mm: tuple[float, float] = (2.5, 1.2)
    elastic_spacing_mm: tuple[float, float] = (32.0, 14.0)


@dataclass(frozen=True)
class Mix:
    """Shares of the contrasts; the rest up to 1 is free. `real`: share of real images, if any."""

    t1w: float = 0.3
    t2w: float = 0.15
    infant_t1w: float = 0.1
    infant_t2w: float = 0.1
    gadolinium: float = 0.3
    skull_stripped: float = 0.5
    thick_slices: float = 0.3
    cropped: float = 0.0
    real: float = 0.0


class Random:
    """Draws from one generator, so that a seed decides everything."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(
            shape or (1,), generator=self.generator, device=self.device
        )

    def one(self, low: float = 0.0, high: float = 1.0) -> float:
        return float(self.uniform(low, high))

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.generator, device=self.device))


def random_affine(rng: Random, shape: Shape) -> np.ndarray:
    """A random affine (4, 4) about the origin."""
    rx, ry, rz = np.radians([rng.one(-shape.rotation, shape.rotation) for _ in range(3)])
    cos, sin = np.cos, np.sin
    rotation = (
        np.array([[cos(rz), -sin(rz), 0], [sin(rz), cos(rz), 0], [0, 0, 1]])
        @ np.array([[cos(ry), 0, sin(ry)], [0, 1, 0], [-sin(ry), 0, cos(ry)]])
        @ np.array([[1, 0, 0], [0, cos(rx), -sin(rx)], [0, sin(rx), cos(rx)]])
    )
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = [rng.one(-shape.shear, shape.shear) for _ in range(3)]
    whole = math.exp(rng.one(*shape.log_scale))
    scale = [whole * math.exp(rng.one(-shape.anisotropy, shape.anisotropy)) for _ in range(3)]
    matrix = np.eye(4)
    matrix[:3, :3] = rotation @ shear @ np.diag(scale)
    matrix[:3, 3] = [rng.one(-shape.shift_mm, shape.shift_mm) for _ in range(3)]
    return matrix


def smooth_field(rng: Random, channels: int, size: tuple[int, ...], spacing: float) -> Tensor:
    """Smooth random field (channels, *size) of unit variance at its control points."""
    control = [max(math.ceil(s / spacing) + 1, 2) for s in size]
    field = rng.normal(1, channels, *control)
    return F.interpolate(field, size=size, mode="trilinear", align_corners=True)[0]


def deformed_positions(
    rng: Random, shape: Shape, corner_mm: np.ndarray, size: int, spacing_mm: float
) -> Tensor:
    """Template positions in mm (3, size, size, size) that a patch's voxels are read from."""
    axis = torch.arange(size, dtype=torch.float32) * spacing_mm
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    grid += torch.as_tensor(corner_mm, dtype=torch.float32)[:, None, None, None]
    matrix = torch.as_tensor(random_affine(rng, shape), dtype=torch.float32)
    moved = torch.einsum("ab,bijk->aijk", matrix[:3, :3], grid) + matrix[:3, 3, None, None, None]
    for sd, every in zip(shape.elastic_mm, shape.elastic_spacing_mm, strict=True):
        moved += smooth_field(rng, 3, (size,) * 3, every / spacing_mm) * (sd * rng.one())
    return moved


def _voxel_grid(sample: Sample, positions: Tensor, matrix: np.ndarray) -> Tensor:
    inverse = torch.as_tensor(np.linalg.inv(matrix), dtype=torch.float32)
    voxel = torch.einsum("ab,bijk->aijk", inverse[:3, :3], positions)
    voxel += inverse[:3, 3, None, None, None]
    shape = torch.tensor(sample.classes.shape, dtype=torch.float32)
    scaled = 2 * voxel / (shape[:, None, None, None] - 1) - 1
    return scaled.flip(0).permute(1, 2, 3, 0)[None]


def read_classes(sample: Sample, positions: Tensor, matrix: np.ndarray) -> Tensor:
    """Class numbers (size, size, size) at positions in the frame of `matrix` (frame from voxel)."""
    grid = _voxel_grid(sample, positions, matrix)
    inside = sample.classes[None, None].float()
    return F.grid_sample(inside, grid, mode="nearest", align_corners=True)[0, 0].to(torch.uint8)


def read_image(sample: Sample, suffix: str, positions: Tensor, matrix: np.ndarray) -> Tensor:
    """Intensities (size, size, size) of one image at the positions, trilinear."""
    grid = _voxel_grid(sample, positions, matrix)
    return F.grid_sample(sample.images[suffix][None, None], grid, align_corners=True)[0, 0]


def class_means(rng: Random, classes: Classes, mix: Mix, infant: bool) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the intensity of every class, (classes,) each."""
    count = len(classes.index)
    means = rng.uniform(0, 1, count)
    partner = torch.as_tensor(np.minimum(classes.mirror, np.arange(count)))
    means = means[partner]
    deviations = (0.01 + rng.uniform(0, 0.05, count))[partner]
    draw, column = rng.one(), None
    for name in ("t1w", "t2w", "infant_t1w", "infant_t2w"):
        share = getattr(mix, name)
        if infant:
            share = {"t1w": 0.1, "t2w": 0.1}.get(name, 0.3)
        if draw < share:
            column = name.replace("_", "-")
            break
        draw -= share
    if column is not None:
        known = torch.as_tensor(classes.tissue >= 0)
        prior = torch.as_tensor(classes.contrasts[column].to_numpy(copy=True), dtype=torch.float32)
        mean = prior.mean()
        contrast = rng.one(0.6, 1.4)
        drawn = mean + contrast * (prior - mean) + 0.05 * rng.normal(len(prior))
        means[known] = drawn[torch.as_tensor(classes.tissue[classes.tissue >= 0])]
        means[known] += (0.02 * rng.normal(count))[partner][known]
        deviations[known] *= 0.8
    means[0] = 0 if rng.one() < 0.8 else rng.one()
    deviations[0] = 0.01 if means[0] == 0 else deviations[0]
    return means, deviations


def paint(rng: Random, classes: Classes, numbers: Tensor, mix: Mix, infant: bool) -> Tensor:
    """An image (size, size, size) of a map of class numbers."""
    means, deviations = class_means(rng, classes, mix, infant)
    known = numbers.clamp(max=len(means) - 1).long()
    size = tuple(numbers.shape)
    texture = rng.normal(*size) * rng.one(0.3, 1)
    texture += smooth_field(rng, 1, size, 6)[0] * rng.one(0, 0.8)
    image = means[known] + deviations[known] * texture
    if rng.one() < mix.gadolinium:
        blobs = smooth_field(rng, 1, size, rng.one(3, 6))[0]
        where = torch.as_tensor(classes.extra | np.isin(classes.kind, ("csf", "ventricle")))
        image = torch.where(where[known] & (blobs > rng.one(0.6, 1.2)), rng.one(0.8, 1.6), image)
    return image


def strip_skull(rng: Random, classes: Classes, numbers: Tensor) -> Tensor:
    """True where a skull-stripped scan keeps its voxels."""
    target = torch.as_tensor(classes.target)
    keep = (target > 0) & torch.as_tensor(classes.kind != "csf")
    known = numbers.clamp(max=len(target) - 1).long()
    brain = (keep[known] | (numbers == IGNORE)).float()[None, None]
    for _ in range(rng.below(4)):
        brain = F.max_pool3d(brain, 3, 1, 1)
    return brain[0, 0] > 0.5


def blur(image: Tensor, sigma: tuple[float, float, float]) -> Tensor:
    """Separable Gaussian, sigma in voxels per axis."""
    out = image[None, None]
    for axis, s in enumerate(sigma):
        if s < 0.2:
            continue
        radius = math.ceil(2.5 * s)
        x = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (x / s) ** 2)
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = len(x)
        padding = [0, 0, 0]
        padding[axis] = radius
        out = F.conv3d(out, (kernel / kernel.sum()).reshape(shape), padding=padding)
    return out[0, 0]


def field_of_view(rng: Random, size: tuple[int, ...], spacing_mm: float) -> Tensor:
    """True inside a random box that cuts up to 60 mm off any side (a defaced or cropped scan)."""
    inside = torch.ones(size, dtype=torch.bool)
    for axis in range(3):
        for side in range(2):
            if rng.one() < 0.4:
                cut = int(rng.one(0, 60) / spacing_mm)
                where = [slice(None)] * 3
                where[axis] = slice(size[axis] - cut, None) if side else slice(0, cut)
                inside[tuple(where)] = False
    return inside


def acquire(rng: Random, image: Tensor, spacing_mm: float, mix: Mix, real: bool) -> Tensor:
    """Resolution, slice thickness, bias field, gamma and noise of a scanner."""
    size = tuple(image.shape)
    if not real or rng.one() < 0.3:
        sigma = [rng.one(0.2, 0.7) / spacing_mm for _ in range(3)]
        image = blur(image, tuple(sigma))
    if rng.one() < mix.thick_slices:
        axis, factor = rng.below(3), rng.one(2, 5) / spacing_mm
        coarse = list(size)
        coarse[axis] = max(int(size[axis] / factor), 2)
        thick = [0.0, 0.0, 0.0]
        thick[axis] = 0.4 * factor
        image = F.interpolate(blur(image, tuple(thick))[None, None], size=coarse, mode="trilinear")
        image = F.interpolate(image, size=size, mode="trilinear")[0, 0]
    if rng.one() < 0.8:
        field = smooth_field(rng, 1, size, rng.one(50, 120) / spacing_mm)[0]
        image = image * torch.exp(field * rng.one(0, 0.25))
    low = image.min()
    top = torch.quantile(image.flatten()[:: max(image.numel() // 50_000, 1)], 0.999)
    image = ((image - low) / (top - low + 1e-6)).clamp(0, 1.2)
    image = image.pow(math.exp(rng.one(-0.35, 0.35)))
    return image + rng.normal(*size) * (rng.one(0, 1) ** 2 * (0.03 if real else 0.08))


def example(
    rng: Random, sample: Sample, classes: Classes, positions: Tensor, spacing_mm: float, mix: Mix
) -> tuple[Tensor, Tensor]:
    """Image and protocol channels (`IGNORE` where unknown), (size, size, size) each."""
    matrix = sample.template_from_voxel
    numbers = read_classes(sample, positions, matrix)
    infant = bool(sample.images)
    real = infant and rng.one() < mix.real
    if real:
        names = sorted(sample.images)
        image = read_image(sample, names[rng.below(len(names))], positions, matrix)
    else:
        image = paint(rng, classes, numbers, mix, infant)
        if infant or rng.one() < mix.skull_stripped:
            kept = strip_skull(rng, classes, numbers)
            image = image * kept
            numbers = torch.where(kept | (numbers == IGNORE), numbers, 0)
    if rng.one() < mix.cropped:
        inside = field_of_view(rng, tuple(image.shape), spacing_mm)
        image, numbers = image * inside, torch.where(inside, numbers, 0)
    image = acquire(rng, image, spacing_mm, mix, real)
    target = torch.as_tensor(np.append(classes.target, np.zeros(256 - len(classes.target), int)))
    channels = torch.as_tensor(sample.group)[target[numbers.long()]]
    return image, torch.where(numbers == IGNORE, IGNORE, channels)

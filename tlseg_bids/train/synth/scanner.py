"""What a scanner does to an anatomy: voxels of its own, bias field, motion, noise, scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.mix import Mix
from tlseg_bids.train.synth.shape import along_axes, smooth_field

# A narrower profile would see one voxel only and so shift the image against its labels.
_NARROWEST = 0.35
# Share of the lines of k-space, around its centre, that are acquired before anybody moves: they
# decide where the anatomy is seen, so that the labels stay true.
_STILL = 0.08
_SAMPLE = 30_000
THICK_MM = 2.0


def acquisition_mm(rng: Random, spacing_mm: float, mix: Mix) -> list[float]:
    """Voxel size of the scan along each axis, mm; never below that of the patch."""
    size = [rng.one(0.7, 1.2) for _ in range(3)]
    if rng.chance(mix.low_resolution):
        size = [rng.one(1.0, 2.5) for _ in range(3)]
    if rng.chance(mix.thick_slices):
        size[rng.below(3)] = rng.one(2, 6)
    return [max(s, spacing_mm) for s in size]


def scan_matrix(size: int, factor: float, phase: float, sigma: float) -> Tensor:
    """Matrix (scan voxels, size) that a scan along one axis is.

    Each of its voxels, `factor` patch voxels apart and `phase` of a voxel from the patch's end, is
    a Gaussian mean of standard deviation `sigma` (patch voxels), integrated over the patch's
    voxels, with rows that sum to one. A voxel so far beyond a thin patch that it sees none of it
    shows the patch's last one.
    """
    count = max(math.floor((size - 1 - phase) / factor) + 1, 2)
    centre = phase + factor * torch.arange(count, dtype=torch.float64)
    edges = torch.arange(size + 1, dtype=torch.float64) - 0.5
    width = max(sigma, _NARROWEST) * math.sqrt(2)
    below = torch.erf((edges[None] - centre[:, None]) / width)
    weight = below.diff(dim=1)
    weight[weight.sum(1) == 0, -1] = 1
    return (weight / weight.sum(1, keepdim=True)).float()


def grid_matrix(size: int, factor: float, phase: float, count: int) -> Tensor:
    """Matrix (size, scan voxels) of linear interpolation back to the patch; ends are held."""
    at = ((torch.arange(size, dtype=torch.float32) - phase) / factor).clamp(0, count - 1)
    return (1 - (at[:, None] - torch.arange(count)).abs()).clamp_min(0)


def scan_matrices(
    rng: Random, size: tuple[int, ...], spacing_mm: float, mix: Mix
) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices along the three axes, to the scan's own voxels and back to the patch.

    A voxel averages over its whole size (partial volume) or over a thin part of it; besides there
    is the scanner's own blur of 0.2 to 0.7 mm. The rows of `scan_matrix` sum to one, so means stay.
    """
    there, back = [], []
    whole = rng.chance(mix.partial_volume)
    for n, voxel_mm in zip(size, acquisition_mm(rng, spacing_mm, mix), strict=True):
        factor, phase = voxel_mm / spacing_mm, rng.one()
        thickness = voxel_mm * (rng.one(0.8, 1.1) if whole else rng.one(0.2, 0.5))
        # A box of width w has a variance of w²/12.
        sigma = math.hypot(rng.one(0.2, 0.7), thickness / math.sqrt(12)) / spacing_mm
        matrix = scan_matrix(n, factor, phase, sigma)
        there.append(matrix.to(rng.device, non_blocking=True))
        back.append(grid_matrix(n, factor, phase, len(matrix)).to(rng.device, non_blocking=True))
    return there, back


def bias_field(rng: Random, image: Tensor, spacing_mm: float) -> Tensor:
    """An image times a smooth field that changes over 50 to 120 mm, by up to 16 % (sd)."""
    field = smooth_field(rng, 1, tuple(image.shape), rng.one(50, 120) / spacing_mm)[0]
    return image * field.mul_(rng.one(0, 0.16)).exp_()


def scale(rng: Random, image: Tensor, visible: Tensor | None) -> Tensor:
    """Scale between two percentiles of what is visible, as the program does; at most 1.2.

    Low is between 0 and 1 %, high between 99 and 99.95 %.
    """
    flat = image.flatten() if visible is None else torch.where(visible, image, math.nan).flatten()
    sample = flat[:: max(flat.numel() // _SAMPLE, 1) | 1]
    ends = torch.tensor([rng.one(0, 0.01), rng.one(0.99, 0.9995)]).to(rng.device, non_blocking=True)
    low, high = torch.nanquantile(sample, ends).nan_to_num()
    return ((image - low) / (high - low + 1e-6)).clamp_(0, 1.2)


def interleaved(rng: Random, image: Tensor, axis: int) -> Tensor:
    """Every other slice along an axis brighter or darker by up to 6 %.

    Slices of two passes differ so where the second pass excites spins that the first has saturated.
    """
    gain = torch.ones(image.shape[axis])
    gain[1::2] = 1 + rng.one(-0.06, 0.06)
    shape = [1, 1, 1]
    shape[axis] = len(gain)
    return image * gain.reshape(shape).to(image.device, non_blocking=True)


def ghosts(rng: Random, image: Tensor, axis: int) -> Tensor:
    """Ghosts along a phase-encoding axis from a periodic shift (breathing, pulsation).

    k-space lines are acquired one after the other; a shift of d voxels multiplies line κ (cycles
    per voxel) by exp(-2πi κ d). Source: Wood & Henkelman 1985, doi:10.1118/1.595782.
    """
    n = image.shape[axis]
    line = torch.arange(n, dtype=torch.float32)
    shift = rng.one(0.3, 1.5) * torch.sin(2 * math.pi * (line / rng.one(2, 12) + rng.one()))
    cycles = torch.fft.fftfreq(n)
    # Line numbers count from the lowest frequency, fftfreq from zero.
    angle = -2 * math.pi * cycles * torch.fft.ifftshift(shift)
    angle = torch.where(cycles.abs() < _STILL / 2, torch.zeros(()), angle)
    shape = [1, 1, 1]
    shape[axis] = n
    factor = torch.polar(torch.ones(n), angle).reshape(shape).to(image.device, non_blocking=True)
    return torch.fft.ifft(torch.fft.fft(image, dim=axis).mul_(factor), dim=axis).abs()


def moved(rng: Random, image: Tensor, length_mm: list[float]) -> Tensor:
    """An image (I, J, K) after a small rotation (sd 1.5°) and shift (sd 1.2 mm) of the head."""
    x, y, z = (math.radians(1.5) * float(v) for v in rng.vector(3))
    sides = torch.tensor(length_mm).flip(0)
    theta = torch.eye(3, 4)
    theta[:3, :3] += torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    theta[:, :3] *= sides / sides[:, None]
    theta[:, 3] = 1.2 * rng.vector(3) * 2 / sides
    grid = F.affine_grid(
        theta[None].to(image.device, non_blocking=True), (1, 1, *image.shape), align_corners=False
    )
    return F.grid_sample(image[None, None], grid, padding_mode="border", align_corners=False)[0, 0]


def pose_changes(rng: Random, image: Tensor, axis: int, length_mm: list[float]) -> Tensor:
    """The head moves once or twice while k-space is filled: later lines see another pose.

    Source: Shaw et al. 2019, "MRI k-space motion artefact augmentation",
    https://proceedings.mlr.press/v102/shaw19a.html.
    """
    n = image.shape[axis]
    spectrum = torch.fft.fft(image, dim=axis)
    cycles = torch.fft.fftfreq(n)
    for _ in range(1 + rng.below(2)):
        side, start = (1 if rng.chance(0.5) else -1), rng.one(_STILL / 2, 0.4)
        later = (cycles * side > start).to(image.device, non_blocking=True)
        shape = [1, 1, 1]
        shape[axis] = n
        other = torch.fft.fft(moved(rng, image, length_mm), dim=axis)
        spectrum = torch.where(later.reshape(shape), other, spectrum)
    return torch.fft.ifft(spectrum, dim=axis).abs()


def motion(rng: Random, image: Tensor, length_mm: list[float]) -> Tensor:
    """Ghosts or changes of pose, along a random phase-encoding axis.

    `length_mm`: how long each axis of the image (I, J, K) is.
    """
    axis = rng.below(3)
    if rng.chance(0.5):
        return ghosts(rng, image, axis)
    return pose_changes(rng, image, axis, length_mm)


def noise(rng: Random, image: Tensor, level: float, rician: bool) -> Tensor:
    """Noise of standard deviation `level` times the mean of the voxels above 0.

    Gaussian, or that of a magnitude image (Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618).
    """
    above = image > 0
    sd = level * (image * above).sum() / above.sum().clamp_min(1)
    noisy = rng.normal(*image.shape).mul_(sd).add_(image)
    if not rician:
        return noisy
    other = rng.normal(*image.shape).mul_(sd)
    return noisy.square_().add_(other.square_()).sqrt_()


@dataclass(frozen=True, eq=False)
class Kept:
    """What is left of a scan after it was made, and what of that counts for its scaling.

    Parameters
    ----------
    visible : Tensor or None
        Bool (I, J, K); what is cut away does not count for the scaling and is exactly 0 in the
        answer. None: all is left.
    brain : Tensor or None
        Bool (I, J, K); if given, the only voxels that count for the scaling.
    """

    visible: Tensor | None = None
    brain: Tensor | None = None

    @property
    def counting(self) -> Tensor | None:
        """The voxels that count for the scaling; None: all of them."""
        return self.visible if self.brain is None else self.brain


WHOLE = Kept()


def resampled(
    rng: Random, image: Tensor, spacing_mm: float, mix: Mix
) -> tuple[Tensor, list[Tensor]]:
    """An image (I, J, K) on the scan's own voxels, and the matrices back to the patch."""
    size = image.shape
    there, back = scan_matrices(rng, tuple(size), spacing_mm, mix)
    image = along_axes(there, image)
    thick = min(range(3), key=lambda axis: image.shape[axis] / size[axis])
    slices = image.shape[thick] * THICK_MM <= size[thick] * spacing_mm
    if mix.interleaved and slices and rng.chance(mix.interleaved):
        image = interleaved(rng, image, thick)
    return image, back


def acquire(
    rng: Random, image: Tensor, spacing_mm: float, mix: Mix, real: bool, kept: Kept = WHOLE
) -> Tensor:
    """Resolution, bias field, scaling, gamma, motion and noise of a scanner.

    Parameters
    ----------
    image : Tensor
        (I, J, K) intensities of the anatomy, or of a real scan.
    real : bool
        It is a scan already: its resolution is seldom lowered further, its noise raised less.
    kept : Kept
        What is cut away after the scan, and which voxels count for the scaling.
    """
    length_mm = [n * spacing_mm for n in image.shape]
    back = None
    if rng.chance(mix.bias):
        image = bias_field(rng, image, spacing_mm)
    if not real or rng.chance(mix.rescanned):
        image, back = resampled(rng, image, spacing_mm, mix)
    if rng.chance(0.3 * mix.motion if real else mix.motion):
        image = motion(rng, image, length_mm)
    level = mix.noise * rng.one() ** 2 * (0.04 if real else 0.12)
    image = noise(rng, image, level, rng.chance(mix.rician))
    if back is not None:
        image = along_axes(back, image)
    image = scale(rng, image, kept.counting)
    if rng.chance(mix.gamma):
        image = image.add_(1e-6).log_().mul_(math.exp(rng.one(-0.35, 0.35))).exp_()
    return image if kept.visible is None else image * kept.visible

"""Heads made older or younger: structures grow and shrink, and what lies around them gives way.

The way is measured, not chosen: `ageing.tsv` holds how far the logarithm of each structure's share
of the head goes from the youngest-looking to the oldest-looking quarter of the label maps that the
default model is taught with, and how far heads lie beside that way (`benchmarks/ageing.py table`).

A volume that grows at a rate r is the divergence of a velocity, and of all velocities with that
divergence the one without vortices has the least energy: v = ∇φ with ∇²φ = r (Helmholtz), solved by
a Fourier transform. Small steps of it are composed, so that nothing folds (as the stationary
velocities of Ashburner 2007, doi:10.1016/j.neuroimage.2007.07.007, but that the rates move along).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.errors import UsageError
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.train.dataset import HERE, Sample, default_protocol, load_classes, template_channels
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.shape import read_classes

BOX_MM = ((-85.0, 85.0), (-107.5, 95.0), (-85.0, 95.0))
"""Where structures grow, in the template's frame: its box and a margin."""
SPACING_MM = 2.5
LARGEST_STEP = 0.35
"""Most that the logarithm of a volume changes by in a step."""


@dataclass(frozen=True)
class Ageing:
    """How often, and how far, heads are made older or younger.

    Parameters
    ----------
    share : float
        Of the examples.
    way : (float, float)
        Range of what is asked along the way of `ageing.tsv`: 1 leads from its young to its old
        heads, and a negative number back. On a grid of 2.5 mm about six tenths of it are reached,
        less where a structure is thin.
    rest : float
        Standard deviation of what each structure does beside the way, in units of the table's.

    Raises
    ------
    UsageError
        If a share is none, the range is not one, or `rest` is below 0.
    """

    share: float = 0.0
    way: tuple[float, float] = (-0.4, 1.6)
    rest: float = 0.7

    def __post_init__(self) -> None:
        told = {
            "share": (0 <= self.share <= 1, "write a number from 0 to 1"),
            "way": (
                len(self.way) == 2 and self.way[0] <= self.way[1] and max(map(abs, self.way)) <= 3,
                "write two numbers from -3 to 3, the lower one first",
            ),
            "rest": (self.rest >= 0, "write 0 or more"),
        }
        for key, (good, hint) in told.items():
            if not good:
                raise UsageError(f"{key} is {getattr(self, key)!r}", "[ageing] of the recipe", hint)


@lru_cache
def ways() -> tuple[np.ndarray, np.ndarray]:
    """Way and rest of the template's channels, (channels,) each; 0 where the table has none."""
    rows = pd.read_csv(HERE / "ageing.tsv", sep="\t", index_col="structure")
    names = default_protocol().table["abbreviation"].str.replace(r"^[LR]-", "", regex=True)
    way, rest = (names.map(rows[column]).fillna(0.0).to_numpy() for column in ("way", "rest"))
    return way, rest


def growth(rng: Random, ageing: Ageing) -> np.ndarray:
    """Log ratios of the volumes of the template's channels, (channels,); both sides are alike."""
    way, rest = ways()
    pair = np.minimum(default_protocol().mirror, np.arange(len(way)))
    along = rng.one(*ageing.way)
    return way * along + rest * ageing.rest * rng.vector(len(way)).numpy()[pair]


def class_growth(protocol: LabelProtocol, growth: np.ndarray) -> Tensor:
    """Log ratio of each class number's volume in a protocol's label maps, float32 (256,).

    `growth` are those of the template's channels; 0 for the background and what is unknown.
    """
    into = template_channels(protocol)[load_classes(protocol).target]
    table = torch.zeros(256)
    table[: len(into)] = torch.as_tensor(np.where(into > 0, growth[into], 0.0), dtype=torch.float32)
    return table


def aged(rng: Random, ageing: Ageing, sample: Sample, positions: Tensor) -> Tensor:
    """Where a sample is read so that it shows its head older or younger, as often as is asked.

    `positions` and what is returned: (3, I, J, K) in template mm on `rng.device`.
    """
    if not (ageing.share and rng.chance(ageing.share)):
        return positions
    table = class_growth(sample.protocol, growth(rng, ageing))
    numbers = rng.resident(sample, "growing", lambda: growing(sample))
    return positions + read_shift(shift(table, numbers), positions)


def places(spacing_mm: float) -> Tensor:
    """Template positions (3, i, j, k) in mm of the voxels of a size that fill `BOX_MM`."""
    axes = [
        low + spacing_mm * (torch.arange(round((high - low) / spacing_mm)) + 0.5)
        for low, high in BOX_MM
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def growing(sample: Sample) -> Tensor:
    """A sample's class numbers on the grid of growth, twice as fine: uint8 (2i, 2j, 2k)."""
    positions = places(SPACING_MM / 2).to(sample.classes.device)
    return read_classes(sample, positions, sample.template_from_voxel)


def shift(table: Tensor, numbers: Tensor) -> Tensor:
    """From each place in the grown head, how far it is to that of the same tissue in the head.

    Parameters
    ----------
    table : Tensor
        From `class_growth`, on the CPU: it decides the number of steps.
    numbers : Tensor of uint8
        From `growing`, (2i, 2j, 2k), on any device.

    Returns
    -------
    Tensor, shape (3, i, j, k)
        In mm, on the grid of growth, on the device of `numbers`.
    """
    steps = max(1, math.ceil(float(table.abs().max()) / LARGEST_STEP))
    logs = table.to(numbers.device).index_select(0, numbers.flatten().int())
    rates = F.avg_pool3d(logs.reshape(1, 1, *numbers.shape), 2) / steps
    home = places(SPACING_MM).to(numbers.device)
    there = torch.zeros_like(home)
    for _ in range(steps):
        back = potential_flow(_read(rates, home + there)[0], SPACING_MM).neg_()
        there = back + read_shift(there, home + back)
    return there


def read_shift(field: Tensor, positions: Tensor) -> Tensor:
    """What `shift` has found at positions in template mm; both (3, I, J, K) in mm."""
    return _read(field[None], positions)


def potential_flow(divergence: Tensor, spacing: float) -> Tensor:
    """The gradient (3, I, J, K) whose divergence is given, but for its mean; it is periodic.

    `divergence` (I, J, K) is a rate, and the gradient a length in the unit of `spacing`.
    """
    size = divergence.shape
    x, y = (torch.fft.fftfreq(n, spacing) for n in size[:2])
    along = x[:, None, None], y[None, :, None], torch.fft.rfftfreq(size[2], spacing)[None, None]
    waves = [2 * math.pi * wave.to(divergence.device) for wave in along]
    square = waves[0] ** 2 + waves[1] ** 2 + waves[2] ** 2
    square[0, 0, 0] = math.inf  # the mean of a periodic divergence is 0
    potential = torch.fft.rfftn(divergence) / -square
    return torch.stack([torch.fft.irfftn(1j * wave * potential, s=size) for wave in waves])


def _read(field: Tensor, positions: Tensor) -> Tensor:
    """A field (1, C, i, j, k) on the grid of growth at positions in mm, linear: (C, I, J, K)."""
    low = torch.tensor([ends[0] for ends in BOX_MM])
    length = torch.tensor(field.shape[2:]) * SPACING_MM
    low, length = (one.to(field.device)[:, None, None, None] for one in (low, length))
    grid = ((positions - low) / length * 2 - 1).flip(0).permute(1, 2, 3, 0)[None]
    return F.grid_sample(field, grid, padding_mode="border", align_corners=False)[0]

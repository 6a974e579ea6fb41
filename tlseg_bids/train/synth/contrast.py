"""Which intensity each class gets: near a known contrast and age, or free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.train.dataset import Classes
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.mix import KNOWN, Mix

_LEAST_VOXELS = 20
_FATTY = ("extra-skin", "extra-cancellous-bone")


@dataclass(frozen=True, eq=False)
class Contrast:
    """The intensities of one synthetic scan, per class (classes,), on the CPU.

    `means` and `deviations` of the intensity; `texture`: standard deviation between parts of the
    same structure; `weighting` is ``T1w``, ``T2w`` or empty (free); `maturity` goes from 0 (birth)
    to 1 (adult).
    """

    means: Tensor
    deviations: Tensor
    texture: Tensor
    weighting: str = ""
    maturity: float = 1.0


def _column(classes: Classes, name: str) -> Tensor:
    return torch.as_tensor(classes.contrasts[name].to_numpy(copy=True), dtype=torch.float32)


def isointense_maturity(classes: Classes, weighting: str) -> float:
    """Where, on the way from birth (0) to adult (1), cortex and white matter are equally bright.

    Source of the three phases (inverted, isointense, adult-like):
    Wang et al. 2019, doi:10.1109/TMI.2019.2901712.
    """
    name = weighting.lower()
    young, adult = (classes.contrasts[c] for c in (f"infant-{name}", name))
    at_birth = young["cortex"] - young["white-matter"]
    at_last = adult["cortex"] - adult["white-matter"]
    return float(np.clip(at_birth / (at_birth - at_last), 0, 1))


def draw_maturity(rng: Random, classes: Classes, weighting: str, mix: Mix) -> float:
    """A stage of myelination between 0 (birth) and 1 (adult)."""
    draw = rng.one()
    if draw < mix.unmyelinated:
        return 0.0
    if draw < mix.unmyelinated + mix.isointense:
        middle = isointense_maturity(classes, weighting)
        return min(max(middle + rng.one(-0.06, 0.06), 0.0), 1.0)
    return rng.one()


@dataclass(frozen=True, eq=False)
class Own:
    """How the classes look in a scan: `table` (2, classes) holds mean and standard deviation of
    the intensity, NaN for classes that it does not show; `weighting` is ``T1w`` or ``T2w``."""

    table: Tensor
    weighting: str


def own_contrast(image: Tensor, numbers: Tensor, count: int) -> Tensor:
    """The table of `Own`, intensities divided by the brightest of the labelled voxels.

    Parameters
    ----------
    image : Tensor, shape (I, J, K)
    numbers : Tensor of uint8, shape (I, J, K)
        Class of each voxel.
    count : int
        Number of classes.
    """
    index, values = numbers.flatten().long(), image.flatten().double()
    labelled = (index > 0) & (index < count)
    index, values = index[labelled], values[labelled]
    sizes = torch.bincount(index, minlength=count)
    values = values / values.max().clamp_min(1e-6) if len(values) else values
    first, second = (torch.bincount(index, values**power, minlength=count) for power in (1, 2))
    mean = first / sizes
    table = torch.stack((mean, (second / sizes - mean**2).clamp_min(0).sqrt()))
    table[:, sizes < _LEAST_VOXELS] = torch.nan
    return table.float()


def draw_contrast(rng: Random, classes: Classes, mix: Mix, own: Own | None = None) -> Contrast:
    """A contrast by the shares of `mix`: the sample's own, T1w or T2w of some age, or free.

    A share is drawn freely so that a network does not lean on any contrast (Billot et al. 2023,
    doi:10.1016/j.media.2023.102789). The mean of a known contrast is stretched around its grand
    mean by 0.6 to 1.4, that of a faint one by 0.25 to 0.6. Left and right always share their
    intensity.
    """
    count = len(classes.index)
    partner = torch.as_tensor(np.minimum(classes.mirror, np.arange(count)))
    means = rng.shares(count)[partner]
    deviations = (0.01 + 0.05 * rng.shares(count))[partner]
    row = torch.as_tensor(classes.tissue)
    known = row >= 0
    texture = torch.where(known, _column(classes, "texture")[row.clamp_min(0)], 0.05)
    weighting, maturity = "", 1.0
    if own is not None and rng.chance(mix.own):
        return _near(rng, own, Contrast(means, deviations, texture))
    draw = rng.one()
    for name in KNOWN:
        share = getattr(mix, name)
        if draw < share:
            weighting = "T1w" if name.endswith("t1w") else "T2w"
            if name.startswith("infant"):
                maturity = draw_maturity(rng, classes, weighting, mix)
            break
        draw -= share
    if weighting:
        young, adult = (_column(classes, f"{a}{weighting.lower()}") for a in ("infant-", ""))
        prior = young + maturity * (adult - young)
        brain = torch.as_tensor([not t.startswith("extra-") for t in classes.contrasts.index])
        mean = prior[brain].mean()
        faint = mix.faint > 0 and rng.chance(mix.faint)
        stretch, spread = (rng.one(0.25, 0.6), 0.025) if faint else (rng.one(0.6, 1.4), 0.05)
        drawn = mean + stretch * (prior - mean) + spread * rng.vector(len(prior))
        if faint:
            drawn[torch.tensor(classes.contrasts.index.isin(_FATTY))] *= rng.one(1, 3)
        if not rng.chance(mix.known_head):
            known &= ~torch.tensor(classes.extra)
        means[known] = drawn[row[known]] + (0.02 * rng.vector(count))[partner][known]
        deviations[known] *= 0.8
        # Myelin comes at different times to different parts of a structure.
        patchy = 0.25 * 4 * maturity * (1 - maturity) * (adult - young).abs()
        texture[known] += patchy[row[known]]
    means[0] = 0 if rng.chance(0.8) else rng.one()
    if means[0] == 0:
        deviations[0], texture[0] = 0.01, 0
    return Contrast(means, deviations, texture, weighting, maturity)


def _near(rng: Random, own: Own, free: Contrast) -> Contrast:
    """The scan's own contrast, stretched by 0.75 to 1.3; free where it does not show a class."""
    mean, deviation = own.table
    shown = ~mean.isnan()
    middle = mean[shown].mean()
    drawn = middle + rng.one(0.75, 1.3) * (mean - middle) + 0.03 * rng.vector(len(mean))
    # What varies inside a structure is partly noise, partly its own texture.
    share = rng.one(0.3, 0.8)
    means = torch.where(shown, drawn, free.means)
    deviations = torch.where(shown, deviation * share, free.deviations)
    means[0], deviations[0] = 0, 0.01
    return Contrast(means, deviations, free.texture, own.weighting)


def class_means(
    rng: Random, classes: Classes, mix: Mix, own: Own | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the intensity of every class, (classes,) each."""
    contrast = draw_contrast(rng, classes, mix, own)
    return contrast.means, contrast.deviations

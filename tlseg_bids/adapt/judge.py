"""Never worse: the child is kept only where it beats its parent on scans that it has not seen.

Held-out scans: leave one person out for up to four persons, four folds for more. One person alone
is divided along the mid-sagittal plane: each half of the brain is held out once, which says how
well the contrast is learned, and not how well other persons do.

The parent's skill is asked for on heads synthesised from the label maps that come with the program,
always the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from tlseg_bids.adapt.inspect import Answer, Inspected, channels_of
from tlseg_bids.adapt.reading import IGNORE
from tlseg_bids.errors import ScanError
from tlseg_bids.flow import Job, Prediction, Prepared
from tlseg_bids.metrics import dice
from tlseg_bids.postprocess import to_native
from tlseg_bids.preprocess.geometry import resample
from tlseg_bids.preprocess.intensity import scaled
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Model
from tlseg_bids.train.dataset import Sample, load_classes
from tlseg_bids.train.synth import Mix, Random, example
from tlseg_bids.volume import Grid, Volume

LEAST_GAIN = 0.002
MOST_FORGOTTEN = 0.04
"""Mean Dice on the rehearsal heads; how little that says of real adults is in
docs/adaptation.md."""
FOLDS = 4
REHEARSAL_CONTRASTS = ("t1w", "t2w", "t1w", "t2w", "t1w", "infant_t1w")
"""Of the heads to rehearse on, one label map each: most like the scans of everyone else."""
SIDES = ("left", "right")


@dataclass(frozen=True)
class Fold:
    """What a run of the cross-validation may not see: scans, or one half of the only person.

    `held_out` are positions in the list of scans; `side` is ``left`` or ``right`` where only that
    half of them is held out, else empty.
    """

    held_out: tuple[int, ...]
    side: str = ""

    @property
    def name(self) -> str:
        """For file names."""
        return self.side or "-".join(map(str, self.held_out))


def folds(subjects: Sequence[str], at_most: int = FOLDS) -> list[Fold]:
    """Divide scans by person.

    Parameters
    ----------
    subjects : sequence of str
        The person of each scan.
    at_most : int
        Number of folds that the time allows, at least 2.
    """
    persons = sorted(set(subjects))
    everyone = tuple(range(len(subjects)))
    if len(persons) == 1:
        return [Fold(everyone, side) for side in SIDES]
    count = min(len(persons), max(at_most, 2))
    parts = [set(persons[k::count]) for k in range(count)]
    return [Fold(tuple(i for i in everyone if subjects[i] in part)) for part in parts]


def visible(
    samples: Sequence[Sample], inspected: Sequence[Inspected], fold: Fold
) -> list[Sample]:  # fmt: skip
    """What a fold's run learns from: the other scans, or the other half.

    `samples` are those of `inspected`, in their order.
    """
    if not fold.side:
        return [s for i, s in enumerate(samples) if i not in fold.held_out]
    return [
        replace(s, classes=s.classes.masked_fill(
            torch.from_numpy(held_out(one, fold)).to(s.classes.device), IGNORE
        ))
        for s, one in zip(samples, inspected, strict=True)
    ]  # fmt: skip


def held_out(one: Inspected, fold: Fold) -> np.ndarray:
    """True where a fold holds out a voxel of a scan that it holds out, in the base's frame."""
    shape = one.labelled.channels.shape
    if not fold.side:
        return np.ones(shape, bool)
    frame = one.prepared.template_from_native @ one.labelled.grid.affine
    return half(frame, shape, fold.side)


def half(template_from_voxel: np.ndarray, shape: tuple[int, ...], side: str) -> np.ndarray:
    """True where a voxel lies on a side of the template's mid-sagittal plane (left is x < 0)."""
    row = template_from_voxel[0]
    axes = [row[a] * np.arange(n) for a, n in enumerate(shape)]
    x = axes[0][:, None, None] + axes[1][None, :, None] + axes[2][None, None, :] + row[3]
    return x < 0 if side == "left" else x > 0


def with_network(model: Model, network: nn.Module, heads: Sequence) -> Model:
    """The model with another segmenter."""
    networks = {**model.networks, "segmenter": network.eval()}
    return replace(model, networks=networks, heads=tuple(heads))


def program_labels(model: Model, one: Inspected, job: Job, answer: Answer) -> np.ndarray:
    """Channels uint8 on the scan's grid, as the program would write them with this model.

    The model finds the brain and its frame itself, as it will have to; where it finds no brain,
    everything is background.
    """
    try:
        _, segmentation = answer(job, model)
    except ScanError:
        return np.zeros(one.labelled.channels.shape, np.uint8)
    return channels_of(segmentation.labels.data, model.protocol.indices)


def native_labels(model: Model, one: Inspected) -> np.ndarray:
    """Channels uint8 on the scan's grid, labelled in the frame that the base found."""
    mirror = model.card.strategy.get("mirror", False)
    prediction = segment(model, one.prepared, Ask(mirror=mirror))
    labels = to_native(prediction, one.prepared.native, model.protocol).labels.data
    return channels_of(labels, model.protocol.indices)


def held_out_dice(channels: np.ndarray, one: Inspected, fold: Fold) -> dict[int, float]:
    """Dice of every labelled structure on the scan's grid, over what the fold holds out."""
    return dice_per_channel(one.labelled.group[channels], _wanted(one, fold))


def dice_per_channel(found: np.ndarray, wanted: np.ndarray) -> dict[int, float]:
    """Dice of the channels that `wanted` shows, where it is known."""
    known = wanted != IGNORE
    found, wanted = found[known], wanted[known]
    shown = np.flatnonzero(np.bincount(wanted, minlength=256)[1:]) + 1
    return {int(c): dice(found == c, wanted == c) for c in shown}


def mean(values: dict[int, float]) -> float:
    """Mean over structures; NaN if there is none."""
    return float(np.mean(list(values.values()))) if values else float("nan")


def rehearsal_set(
    samples: Sequence[Sample], box_mm: list[list[float]], spacing_mm: float
) -> list[tuple[Prepared, np.ndarray]]:
    """The first label maps as synthesised heads, always the same, with their channels.

    Contrasts are near those of T1w and T2w scans (`REHEARSAL_CONTRASTS`); the heads are not
    deformed.
    """
    axes = [
        torch.arange(low + spacing_mm / 2, high, spacing_mm, dtype=torch.float32)
        for low, high in box_mm
    ]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    frame = np.diag([spacing_mm] * 3 + [1.0])
    frame[:3, 3] = [axis[0] for axis in axes]
    grid = Grid(tuple(len(axis) for axis in axes), frame)
    others = {"t1w": 0.0, "t2w": 0.0, "infant_t1w": 0.0, "infant_t2w": 0.0}
    found = []
    for number, (sample, contrast) in enumerate(zip(samples, REHEARSAL_CONTRASTS, strict=False)):
        rng = Random(1000 + number)
        mix = Mix(**{**others, contrast: 1.0}, thick_slices=0.0, gadolinium=0.0)
        classes = load_classes(sample.protocol)
        image, channels = example(rng, sample, classes, positions, spacing_mm, mix)
        seen = scaled(image.float(), low=0.0, high=99.9)
        native = Volume(seen.numpy(), grid)
        found.append((Prepared(seen[None], grid, native, np.eye(4), False, ()), channels.numpy()))
    return found


def rehearsal_dice(model: Model, heads: Sequence[tuple[Prepared, np.ndarray]]) -> list[float]:
    """Mean Dice of the template's head on each synthesised head, at the coarse answer's grid."""
    scores = []
    for prepared, channels in heads:
        prediction = segment(model, prepared, Ask(head=len(model.heads) - 1, fine=False))
        wanted = _nearest(channels, prepared.grid, prediction)
        found = prediction.channel.astype(np.uint8)
        scores.append(mean(dice_per_channel(found, wanted)))
    return scores


@dataclass(frozen=True)
class Verdict:
    """Whether the child is kept, how far toward it, and why.

    Parameters
    ----------
    kept : bool
    share : float
        How far from the parent's weights to the child's; 0 if the parent stays.
    gain : float
        Mean Dice on held-out scans, child minus parent; NaN if none was judged.
    forgotten : float
        Mean Dice on the rehearsal set, parent minus child.
    reason : str
        A sentence.
    judged : float
        The share that gain and loss are of, whether or not the child is kept.
    """

    kept: bool
    share: float
    gain: float
    forgotten: float
    reason: str
    judged: float = 1.0


def decide(
    base: Sequence[float], child: dict[float, Sequence[float]], rehearsal: dict[float, float]
) -> Verdict:
    """Choose the share, and whether the child is kept.

    Parameters
    ----------
    base : sequence of float
        Mean Dice of the parent on every held-out part; NaN where a part shows no labelled
        structure, which is then not judged.
    child : dict
        Share to the child's mean Dice on the same parts.
    rehearsal : dict
        Share to mean Dice on the rehearsal set; 0 is the parent.
    """
    judged = ~np.isnan(base)
    gains = {share: np.subtract(found, base)[judged] for share, found in child.items()}
    lost = {share: rehearsal[0.0] - rehearsal[share] for share in child}
    if not judged.any():
        return Verdict(
            False, 0.0, float("nan"), lost[max(lost)],
            "The base stays: no held-out part shows a labelled structure, so nothing can be "
            "judged; label scans of two persons or more, or both halves of the brain.", max(lost),
        )  # fmt: skip
    verdict = _weighed(gains, lost)
    count = int((~judged).sum())
    if not count:
        return verdict
    parts = "1 held-out part shows" if count == 1 else f"{count} held-out parts show"
    unjudged = f"{parts} no labelled structure and {'is' if count == 1 else 'are'} not judged"
    return replace(verdict, reason=f"{verdict.reason} {unjudged}.")


def _weighed(gains: dict[float, np.ndarray], lost: dict[float, float]) -> Verdict:
    """The verdict on gains per held-out part and losses on the rehearsal set, both by share."""
    means = {share: float(np.mean(found)) for share, found in gains.items()}
    allowed = [share for share in gains if lost[share] <= MOST_FORGOTTEN]
    if not allowed:
        share = min(lost, key=lost.__getitem__)
        return Verdict(
            False, 0.0, means[share], lost[share],
            f"The base stays: the adapted model loses {lost[share]:.3f} Dice on the rehearsal set, "
            f"and {MOST_FORGOTTEN:g} is allowed (its gain on held-out scans: {means[share]:+.3f}).",
            share,
        )  # fmt: skip
    share = max(allowed, key=lambda one: (means[one], one))
    gain, better = means[share], int((gains[share] > 0).sum())
    count = len(gains[share])
    if gain < LEAST_GAIN or 2 * better < count:
        return Verdict(
            False, 0.0, gain, lost[share],
            f"The base stays: on held-out scans the adapted model differs by {gain:+.3f} mean Dice "
            f"and is better on {better} of {count}; at least {LEAST_GAIN:+g} and half are asked.",
            share,
        )  # fmt: skip
    return Verdict(
        True, share, gain, lost[share],
        f"The adapted model is kept: on held-out scans it gains {gain:+.3f} mean Dice and is "
        f"better on {better} of {count}; on the rehearsal set it differs by {-lost[share]:+.3f}.",
        share,
    )  # fmt: skip


def _wanted(one: Inspected, fold: Fold) -> np.ndarray:
    """Folded channels of the labels, `IGNORE` outside of what the fold holds out."""
    table = np.full(256, IGNORE, np.uint8)
    table[: len(one.labelled.group)] = one.labelled.group
    wanted = table[one.labelled.channels]
    wanted[~held_out(one, fold)] = IGNORE
    return wanted


def _nearest(channels: np.ndarray, grid: Grid, prediction: Prediction) -> np.ndarray:
    return resample(Volume(channels, grid), prediction.grid, order="nearest")

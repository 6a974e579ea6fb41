"""Soft cross-entropy and soft Dice, with partial labels and unknown voxels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.train.dataset import IGNORE


def soft_target(channels: Tensor, count: int, factor: int) -> tuple[Tensor, Tensor]:
    """Share of every channel in blocks of `factor`³ voxels, and the share that is known.

    Channels uint8 (I, J, K) to (1, count, I/f, J/f, K/f) and (1, I/f, J/f, K/f).
    """
    size = [n // factor for n in channels.shape]
    total = torch.zeros(count + 1, *size, device=channels.device)
    one = torch.full((1, *size), 1 / factor**3, device=channels.device)
    known = torch.where(channels == IGNORE, count, channels.long())
    for i in range(factor):
        for j in range(factor):
            for k in range(factor):
                total.scatter_add_(0, known[None, i::factor, j::factor, k::factor], one)
    return total[None, :count], 1 - total[count][None]


def fold(probabilities: Tensor, group: Tensor) -> Tensor:
    """Merge the channels (dimension 1) that a partial protocol does not tell apart."""
    if bool((group == torch.arange(len(group), device=group.device)).all()):
        return probabilities
    return torch.zeros_like(probabilities).index_add(1, group, probabilities)


@dataclass(frozen=True, eq=False)
class Weights:
    """How much each part of the loss counts.

    `entropy` and `dice` weigh the two terms, `edges` the cross-entropy of voxels at a border;
    `classes` (channels,) the cross-entropy's and `volumes` (channels − 1,) the soft Dice's classes,
    None for evenly.
    """

    entropy: float = 1.0
    dice: float = 1.0
    edges: float = 1.0
    classes: Tensor | None = None
    volumes: Tensor | None = None


def borders(target: Tensor) -> Tensor:
    """Voxels that have a neighbour (diagonals count) of another label: bool (1, I, J, K)."""
    label = target.argmax(1, keepdim=True).float()
    high = F.max_pool3d(label, 3, 1, 1)
    return (high != -F.max_pool3d(-label, 3, 1, 1))[:, 0]


def segmentation_loss(
    logits: Tensor, target: Tensor, known: Tensor, group: Tensor, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and mean soft Dice over the structures that are present.

    `target` (1, channels, I, J, K) already holds merged channels. Cross-entropy is taken of the
    merged probabilities (marginal loss for partial labels: Shi et al. 2021,
    doi:10.1016/j.media.2021.101979); soft Dice: Milletari et al. 2016, doi:10.1109/3DV.2016.79.
    Where nothing is `known`, nothing is lost.
    """
    weights = weights or Weights()
    probabilities = fold(F.softmax(logits.float(), 1), group)
    told = _weighted(target, weights)
    count = known.sum() if told is target else told.sum()
    entropy = -(told * torch.log(probabilities.clamp_min(1e-6))).sum() / count.clamp_min(1e-3)
    p = probabilities[:, 1:] * known[:, None]
    t = target[:, 1:]
    overlap = 2 * (p * t).sum((0, 2, 3, 4))
    size = (p * p + t * t).sum((0, 2, 3, 4))
    present = t.sum((0, 2, 3, 4)) > 4
    if not bool(present.any()):
        return weights.entropy * entropy, entropy.new_zeros(())
    each = ((overlap + 1) / (size + 1))[present]
    dice = each.mean()
    if weights.volumes is None:
        return weights.entropy * entropy + weights.dice * (1 - dice), dice.detach()
    share = weights.volumes[present]
    return weights.entropy * entropy + weights.dice * (
        1 - each @ share / share.sum()
    ), dice.detach()


def _weighted(target: Tensor, weights: Weights) -> Tensor:
    """The target with every voxel and class counted as it should; itself where all are even."""
    if weights.classes is not None:
        target = target * weights.classes[None, :, None, None, None]
    if weights.edges != 1:
        target = target * torch.where(borders(target), weights.edges, 1.0)[:, None]
    return target

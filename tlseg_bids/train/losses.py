"""Soft cross-entropy and soft Dice, with partial labels and unknown voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.train.dataset import IGNORE

SMALLEST = 1e-6
FEWEST_VOXELS = 4
CACHED_VALUES = 1 << 18
GAP_FLOOR = 0.02


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

    `entropy` and `dice` weigh the two terms; `classes` (channels,) the cross-entropy's and
    `volumes` (channels − 1,) the soft Dice's classes, None for evenly. At a border, within slices
    across the axis `across` if that is not None, `edges` is added to the weight of a voxel's class.
    With `every` the soft Dice is that of all classes, background and absent ones included; else
    that of the structures that are present, which needs a cross-entropy beside it: nothing in it
    tells background from an absent structure. `amount` weighs the error of the structures' volumes.
    """

    entropy: float = 1.0
    dice: float = 1.0
    edges: float = 0.0
    classes: Tensor | None = None
    volumes: Tensor | None = None
    across: int | None = None
    every: bool = False
    amount: float = 0.0


def borders(target: Tensor, across: int | None = None) -> Tensor:
    """Voxels that have a neighbour (diagonals count) of another label: bool (1, I, J, K).

    Neighbours in the next slice across the axis `across` do not count.
    """
    label = target.argmax(1, keepdim=True).float()
    sides = [1 if axis == across else 3 for axis in range(3)]
    room = [n // 2 for n in sides]
    high = F.max_pool3d(label, sides, 1, room)
    return (high != -F.max_pool3d(-label, sides, 1, room))[:, 0]


def segmentation_loss(
    logits: Tensor, target: Tensor, known: Tensor, group: Tensor, weights: Weights | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and mean soft Dice over the structures that are present.

    `target` (1, channels, I, J, K) already holds merged channels. Cross-entropy is taken of the
    merged probabilities (marginal loss for partial labels: Shi et al. 2021,
    doi:10.1016/j.media.2021.101979); soft Dice: Milletari et al. 2016, doi:10.1109/3DV.2016.79;
    volumes: mean over the structures that are present of √(r² + 0.02²) − 0.02, where r is the
    difference of the soft volumes ÷ their sum. Where nothing is `known`, nothing is lost.
    """
    return _Loss.apply(logits, target, known, group, weights or Weights())


class _Loss(torch.autograd.Function):
    """The loss with a gradient of its own.

    A few voxels at a time stay in the processor's cache, and nothing but the logits is
    kept; what autograd makes of the same formulas passes some twenty times through memory.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, known: Tensor, group: Tensor, weights: Weights
    ) -> tuple[Tensor, Tensor]:
        told = _weighted(target, weights)
        count = (known.sum() if told is target else told.sum()).clamp_min(1e-3)
        flat = [x.flatten(2) for x in (logits, target, told, known[:, None])]
        sums = torch.zeros((5, logits.shape[1]), device=logits.device)
        for some in _voxels(flat[0]):
            x, t, counted, seen = (one[..., some] for one in flat)
            p = fold(F.softmax(x.float(), 1), group)
            entropy = p.clamp_min(SMALLEST).log_().mul_(counted)
            p = p * seen
            for total, part in zip(sums, (entropy, p * t, p.square() + t * t, t, p), strict=True):
                total += part.sum((0, 2))
        entropy, overlap, size, amount, found = sums
        present = (amount > FEWEST_VOXELS).to(sums.dtype)
        present[0] = 0  # nobody asks for the Dice of the background
        each = (2 * overlap + 1) / (size + 1)
        dice = (present * each).sum() / present.sum().clamp_min(1)
        share = torch.ones_like(present) if weights.every else present
        if weights.volumes is not None:
            share = share * F.pad(weights.volumes.to(sums.dtype), (1, 0))
        share = weights.dice * share / share.sum().clamp_min(1e-9)
        loss = -weights.entropy * entropy.sum() / count + (share * (1 - each)).sum()
        gap = (found - amount) / (found + amount).clamp_min(1)
        bent = (gap.square() + GAP_FLOOR**2).sqrt()
        beside = weights.amount * present / present.sum().clamp_min(1)
        loss = loss + (beside * (bent - GAP_FLOOR)).sum()
        steep = beside * gap / bent * 2 * amount / (found + amount).clamp_min(1).square()
        up = 2 * share / (size + 1)
        terms = weights.entropy / count, up, up * each, steep
        ctx.save_for_backward(*flat, group, *terms)
        ctx.like = logits.shape
        ctx.mark_non_differentiable(dice)
        return loss, dice

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """With p the merged probabilities, g the gradient by them and s = Σ p·g: p·(g − s), which
        a channel gets by its share of the merged one."""
        *flat, group, of_entropy, up, down, steep = ctx.saved_tensors
        of_entropy = of_loss * of_entropy
        up, down, steep = (of_loss * one[:, None] for one in (up, down, steep))
        gradient = torch.empty_like(flat[0])
        for some in _voxels(flat[0]):
            x, t, counted, seen = (one[..., some] for one in flat)
            raw = F.softmax(x.float(), 1)
            p = fold(raw, group)
            inside = p * seen
            slope = (inside * down).addcmul_(t, up, value=-1).add_(steep).mul_(inside)
            # no slope where the logarithm is cut off
            slope.addcmul_(counted.masked_fill(p < SMALLEST, 0), of_entropy, value=-1)
            total = slope.sum(1, keepdim=True)
            if p is not raw:
                slope = slope.div_(p.clamp_min(1e-30))[:, group].mul_(raw)
            gradient[..., some] = slope.addcmul_(raw, total, value=-1)
        return gradient.reshape(ctx.like), None, None, None, None


def _voxels(x: Tensor) -> list[slice]:
    """Voxels (the last axis) that are worked on together: all of them on a GPU."""
    every = few = x.shape[-1]
    if x.device.type == "cpu":
        few = max(CACHED_VALUES // (x.shape[0] * x.shape[1]), 1)
    return [slice(first, first + few) for first in range(0, every, few)]


def _weighted(target: Tensor, weights: Weights) -> Tensor:
    """The target with every voxel and class counted as it should; itself where all are even."""
    told = target
    if weights.classes is not None:
        told = target * weights.classes[None, :, None, None, None]
    if weights.edges:
        told = told + weights.edges * target * borders(target, weights.across)[:, None]
    return told

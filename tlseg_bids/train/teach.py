"""The loss of training examples as a recipe composes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.labels.mapping import known_mappings, load_mapping
from tlseg_bids.train.dataset import IGNORE, Sample, folded, load_classes
from tlseg_bids.train.losses import Weights, segmentation_loss
from tlseg_bids.train.places import one_sided

if TYPE_CHECKING:
    from tlseg_bids.train.draw import Example
    from tlseg_bids.train.recipe import Recipe

BALANCES = ("", "median")
DICE_BY = ("", "volume")
DICE_OVER = ("present", "all")


@dataclass(frozen=True)
class Loss:
    """The table ``[loss]`` of a recipe; the soft Dice's weight is the recipe's `dice_weight`.

    Parameters
    ----------
    entropy : float
        Weight of the cross-entropy.
    balance : str
        ``median``: the cross-entropy of each class counts by the median class frequency over its
        own (Eigen & Fergus 2015, doi:10.1109/ICCV.2015.304).
    edges : float
        Added to the weight of the cross-entropy of a voxel at a border between labels, in slices
        where the network sees slices (Guha Roy et al. 2019, arXiv 1801.04161; 2 in their code).
    dice_over : str
        ``present``: the soft Dice is that of the structures in the example; ``all``: that of every
        class, background and absent ones included.
    dice_by : str
        ``volume``: the soft Dice of each structure counts by 1 ÷ its mean volume.
    rim : int
        Loss only in structures and this many voxels around them; 0 for everywhere.
    coarser : float
        Weight of each coarser level's loss relative to the level before (deep supervision); it
        counts in the steps that ask for no sub-voxels.
    joint : bool
        An example teaches every head whose protocol its labels can be folded to; the mean of the
        heads' losses is taken.
    age : float
        Weight of the squared error of the age, in units of the training ages' variance.
    amount : float
        Weight of the relative error of the volumes of the structures in the example.
    """

    entropy: float = 1.0
    balance: str = ""
    edges: float = 0.0
    dice_over: str = "present"
    dice_by: str = ""
    rim: int = 0
    coarser: float = 0.5
    joint: bool = False
    age: float = 0.01
    amount: float = 0.0

    def __post_init__(self) -> None:
        for key, known in (
            ("balance", BALANCES), ("dice_by", DICE_BY), ("dice_over", DICE_OVER),
        ):  # fmt: skip
            if getattr(self, key) not in known:
                raise UsageError(
                    f"unknown {key} '{getattr(self, key)}'", "the recipe's table [loss]",
                    f"use {' or '.join(repr(name) for name in known)}",
                )  # fmt: skip


class Teacher:
    """Computes the loss of examples.

    Parameters
    ----------
    samples : iterable of Sample
        What is trained on: decides class weights.
    """

    def __init__(self, recipe: Recipe, samples: Iterable[Sample], device: torch.device) -> None:
        self.recipe, self.how, self.device = recipe, recipe.loss, device
        found = list(samples)
        members = [None, *range(recipe.places.count)]
        self.weights = {
            (name, member): self._weights([s for s in found if s.taught == name], member)
            for name in recipe.heads for member in members
        }  # fmt: skip
        self.folds = {
            (a, b): load_mapping(f"{a}_to_{b}").channel_matrix()
            for a in recipe.heads for b in recipe.heads
            if recipe.loss.joint and f"{a}_to_{b}" in known_mappings()
        }  # fmt: skip

    def __call__(self, network: nn.Module, batch: list[Example]) -> Tensor:
        """Loss and soft Dice (n, 2) of examples that ask the same."""
        first = batch[0]
        image = torch.cat([one.image for one in batch])
        prior = None if first.prior is None else torch.cat([one.prior for one in batch])
        heads = self._heads(first)
        with torch.autocast(self.device.type, torch.bfloat16):
            if self._plain(network, heads):
                logits = [[network(image, prior, first.head, first.parts, **first.more)]]
                ages = None
            else:
                logits, ages = network.every(image, prior, heads, first.parts)
        rows = []
        for number, one in enumerate(batch):
            pairs = [
                self._levels([level[number][None] for level in found], one, head)
                for head, found in zip(heads, logits, strict=True)
            ]
            loss, dice = torch.stack([torch.stack(pair) for pair in pairs]).mean(0)
            if ages is not None and one.age == one.age:
                gap = (ages[number] - one.age) / network.age.scale
                loss = loss + self.how.age * gap**2
            rows.append(torch.stack([loss, dice]))
        return torch.stack(rows)

    def _plain(self, network: nn.Module, heads: list[int]) -> bool:
        """Whether the network's one answer is all that the loss looks at."""
        design = getattr(network, "design", None)
        return len(heads) == 1 and not (design and (design.supervised or design.age))

    def _heads(self, one: Example) -> list[int]:
        names = self.recipe.heads
        own = names[one.head]
        also = [n for n, name in enumerate(names) if (own, name) in self.folds]
        return [one.head, *also]

    def _levels(self, logits: list[Tensor], one: Example, head: int) -> tuple[Tensor, Tensor]:
        """Loss of a head's answer and its coarser levels; soft Dice of the answer."""
        target, known, group = one.target, one.known, one.group
        names = self.recipe.heads
        if head != one.head:
            matrix, group = self._fold(names[one.head], names[head], group)
            target = torch.einsum("tc,ncijk->ntijk", matrix, target)
            known = target.sum(1)
        if self.how.rim:
            known = known * near(target, self.how.rim)
        weights = self.weights[names[head], one.member]
        loss, dice = segmentation_loss(logits[0], target * (known > 0), known, group, weights)
        if one.parts:
            return loss, dice
        for level, answer in enumerate(logits[1:], 1):
            share = self.how.coarser**level
            small = [F.avg_pool3d(x, 2**level) for x in (target * (known > 0), known)]
            loss = loss + share * segmentation_loss(answer, *small, group, weights)[0]
        return loss, dice

    def _fold(self, own: str, other: str, group: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix (channels of `other`, channels of `own`) for merged channels, and their group."""
        matrix = self.folds[own, other]
        into, merged = folded(torch.arange(matrix.shape[1]), group.cpu().numpy(), matrix)
        rows = into == torch.arange(len(matrix))[:, None]
        return rows.float().to(self.device), torch.as_tensor(merged, device=self.device)

    def _weights(self, samples: list[Sample], member: int | None) -> Weights:
        """What counts how much for one of several networks, or for the only one (None)."""
        how, dice, places = self.how, self.recipe.dice_weight, self.recipe.places
        classes = volumes = None
        across = places.axes[member] if places.kind == "views" and member is not None else None
        if samples and (how.balance or how.dice_by):
            found = frequencies(samples)
            if member in places.merged:
                into = one_sided(samples[0].taught)
                found = np.bincount(into, found, len(into))
            share = torch.as_tensor(found, dtype=torch.float32, device=self.device)
            present = share > 0
            if how.balance:
                classes = torch.where(present, share[present].median() / share.clamp_min(1e-9), 0)
            if how.dice_by:
                volumes = torch.where(present, 1 / share.clamp_min(1e-9), 0)[1:]
        every = how.dice_over == "all"
        return Weights(how.entropy, dice, how.edges, classes, volumes, across, every, how.amount)


def set_age_scale(network: nn.Module, years: list[float]) -> None:
    """Tell an age head the mean and standard deviation of the training ages, if it is there.

    Raises
    ------
    DataError
        If fewer than two ages are known.
    """
    if not getattr(getattr(network, "design", None), "age", 0):
        return
    known = torch.tensor([age for age in years if age == age])
    if len(known) < 2:
        raise DataError(
            f"{len(known)} of {len(years)} scans {'has' if len(known) == 1 else 'have'} an age, so "
            "that none can be learned",
            "participants.tsv", "write ages there, or set the recipe's design.age to 0",
        )  # fmt: skip
    network.age.centre.copy_(known.mean())
    network.age.scale.copy_(known.std().clamp_min(1e-3))


def near(target: Tensor, rim: int) -> Tensor:
    """1 in structures and up to `rim` voxels (diagonals count) around them: (1, I, J, K)."""
    inside = 1 - target[:, :1] > 0.5
    inside = inside & (target[:, 1:].sum(1, keepdim=True) > 0.5)
    return F.max_pool3d(inside.float(), 2 * rim + 1, 1, rim)[:, 0]


def frequencies(samples: list[Sample]) -> np.ndarray:
    """Share of each channel of the protocol they are learned in among the voxels that are known."""
    total = 0
    for sample in samples:
        own = load_classes(sample.protocol)
        channel = np.append(own.target, np.zeros(256 - len(own.target), int))
        counts = np.bincount(sample.classes.numpy().ravel(), minlength=256)
        counts[IGNORE] = 0
        found = np.bincount(sample.group[channel], counts, len(sample.protocol))
        matrix = sample.folding()
        total = total + (found if matrix is None else matrix @ found)
    return total / total.sum()

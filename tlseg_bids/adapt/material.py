"""What a run of an adaptation learns from: samples, rehearsal heads, the parent and its atlases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlseg_bids.adapt.inspect import Inspected, overlap, sample_of
from tlseg_bids.adapt.judge import Fold, held_out, visible, with_network
from tlseg_bids.adapt.reading import Reading
from tlseg_bids.adapt.record import asked_as_child
from tlseg_bids.networks import build, channels_last
from tlseg_bids.segment.model import Model, learning_precision
from tlseg_bids.train.adaptation import Adaptation
from tlseg_bids.train.dataset import Sample
from tlseg_bids.train.draw import atlas
from tlseg_bids.train.finetune import Parent, grown
from tlseg_bids.train.rehearsal import rehearsal_samples
from tlseg_bids.zoo.card import ModelCard


@dataclass(frozen=True, eq=False)
class Material:
    """What every run learns from: recipe, scans with samples, rehearsal heads, the parent.

    `model` is the parent as a model; `base` is the one that was chosen, without a new head.
    """

    how: Adaptation
    inspected: tuple[Inspected, ...]
    samples: list[Sample]
    maps: list[Sample]
    parent: Parent
    model: Model
    base: Model


class Stock:
    """Makes the material of an adaptation's runs.

    Parameters
    ----------
    card : ModelCard
        The base.
    reading : Reading
        How the site's labels are understood.
    """

    def __init__(self, card: ModelCard, reading: Reading) -> None:
        self.card, self.reading = card, reading

    def whole(self, how: Adaptation, inspected: list[Inspected], base: Model) -> Material:
        """The parent, with one head more where the labels need one, and what it is shown."""
        samples = [
            _on(sample_of(one, self.reading, base.template), base.device) for one in inspected
        ]
        maps = [_on(one, base.device) for one in rehearsal_samples(base.template)]
        known = [np.ones(one.base.shape, bool) for one in inspected]
        mirror = self.reading.mirrored
        base = replace(base, card=asked_as_child(base.card, mirror))
        model = self._with_head(base, samples, inspected, known, mirror)
        parent = self._parent(model, mirror)
        return Material(how, tuple(inspected), samples, maps, parent, model, base)

    def visible_to(self, material: Material, fold: Fold) -> Material:
        """What a fold's run has: nothing of what is held out, nor an atlas or a head made of it.

        A run that a half is held out from sees the other one in the mirror whatever the labels are.
        """
        samples = visible(material.samples, material.inspected, fold)
        known = [
            ~held_out(one, fold) if i in fold.held_out else np.ones(one.base.shape, bool)
            for i, one in enumerate(material.inspected)
        ]
        mirror = self.reading.mirrored or bool(fold.side)
        model = self._with_head(material.base, samples, material.inspected, known, mirror)
        parent = self._parent(model, mirror)
        return replace(material, samples=samples, parent=parent, model=model)

    def _with_head(
        self, base: Model, samples: list[Sample], inspected: Sequence[Inspected],
        known: Sequence[np.ndarray], mirror: bool,
    ) -> Model:  # fmt: skip
        """The base with one head more, where the labels need one.

        It has an atlas of the samples, and starts from the base's answers where voxels are `known`.
        """
        if not self.reading.new_head:
            return base
        heads = (self.reading.target, *base.heads)
        model = replace(base, heads=heads, priors=self._atlases(base, samples, mirror))
        network = self.new_network(model)
        sources = overlap(inspected, known, len(heads[0])).to(base.device)
        with torch.no_grad():
            grown(network, base.networks["segmenter"], sources)
        return with_network(model, network, heads)

    def _parent(self, model: Model, mirror: bool) -> Parent:
        options = self.card.preprocess
        return Parent(
            model.networks["segmenter"], tuple(protocol.name for protocol in model.heads),
            [prior[0] for prior in model.priors.values()], options["box_mm"],
            float(options["spacing_mm"]), learning_precision(model), mirror,
        )  # fmt: skip

    def _atlases(self, model: Model, samples: list[Sample], mirror: bool) -> dict[str, Tensor]:
        """The model's atlases, and before them one of the labels that a new head learns.

        Its voxels are twice as long as those of the template's atlas. One part in n + 1 of it, of n
        samples, is the same for every structure: few persons say little of where another's lie.
        """
        target = self.reading.target.name
        known = {name: prior for name, prior in model.priors.items() if name != target}
        if not known or not hasattr(model.networks["segmenter"], "prior"):
            return known
        box, shape = self.card.preprocess["box_mm"], next(iter(known.values())).shape[2:]
        spacing_mm = (box[0][1] - box[0][0]) / shape[0]
        spacing_mm *= 1 if any(size % 2 for size in shape) else 2
        shown = [_on(one, torch.device("cpu")) for one in samples]
        found = atlas(shown, box, spacing_mm, mirror)
        found = found.lerp(torch.full_like(found, 1 / len(found)), 1 / (len(samples) + 1))
        stored = (found * 255).round() / 255  # as the file will have it
        return {target: stored[None].to(model.device), **known}

    def segmenter_options(self, model: Model) -> dict[str, Any]:
        """What the segmenter of such a model is built from: as in the card, but for the atlases."""
        options = dict(self.card.networks["segmenter"])
        if "prior_channels" in options:
            options["prior_channels"] = sum(prior.shape[1] for prior in model.priors.values())
        return options

    def new_network(self, model: Model) -> nn.Module:
        """A segmenter for the model's heads and atlases, its parameters not yet set."""
        sizes = [len(protocol) for protocol in model.heads]
        network = build(**self.segmenter_options(model), out_channels=sizes)
        return channels_last(network).to(model.device)

    def child(self, material: Material, state: dict[str, Tensor]) -> Model:
        """The base with these parameters of the segmenter."""
        network = self.new_network(material.model)
        network.load_state_dict(state)
        return with_network(material.model, network, material.model.heads)


def _on(sample: Sample, device: torch.device) -> Sample:
    """The sample with its arrays on a device."""
    images = {suffix: image.to(device) for suffix, image in sample.images.items()}
    return replace(sample, classes=sample.classes.to(device), images=images)

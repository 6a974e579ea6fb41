"""Where the brain lies: what a model's small networks, locator and settler, see of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.segment.model import Model, exact, logits_of
from tlseg_bids.zoo.assemble import LOCATOR, SETTLER
from tlseg_bids.zoo.settings import check_complete


def locate(model: Model) -> Callable[[Tensor], np.ndarray]:
    """The card's locator as a function: image (I, J, K) to probabilities (channels, i, j, k).

    Raises
    ------
    DataError
        If the card has no locator.
    """
    if LOCATOR not in model.networks:
        raise DataError(
            "the model has no locator, so the brain cannot be found",
            model.card.path or model.card.name, "choose another model with --model",
        )  # fmt: skip
    check_complete(model.card.preprocess, model.card.path or model.card.name)

    def run(image: Tensor) -> np.ndarray:
        logits = logits_of(model, LOCATOR, image[None, None], None)
        return F.softmax(logits.float(), 1)[0].cpu().numpy()

    return run


def survey(model: Model, prepared: Prepared) -> Prediction:
    """Class probabilities of a card's settler, which sees the whole box at once.

    Parameters
    ----------
    prepared : Prepared
        Its image (1, I, J, K) in the voxels of the settler.

    Returns
    -------
    Prediction
        In the protocol of the template, at the settler's own resolution.
    """
    network = model.networks[SETTLER]
    image = prepared.image[None]
    with exact(model):
        features, added = _of_atlas(model, [n // network.stem for n in image.shape[2:]])
        logits, _ = network.body(image.to(model.device), features, detail=False)
        found = F.softmax(logits + added, 1)[0].cpu().numpy()
    return Prediction(found, prepared.grid.coarser(network.stem, found.shape[1:]))


def _of_atlas(model: Model, shape: Sequence[int]) -> tuple[Tensor | None, Tensor | float]:
    """What the settler makes of the atlas, whatever the image; found once for every size.

    What its first block sees (1, features, i, j, k), and what is added to its logits (1, channels,
    i, j, k): none and nothing where it takes no atlas.
    """
    if not model.networks[SETTLER].prior_channels:
        return None, 0.0
    if (size := tuple(shape)) not in model.surveyed:
        network, atlas = model.networks[SETTLER], model.priors[model.card.located_in]
        if tuple(atlas.shape[2:]) != size:
            atlas = F.interpolate(atlas, size, mode="trilinear")
        found = network.prior_features(atlas), network.prior_logits(atlas)
        last = torch.channels_last_3d
        features, added = (one.contiguous(memory_format=last) for one in found)
        model.surveyed[size] = features, added
    return model.surveyed[size]

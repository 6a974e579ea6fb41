"""Where the brain lies: what a model's small networks, locator and settler, see of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.segment.model import Model, logits_of
from tlseg_bids.zoo.assemble import LOCATOR, SETTLER
from tlseg_bids.zoo.settings import check_complete


def locate(model: Model) -> Callable[[np.ndarray], np.ndarray]:
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

    def run(image: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
        logits = logits_of(model, LOCATOR, tensor, None)
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
    network, atlas = model.networks[SETTLER], model.priors.get(model.card.located_in)
    image = torch.from_numpy(prepared.image)[None]
    shape = [n // network.stem for n in image.shape[2:]]
    with torch.inference_mode():
        prior = atlas
        if atlas is not None and list(atlas.shape[2:]) != shape:
            prior = F.interpolate(atlas, shape, mode="trilinear")
        logits = logits_of(model, SETTLER, image, prior)
        found = F.softmax(logits.float(), 1)[0].cpu().numpy()
    return Prediction(found, prepared.grid.coarser(network.stem, found.shape[1:]))

"""Where the brain lies: what a model's small networks, locator and settler, see of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.segment.fine import likely
from tlseg_bids.segment.model import Model, Seen, logits_of
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
        with torch.inference_mode():
            rows = logits_of(model, LOCATOR, tensor, None)[0].permute(1, 2, 3, 0)
            found = likely(rows, crew=model.windows, kind=torch.float32)
        return found.permute(3, 0, 1, 2).cpu().numpy()

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
    network, image = model.networks[SETTLER], torch.from_numpy(prepared.image)[None]
    known = _known(model, [n // network.stem for n in image.shape[2:]])
    with torch.inference_mode():
        if known is None:
            rows = logits_of(model, SETTLER, image, None)[0].permute(1, 2, 3, 0)
        else:
            logits, _ = network.body(image.to(model.device), known.features[0], detail=False)
            rows = logits[0].permute(1, 2, 3, 0) + known.logits[0]
        found = likely(rows, crew=model.windows, kind=torch.float32).permute(3, 0, 1, 2)
    return Prediction(found.cpu().numpy(), prepared.grid.coarser(network.stem, found.shape[1:]))


def _known(model: Model, shape: list[int]) -> Seen | None:
    """What the settler makes of the template's atlas, at its coarse voxels (i, j, k).

    None where it takes none. Found once for each shape.
    """
    network, atlas = model.networks[SETTLER], model.priors.get(model.card.located_in)
    if atlas is None or not getattr(network, "prior_channels", 0):
        return None
    if (size := (SETTLER, *shape)) not in model.seen:
        with torch.inference_mode():
            prior = F.interpolate(atlas, shape, mode="trilinear")
            features = network.prior_features(prior)
            rows = network.prior_logits(prior)[0].permute(1, 2, 3, 0).contiguous()
        last = torch.channels_last_3d
        model.seen[size] = Seen((features.contiguous(memory_format=last),), (rows,))
    return model.seen[size]

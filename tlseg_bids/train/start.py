"""What a run starts from: the weights of a checkpoint or of a model, fitted to its own network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tlseg_bids.errors import DataError
from tlseg_bids.labels.mapping import known_mappings, load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.recipe import Recipe, load_checkpoint
from tlseg_bids.train.wider import widened
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights

ANSWER = re.compile(
    r"(?P<part>(members\.\d+\.)?(heads|details|deeper\.\d+))\.(?P<head>\d+)\.(?P<name>\w+)"
)
MORE = re.compile(r"^more_up\.\d+")


def load_start(path: Path, role: str) -> dict[str, Any]:
    """A checkpoint, or what the card (TOML) of an exported model leads to.

    Parameters
    ----------
    role : str
        Which of the model's networks: ``locator``, ``settler`` or ``segmenter``.

    Raises
    ------
    NoInputError, DataError
        As `load_checkpoint`, `read_card` and `load_weights`; also if the card has no such network.
    """
    if path.suffix != ".toml":
        saved = load_checkpoint(path)
        return {**saved, "heads": Recipe(**saved["recipe"]).heads}
    card = read_card(path)
    if role not in card.networks:
        known = ", ".join(card.networks)
        raise DataError(f"the model has no network '{role}'", path, f"it has {known}")
    tensors, prefix = load_weights(card), f"{role}."
    history = card.training[role]
    return {
        "average": {
            key.removeprefix(prefix): value.float()
            for key, value in tensors.items()
            if key.startswith(prefix)
        },
        "heads": card.heads if role == "segmenter" else (card.located_in,),
        "template": tensors["template"].double().numpy(),
        "priors": {
            key.removeprefix("prior."): value.float() / 255
            for key, value in tensors.items()
            if key.startswith("prior.")
        },
        "standard": list(card.preprocess.get("standard", [])),
        "recipe": {"name": f"{card.name} {card.version}", "seed": history["seed"]},
        "step": history["steps"],
        "seconds": history["seconds"],
        "data": {
            f"{row['dataset']}/{subject}": sha256
            for row in card.training["data"]
            for subject, sha256 in row["subjects"].items()
        },
        "licences": {row["dataset"]: row["licence"] for row in card.training["data"]},
        "lineage": [],
    }


def adopt(network: nn.Module, recipe: Recipe, start: dict[str, Any]) -> None:
    """Fill a network from weights that may have other heads, priors or no sub-voxel answer.

    A head of the same protocol is taken over; a new one starts from a head whose structures are
    unions of its own, each shared out evenly, where a mapping says so; a further decoder starts
    from the first one; further image channels of the first layer start at 0, so that the network
    answers as its start did of the first one; levels may be wider than the start's, see `widened`.
    What the start does not have keeps its random values, and what it has in another shape is
    refused.

    Raises
    ------
    DataError
        If the body of the network is another one.
    """
    own = network.state_dict()
    given = widened(start["average"], own)
    heads = tuple(start["heads"])
    for key, value in own.items():
        found = ANSWER.fullmatch(key)
        if found:
            if recipe.descent.head != "reset":
                value.copy_(_head(recipe.heads[int(found["head"])], heads, found, given, value))
        elif key == "prior.weight" and key in given:
            value.copy_(_prior(value, given[key], recipe, start))
        elif (there := given.get(key, given.get(MORE.sub("up", key)))) is not None:
            there = _more_images(there, value, network)
            if there.shape != value.shape:
                raise DataError(
                    f"'{key}' has the shape {tuple(there.shape)} in the start and "
                    f"{tuple(value.shape)} in the recipe's network",
                    recipe.start or recipe.name,
                    "give the recipe the network of its start, or wider levels",
                )  # fmt: skip
            value.copy_(there)


def _head(
    protocol: str, heads: tuple[str, ...], key: re.Match[str], given: dict[str, Tensor],
    value: Tensor,
) -> Tensor:  # fmt: skip
    """A head's weight or bias."""
    part, name = key["part"], key["name"]
    if protocol in heads:
        return given.get(f"{part}.{heads.index(protocol)}.{name}", value)
    for number, other in enumerate(heads):
        there = given.get(f"{part}.{number}.{name}")
        if there is None or f"{protocol}_to_{other}" not in known_mappings():
            continue
        matrix = load_mapping(f"{protocol}_to_{other}").channel_matrix()
        row = torch.as_tensor(matrix.argmax(0))
        groups = there.reshape(-1, len(matrix), *there.shape[1:])
        found = groups[:, row]
        if "details" not in part and name == "bias":
            found = found - torch.as_tensor(np.log(matrix.sum(1)[row])).float()
        return found.reshape(value.shape)
    return value


def _more_images(there: Tensor, value: Tensor, network: nn.Module) -> Tensor:
    """The first layer's weights of one image, for a network of several; others as they are.

    The first layer sees the images' voxels, one image after the other, then the atlas' features.
    """
    images, voxels = network.image_channels, network.stem**3
    wider = voxels * (images - 1)
    if images == 1 or there.dim() < 2 or there.shape[1] + wider != value.shape[1]:
        return there
    if (there.shape[0], *there.shape[2:]) != (value.shape[0], *value.shape[2:]):
        return there
    further = there.new_zeros(there.shape[0], wider, *there.shape[2:])
    return torch.cat([there[:, :voxels], further, there[:, voxels:]], 1)


def _prior(value: Tensor, given: Tensor, recipe: Recipe, start: dict[str, Any]) -> Tensor:
    """The first layer's weights for the atlases, protocol by protocol; 0 for a new one."""
    place, at = {}, 0
    for name in (n for n in start["heads"] if n in start["priors"]):
        size = len(load_protocol(name))
        place[name] = slice(at, at + size)
        at += size
    parts = [
        given[:, place[name]] if name in place
        else torch.zeros(value.shape[0], size, *value.shape[2:])
        for name, size in zip(recipe.heads, recipe.head_sizes, strict=True)
        if name in recipe.prior_heads
    ]  # fmt: skip
    return torch.cat(parts, 1)

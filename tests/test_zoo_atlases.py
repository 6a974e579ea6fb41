"""Atlases are stored as boxes and come back as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cards import write_model
from safetensors.torch import load_file, save_file

from tlseg_bids.errors import DataError
from tlseg_bids.zoo.atlases import pack, unpack
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import describe, load_weights


def atlas() -> torch.Tensor:
    """A background, a structure in a corner, one voxel at the far end, and nothing."""
    found = torch.zeros(4, 7, 6, 5, dtype=torch.uint8)
    found[0] = torch.from_numpy(np.random.default_rng(0).integers(1, 255, (7, 6, 5), np.uint8))
    found[1, :3, :2, 1:4] = 9
    found[1, 1, 1, 2] = 0
    found[2, 6, 5, 4] = 255
    return found


def boxed(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**pack({"prior.aseg": atlas(), "template": torch.zeros(4, 3)}), **changes}


def test_an_atlas_comes_back_as_it_was():
    stored = boxed()
    assert len(stored["prior.aseg"]) == 7 * 6 * 5 + 3 * 2 * 3 + 1
    found = unpack(stored, "here")
    assert sorted(found) == ["prior.aseg", "template"]
    assert torch.equal(found["prior.aseg"], atlas())


def test_a_whole_atlas_and_one_that_is_no_atlas_are_left_alone():
    given = {"prior.aseg": atlas(), "prior.mean": torch.zeros(3)}
    assert all(torch.equal(unpack(given, "here")[key], given[key]) for key in given)
    assert torch.equal(pack(given)["prior.mean"], given["prior.mean"])


def changed(number: int, value: list) -> torch.Tensor:
    boxes = boxed()["prior.aseg.boxes"].clone()
    boxes[number] = torch.tensor(value)
    return boxes


@pytest.mark.parametrize(
    "boxes",
    [
        changed(2, [[6, 5, 4], [8, 6, 5]]),
        changed(2, [[6, 5, 4], [6, 6, 5]]),
        changed(2, [[6, 5, 4], [5, 6, 5]]),
        changed(2, [[-1, 5, 4], [0, 6, 5]]),
        changed(0, [[0, 0, 0], [32000, 32000, 32000]]),
        changed(0, [[1, 0, 0], [7, 6, 5]]),
        boxed()["prior.aseg.boxes"].int(),
        boxed()["prior.aseg.boxes"][:1],
        boxed()["prior.aseg.boxes"][0],
    ],
    ids=["beyond", "too few", "turned round", "negative", "huge", "moved", "type", "none", "flat"],
)
def test_boxes_that_do_not_fit_are_refused(boxes):
    with pytest.raises(DataError, match=r"'prior.aseg' does not fit its boxes.*here.*export the"):
        unpack(boxed(**{"prior.aseg.boxes": boxes}), "here")


def test_boxes_without_voxels_are_refused():
    with pytest.raises(DataError, match=r"'prior.aseg' does not fit its boxes"):
        unpack({"prior.aseg.boxes": boxed()["prior.aseg.boxes"]}, "here")


def test_weights_with_boxes_are_the_same_weights(tmp_path):
    card = write_model(tmp_path)
    file = tmp_path / card.weights.file
    whole = {**load_file(file), "prior.aseg": atlas()}
    save_file(pack(whole), file)
    write_card(type(card)(**{**vars(card), "weights": describe(file, "MIT", card.path)}), card.path)
    found = load_weights(read_card(card.path))
    assert sorted(found) == sorted(whole)
    assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_the_atlases_of_the_models_that_ship_lose_nothing():
    for card in load_cards():
        tensors = load_weights(card)
        priors = {k: v for k, v in tensors.items() if k.startswith("prior.")}
        stored = pack(priors)
        assert sum(v.nbytes for v in stored.values()) < sum(v.nbytes for v in priors.values()) / 4
        found = unpack(stored, card.name)
        assert all(torch.equal(found[key], priors[key]) for key in priors)

"""What every entry of a literal table must obey; `test_laws.py` runs them over whatever is there.

A new network, strategy, protocol, mapping or card needs no further test code to be held to these.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from tlseg_bids.labels.mapping import LEFT_OUT, load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import NETWORKS, build
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import check_card
from tlseg_bids.zoo.proof import check_proof
from tlseg_bids.zoo.weights import load_weights, local_file

MAX_PACKAGED_BYTES = 16 * 2**20
GROUPS = {
    "background", "brain-stem", "cerebellum", "cortex", "csf", "deep-grey", "other",
    "outer-csf", "white-matter",
}  # fmt: skip

CLASSES = 4
SMALL_ARGUMENTS: dict[str, Any] = {
    "out_channels": CLASSES, "features": (4, 8), "widths": (2, 2, 3), "dense": (4, 5, 6),
}  # fmt: skip
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"stem": 2}, {"prior_channels": CLASSES}, {"stem": 2, "detail": 6}, {"image_channels": 2},
    {"design": {"shortcut": "input", "down": "stride", "up": "transposed", "slope": 0.0}},
    {"design": {"shortcut": "none", "supervised": 1, "age": 3, "gain": 10.0}},
    {"design": {"decoders": "own"}}, {"view": "sagittal", "kernel": 3},
    {"of": {"network": "unet", "features": [2, 4]}, "each": [{}, {"design": {"up": "transposed"}}]},
)  # fmt: skip


def network_variants(name: str) -> list[dict[str, Any]]:
    """Small arguments for a network: the plain one, and one per option that it knows."""
    known = inspect.signature(NETWORKS[name]).parameters
    small = {key: value for key, value in SMALL_ARGUMENTS.items() if key in known}
    needed = {key for key, one in known.items() if one.default is one.empty} - set(small)
    return [
        {**small, **extra}
        for extra in VARIANTS
        if needed <= set(extra) and set(extra) <= set(known)
    ]


def _network(name: str, arguments: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build(name, **arguments)


def _image(network: nn.Module, count: int = 1) -> torch.Tensor:
    side = 4 * network.divisor
    shape = (count, network.image_channels, side, side, 2 * side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _outputs(network: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """All that a loss can look at; a network that has no more than its answer has no `every`."""
    if not hasattr(network, "every"):
        return [network(image)]
    found = network.every(image)
    ages = [] if found.age is None else [found.age]
    return [one for levels in found.logits for one in levels] + ages


def network_keeps_the_shape(name: str, arguments: dict[str, Any]) -> None:
    """Logits for every class, at the resolution that the network promises."""
    network = _network(name, arguments)
    image = _image(network)
    expected = [n // network.factor for n in image.shape[2:]]
    found = network(image)
    assert list(found.shape) == [1, CLASSES, *expected]
    assert torch.isfinite(found).all()


def gradient_reaches_every_parameter(name: str, arguments: dict[str, Any]) -> None:
    """No parameter is dead weight."""
    network = _network(name, arguments).train()
    generator = torch.Generator().manual_seed(2)
    outputs = _outputs(network, _image(network))
    sum((o * torch.randn(o.shape, generator=generator)).sum() for o in outputs).backward()
    dead = [
        key for key, parameter in network.named_parameters()
        if parameter.grad is None
        or not torch.isfinite(parameter.grad).all()
        or not parameter.grad.abs().sum() > 0
    ]  # fmt: skip
    assert dead == []


def evaluation_is_deterministic(name: str, arguments: dict[str, Any]) -> None:
    """Twice the same image, twice the same answer, and nothing inside has changed."""
    network = _network(name, arguments).eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    image = _image(network)
    with torch.no_grad():
        assert torch.equal(network(image), network(image))
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def batch_equals_singles(name: str, arguments: dict[str, Any]) -> None:
    """Scans in one batch do not know of each other."""
    network = _network(name, arguments).eval()
    images = _image(network, count=3) * torch.tensor([1.0, 5, 0.2]).reshape(3, 1, 1, 1, 1)
    with torch.no_grad():
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def state_dict_round_trip(name: str, arguments: dict[str, Any]) -> None:
    """Parameters and buffers say everything."""
    network = _network(name, arguments).eval()
    torch.manual_seed(7)
    other = build(name, **arguments).eval()
    image = _image(network)
    with torch.no_grad():
        assert not torch.equal(network(image), other(image))
        other.load_state_dict(network.state_dict())
        assert torch.equal(network(image), other(image))


NETWORK_LAWS: tuple[Callable, ...] = (
    network_keeps_the_shape,
    gradient_reaches_every_parameter,
    evaluation_is_deterministic,
    batch_equals_singles,
    state_dict_round_trip,
)


def _walk(strategy: Callable, predict: Callable, image: torch.Tensor, **wish: Any) -> torch.Tensor:
    known = inspect.signature(strategy).parameters
    return strategy(predict, image, **{k: v for k, v in wish.items() if k in known})


def constant_in_constant_out(strategy: Callable) -> None:
    """Blending divides by the weight that it gave."""

    def predict(window: torch.Tensor, *_: object) -> torch.Tensor:
        shares = torch.tensor([0.2, 0.5, 0.3]).reshape(1, 3, 1, 1, 1)
        return shares.expand(1, 3, *window.shape[2:])

    for overlap in (0.0, 0.3, 0.5):
        image = torch.zeros(1, 1, 20, 33, 17)
        found = _walk(strategy, predict, image, window=8, overlap=overlap)
        assert found.shape == (3, 20, 33, 17)
        for channel, share in zip(found, (0.2, 0.5, 0.3), strict=True):
            torch.testing.assert_close(channel, torch.full_like(channel, share))


def every_voxel_is_visited(strategy: Callable) -> None:
    """The identity comes out as the image, voxel by voxel, for windows larger and smaller."""
    image = torch.rand(1, 1, 20, 33, 17, generator=torch.Generator().manual_seed(0))
    seen = torch.zeros(image.shape[2:], dtype=torch.int64)

    def predict(window: torch.Tensor, corner: tuple[int, ...], *_: int) -> torch.Tensor:
        here = tuple(slice(c, c + n) for c, n in zip(corner, window.shape[2:], strict=True))
        seen[here] += 1
        return window

    for side in (8, 16, 64):
        seen.zero_()
        torch.testing.assert_close(_walk(strategy, predict, image, window=side), image[0])
        assert (seen > 0).all()


def coarser_output_lies_where_the_image_lies(strategy: Callable) -> None:
    """Means of 2³ voxels come out as the means of the whole image."""
    image = torch.rand(1, 1, 24, 32, 16, generator=torch.Generator().manual_seed(0))

    def predict(window: torch.Tensor, corner: tuple[int, ...], *_: int) -> torch.Tensor:
        assert all(c % 2 == 0 for c in corner)
        return nn.functional.avg_pool3d(window, 2)

    found = _walk(strategy, predict, image, window=12, factor=2)
    torch.testing.assert_close(found, nn.functional.avg_pool3d(image, 2)[0])


def order_of_the_axes_does_not_matter(strategy: Callable) -> None:
    """Windows visited in another order (axes swapped) give the same blend."""
    image = torch.rand(1, 1, 20, 33, 17, generator=torch.Generator().manual_seed(0))

    def predict(window: torch.Tensor, *_: object) -> torch.Tensor:
        mean = window.mean().expand(1, 1, *window.shape[2:])
        return torch.cat([mean, 1 - mean], dim=1)

    found = _walk(strategy, predict, image, window=8)
    swapped = _walk(strategy, predict, image.permute(0, 1, 4, 3, 2), window=8)
    torch.testing.assert_close(found, swapped.permute(0, 3, 2, 1))


STRATEGY_LAWS: tuple[Callable, ...] = (
    constant_in_constant_out,
    every_voxel_is_visited,
    coarser_output_lies_where_the_image_lies,
    order_of_the_axes_does_not_matter,
)


def protocol_law(name: str) -> None:
    """Unique, background first, sides complete, colours valid."""
    protocol = load_protocol(name)
    table = protocol.table
    assert table["index"].iloc[0] == 0
    assert table["group"].iloc[0] == "background"
    assert (table["group"] == "background").sum() == 1
    for column in ("index", "name", "abbreviation"):
        repeated = table[column][table[column].duplicated()].tolist()
        assert repeated == [], f"{column} {repeated}"
    assert table["index"].between(0, np.iinfo(np.int16).max).all()
    assert (protocol.indices == table["index"]).all()
    assert set(table["group"]) <= GROUPS
    assert [c for c in table["color"] if not re.fullmatch("#[0-9a-f]{6}", c)] == []
    assert int(table["subcortical14"].astype(int).sum()) in (0, 14)
    _sides_law(protocol)


def _sides_law(protocol: Any) -> None:
    table = protocol.table
    by_index = table.set_index("index")
    opposite = {"left": "right", "right": "left", "none": "none"}
    for row in table.to_dict("records"):
        partner = by_index.loc[row["mirror"]]
        assert partner["hemisphere"] == opposite[row["hemisphere"]], row["name"]
        assert partner["group"] == row["group"], row["name"]
        assert partner["subcortical14"] == row["subcortical14"], row["name"]
        side = row["hemisphere"]
        assert row["name"].startswith(side.capitalize()) or side == "none", row["name"]
        if side == "left":
            assert partner["name"] == row["name"].replace("Left", "Right", 1)
    assert (protocol.mirror[protocol.mirror] == np.arange(len(protocol))).all()
    assert len(protocol.pairs()) == (table["hemisphere"] == "left").sum()


def mapping_law(name: str) -> None:
    """Total, and what is not one to one has its reason in the table."""
    mapping = load_mapping(name)
    assert mapping.name == name
    found = mapping.apply(mapping.source.indices)
    assert set(found) <= set(map(int, mapping.target.indices)) | {LEFT_OUT}
    assert set(mapping.left_out) == {
        int(s) for s, t in zip(mapping.source.indices, found, strict=True) if t == LEFT_OUT
    }
    notes = dict(zip(mapping.table["source"].astype(int), mapping.table["note"], strict=True))
    assert [label for label in mapping.left_out if not notes[label]] == []
    for column in mapping.channel_matrix().T:
        assert column.sum() in (0, 1)


def card_law(card: ModelCard) -> None:
    """In order, whole, small enough for the package; heads, flags and answers are the card's."""
    check_card(card)
    assert card.weights.licence
    assert card.citations
    assert card.status != "verified" or card.evidence
    assert card.domain.suffixes
    if card.weights.file is None:
        return
    assert card.weights.bytes <= MAX_PACKAGED_BYTES
    assert local_file(card) is not None
    check_proof(card, load_weights(card, offline=True))

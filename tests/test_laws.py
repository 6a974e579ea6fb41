"""The battery of `laws.py` over everything that the literal tables hold."""

from __future__ import annotations

from importlib import resources

import laws
import pytest
import torch
from torch import nn

from tlseg_bids.labels.mapping import known_mappings
from tlseg_bids.networks import NETWORKS
from tlseg_bids.networks.unet import UNet
from tlseg_bids.segment import STRATEGIES
from tlseg_bids.segment.walk import sliding
from tlseg_bids.zoo.registry import load_cards

PROTOCOLS = sorted(
    file.name.removesuffix(".tsv")
    for file in (resources.files("tlseg_bids.labels") / "protocols").iterdir()
    if file.name.endswith(".tsv")
)
VARIANTS = [
    pytest.param(name, arguments, id=f"{name}-{number}")
    for name in NETWORKS
    for number, arguments in enumerate(laws.network_variants(name))
]


def test_the_tables_are_not_empty() -> None:
    assert NETWORKS
    assert STRATEGIES
    assert PROTOCOLS
    assert known_mappings()


@pytest.mark.parametrize("law", laws.NETWORK_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_network(law, name: str, arguments: dict) -> None:
    law(name, arguments)


@pytest.mark.parametrize("law", laws.STRATEGY_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", list(STRATEGIES))
def test_strategy(law, name: str) -> None:
    law(STRATEGIES[name])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_protocol(name: str) -> None:
    laws.protocol_law(name)


@pytest.mark.parametrize("name", known_mappings())
def test_mapping(name: str) -> None:
    laws.mapping_law(name)


@pytest.mark.parametrize("card", load_cards(), ids=lambda card: card.name)
def test_card(card) -> None:
    laws.card_law(card)


class DeadWeight(UNet):
    """A network with a parameter that nothing uses."""

    def __init__(self, out_channels: int, features: tuple[int, ...] = (4, 8)) -> None:
        super().__init__(out_channels, features)
        self.unused = nn.Parameter(torch.zeros(3))


class SharedNorm(UNet):
    """A network in which the scans of a batch influence each other."""

    def __init__(self, out_channels: int, features: tuple[int, ...] = (4, 8)) -> None:
        super().__init__(out_channels, features)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(image) * image.std()


@pytest.mark.parametrize(
    ("network", "law"),
    [
        (DeadWeight, laws.gradient_reaches_every_parameter),
        (SharedNorm, laws.batch_equals_singles),
    ],
)
def test_a_broken_network_breaks_its_law(network, law, monkeypatch) -> None:
    monkeypatch.setitem(NETWORKS, "broken", network)
    with pytest.raises(AssertionError):
        law("broken", {"out_channels": laws.CLASSES})


def _wrong_weight(predict, image, *, window=96, overlap=0.3, factor=1):
    return sliding(predict, image, window=window, overlap=overlap, factor=factor) * 0.99


def _last_tile_missing(predict, image, *, window=96, overlap=0.3, factor=1):
    cut = image[..., :-1]
    found = sliding(predict, cut, window=window, overlap=overlap, factor=factor)
    return nn.functional.pad(found, (0, 1))


@pytest.mark.parametrize("strategy", [_wrong_weight, _last_tile_missing])
def test_a_broken_strategy_breaks_its_laws(strategy) -> None:
    for law in (laws.constant_in_constant_out, laws.every_voxel_is_visited):
        with pytest.raises(AssertionError):
            law(strategy)

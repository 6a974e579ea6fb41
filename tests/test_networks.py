"""What is each network's own, beyond the laws."""

from __future__ import annotations

import pytest
import torch

from tlseg_bids.networks import build
from tlseg_bids.networks.unet import Block, Design


def image(side: int = 8, channels: int = 1) -> torch.Tensor:
    return torch.randn(1, channels, side, side, side, generator=torch.Generator().manual_seed(1))


def grown(network: torch.nn.Module) -> set[str]:
    """Parameters that a gradient has reached."""
    return {n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum()}


def test_a_residual_unit_with_dead_convolutions_is_its_input():
    x = image()
    for outputs, stride in ((1, 1), (3, 2)):
        block = Block(1, outputs, Design(shortcut="input"), stride)
        torch.nn.init.zeros_(block.norm2.weight)
        wanted = x if outputs == 1 else block.match(x)
        torch.testing.assert_close(block(x), torch.nn.functional.leaky_relu(wanted, 0.01))


def test_coarser_levels_answer_at_half_the_resolution_each():
    network = build("unet", out_channels=[4, 3], features=[2, 4, 6], design={"supervised": 2})
    found = network.every(image())
    assert [[tuple(one.shape[1:]) for one in head] for head in found.logits] == [
        [(4, 8, 8, 8), (4, 4, 4, 4), (4, 2, 2, 2)],
        [(3, 8, 8, 8), (3, 4, 4, 4), (3, 2, 2, 2)],
    ]
    torch.testing.assert_close(found.logits[1][0], network(image(), head=1))


def test_decoders_of_their_own_learn_from_their_own_head_alone():
    network = build("unet", out_channels=[4, 3], features=[2, 4], design={"decoders": "own"})
    network(image(), head=1).square().sum().backward()
    assert {name.split(".")[0] for name in grown(network)} == {"down", "more_up", "heads"}
    network.zero_grad()
    network(image(), head=0).square().sum().backward()
    assert {name.split(".")[0] for name in grown(network)} == {"down", "up", "heads"}


def test_an_untrained_age_is_near_the_centre_of_the_training_ages():
    network = build("unet", out_channels=3, features=[2, 4], design={"age": 5})
    network.age.centre.fill_(30.0)
    network.age.scale.fill_(0.001)
    found = network.predicted_age(torch.cat([image(), 3 * image()]))
    torch.testing.assert_close(found, torch.full((2,), 30.0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"shortcut": "long"}, "shortcut is 'long', not first or input or none"),
        ({"supervised": 2}, "2 coarser answers need more than 2 levels"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(design, message):
    with pytest.raises(ValueError, match=message):
        build("unet", out_channels=3, features=[2, 4], design=design)

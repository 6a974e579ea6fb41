"""What is each network's own, beyond the laws."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import profile

from tlseg_bids.networks import build
from tlseg_bids.networks.blocks import Norm, quarter_step
from tlseg_bids.networks.convolution import Convolution, Pointwise, convolve_raised, join
from tlseg_bids.networks.finish import finish
from tlseg_bids.networks.patches import orthogonal
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


def test_a_quarter_step_is_linear_between_centres_and_repeats_the_faces():
    x = torch.tensor([0.0, 4.0, 12.0])[None, None, :, None, None].expand(1, 1, 3, 1, 1)
    assert quarter_step(x, (1, 0, 1)).flatten().tolist() == [1.0, 6.0, 12.0]
    assert quarter_step(x, (0, 1, 0)).flatten().tolist() == [0.0, 3.0, 10.0]
    wide = torch.randn(2, 2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    for part in ((0, 0, 1), (1, 1, 0)):
        assert torch.autograd.gradcheck(lambda x, part=part: quarter_step(x, part), wide)


def test_a_sub_voxel_is_the_coarse_answer_read_off_its_centre_and_a_correction():
    network = build(
        "unet", out_channels=[4, 3], features=[6, 8], stem=2, prior_channels=3, detail=5
    )
    prior = torch.rand(1, 3, 4, 4, 4)
    for head, part in ((0, (0, 1, 1)), (1, (1, 0, 0))):
        coarse = network(image(), prior, head, parts=())
        weight, bias = network.corrections(head)
        _, edges = network.body(image(), network.prior_features(prior), head)
        number = 4 * part[0] + 2 * part[1] + part[2]
        added = torch.einsum("cf,nfijk->ncijk", weight[number], edges)
        wanted = quarter_step(coarse, part) + added + bias[number][:, None, None, None]
        torch.testing.assert_close(network(image(), prior, head, parts=[part]), wanted)


def test_logits_that_are_blended_are_not_rounded_to_bfloat16():
    network = build("unet", out_channels=4, features=[6, 8], stem=2, detail=5)
    torch.nn.init.normal_(network.heads[0].weight)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits, edges = network.body(image(16))
    assert (logits.dtype, edges.dtype) == (torch.float32, torch.bfloat16)
    assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_channels_are_joined_as_torch_does_and_stay_where_they_lie(layout):
    parts = [
        torch.randn(2, channels, 4, 6, 8).to(memory_format=layout).requires_grad_()
        for channels in (5, 3)
    ]
    found, wanted = join(parts), torch.cat(parts, 1)
    assert found.stride() == wanted.stride() and found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    down = torch.randn_like(wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, down), torch.autograd.grad(wanted, parts, down),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


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
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network.every(image()).age
    assert rounded.dtype == torch.float32, "bfloat16 tells 64 from 64.5 years at best"
    torch.testing.assert_close(found, torch.full((2,), 30.0), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("design", "message"),
    [
        ({"shortcut": "long"}, "shortcut is 'long', not first or input or none"),
        ({"supervised": 2}, "2 coarser answers need more than 2 levels"),
        ({"gain": 0.0}, "gain is 0.0, not above 0"),
    ],
)
def test_a_design_that_makes_no_sense_is_refused(design, message):
    with pytest.raises(ValueError, match=message):
        build("unet", out_channels=3, features=[2, 4], design=design)


def test_unpooling_puts_values_back_where_the_maxima_were(monkeypatch):
    network = build("quicknat", out_channels=3, features=[2, 2, 2], kernel=3).eval()
    given, pool, unpool = [], torch.nn.functional.max_pool2d, torch.nn.functional.max_unpool2d

    def remember(x, size, return_indices):
        found = pool(x, size, return_indices=return_indices)
        given.append((x, *found))
        return found

    def check(x, places, size):
        before, _, indices = given.pop()
        assert torch.equal(places, indices), "of the same level, deepest first"
        found = unpool(x, places, size)
        kept = torch.gather(found.flatten(2), 2, places.flatten(2))
        assert torch.equal(kept, x.flatten(2))
        assert int((found != 0).sum()) <= places.numel()
        assert found.shape == before.shape
        return found

    monkeypatch.setattr(torch.nn.functional, "max_pool2d", remember)
    monkeypatch.setattr(torch.nn.functional, "max_unpool2d", check)
    network(torch.rand(1, 1, 8, 8, 2))
    assert given == []


@pytest.mark.parametrize(("view", "axis"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_a_slice_does_not_see_its_neighbours(view, axis):
    network = build("quicknat", out_channels=3, features=[2, 4], view=view, kernel=3).eval()
    one = torch.rand(1, 1, 6, 7, 5, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    other.select(2 + axis, 3).zero_()
    same = (network(one) == network(other)).all(1)[0]
    rows = same.movedim(axis, 0).flatten(1).all(1).tolist()
    assert rows == [n != 3 for n in range(one.shape[2 + axis])]


def test_a_member_is_asked_alone_and_learns_alone():
    network = build("members", out_channels=3, of={"network": "unet", "features": [2, 4]},
                    each=[{}, {}, {}])  # fmt: skip
    window = torch.rand(1, 1, 7, 6, 8, generator=torch.Generator().manual_seed(0))
    found = network(window, member=1)
    assert found.shape == (1, 3, 7, 6, 8)
    padded = torch.nn.functional.pad(window, (0, 0, 0, 0, 0, 1))
    torch.testing.assert_close(found, network.members[1](padded)[:, :, :7])
    found.sum().backward()
    assert {name.split(".")[1] for name in grown(network)} == {"1"}


def test_a_view_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="view is 'oblique', not sagittal or coronal or axial"):
        build("quicknat", out_channels=3, view="oblique")


def test_orthogonal_patches_agree_with_indexing_by_hand():
    volume = torch.rand(9, 10, 11, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(volume, (16,) * 6)
    voxels = torch.tensor([[0, 0, 0], [4, 5, 6], [8, 9, 10]])
    found = orthogonal(padded, voxels)
    assert found.shape == (3, 3, 32, 32)
    for n, (i, j, k) in enumerate(voxels.tolist()):
        for row in range(32):
            for column in range(32):
                a, b = row - 16, column - 16
                points = [(i + a, j + b, k), (i + a, j, k + b), (i, j + a, k + b)]
                for plane, point in enumerate(points):
                    inside = all(0 <= p < s for p, s in zip(point, volume.shape, strict=True))
                    wanted = volume[point] if inside else 0
                    assert found[n, plane, row, column] == wanted


def test_some_voxels_answer_as_in_the_whole_window_and_far_from_the_atlas_is_background():
    network = build("patches", out_channels=3, prior_channels=3, reach=1, widths=[2, 2, 3],
                    dense=[4, 5, 6]).eval()  # fmt: skip
    window = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    prior = torch.zeros(1, 3, 6, 7, 8)
    prior[:, 0] = 1
    prior[:, :, 2, 3, 4] = torch.tensor([0.5, 0.5, 0])
    whole = network(window, prior)
    voxels = torch.tensor([[2, 3, 4], [3, 4, 5], [1, 2, 3]])
    some = network(window, prior, voxels=voxels)
    assert some.shape == (1, 3, 3, 1, 1)
    i, j, k = voxels.T
    torch.testing.assert_close(some[0, :, :, 0, 0], whole[0, :, i, j, k])
    far = whole.softmax(1)[0, 0] > 0.999
    assert int((~far).sum()) <= 27 and bool(far[0].all())
    assert len(network.candidates(window, prior)) == 27


def test_the_gain_multiplies_every_answer_unrounded():
    torch.manual_seed(0)
    plain = build("unet", out_channels=3, features=[2, 4, 6], design={"supervised": 1})
    raised = build(
        "unet", out_channels=3, features=[2, 4, 6], design={"supervised": 1, "gain": 100.0}
    )
    raised.load_state_dict(plain.state_dict())
    for one, other in zip(plain.every(image()).logits[0], raised.every(image()).logits[0],
                          strict=True):  # fmt: skip
        torch.testing.assert_close(other, 100 * one)
    with torch.autocast("cpu", torch.bfloat16):
        assert raised(image()).dtype == torch.float32
    with pytest.raises(ValueError, match="a sub-voxel answer takes no gain of 100"):
        build("unet", out_channels=3, features=[2, 4], stem=2, detail=4, design={"gain": 100.0})


@pytest.mark.parametrize(("stride", "side"), [(1, 6), (2, 6), (2, 5)])
def test_a_convolution_that_learns_nothing_answers_as_one_that_does(stride, side):
    """On one thread PyTorch would take another way for float32, three times as slow."""
    torch.manual_seed(0)
    convolution, x = Convolution(3, 4, stride), image(side, 3)
    learning = convolution(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.inference_mode(), profile() as seen:
            torch.testing.assert_close(convolution(x), learning.detach())
            with torch.autocast("cpu", torch.bfloat16):
                assert convolution(x.bfloat16()).dtype == torch.bfloat16
    finally:
        torch.set_num_threads(before)
    if torch.backends.mkldnn.is_available():
        assert not any("slow_conv3d" in event.name for event in seen.events())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_a_level_is_convolved_where_it_is_as_if_it_were_raised(kind):
    torch.manual_seed(0)
    deep, skip = torch.randn(2, 3, 2, 3, 4).to(kind), torch.randn(2, 2, 4, 6, 8).to(kind)
    weight = torch.randn(5, 5, 3, 3, 3).to(kind) / 10
    raised = torch.nn.functional.interpolate(deep, scale_factor=2, mode="nearest")
    wanted = torch.nn.functional.conv3d(join([raised, skip]), weight, padding=1)
    with torch.inference_mode():
        found = convolve_raised(deep, skip, weight)
    near = {"rtol": 0.03, "atol": 0.03} if kind == torch.bfloat16 else {}
    torch.testing.assert_close(found, wanted.to(torch.promote_types(kind, torch.float32)), **near)


def test_an_image_is_convolved_as_it_is_where_all_else_is_rounded_to_bfloat16():
    """A kernel that takes differences sees those of an image whose values bfloat16 cannot tell."""
    torch.manual_seed(0)
    layer = Convolution(3, 4)
    kernel = layer.weight.data
    kernel[:, :, 0], kernel[:, :, 1] = -kernel[:, :, 2], 0
    x, more = 100 + torch.rand(1, 2, 8, 8, 8), torch.randn(1, 1, 8, 8, 8).bfloat16()
    wanted = torch.nn.functional.conv3d(join([x, more.float()]), kernel, padding=1)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x, more), wanted, rtol=1e-3, atol=1e-4)
        rounded = layer(x.bfloat16(), more)[:, :, 1:-1]
    assert rounded.dtype == torch.bfloat16
    error = rounded.float() - wanted[:, :, 1:-1]
    assert float(error.std()) > 0.1 * float(wanted[:, :, 1:-1].std())
    torch.testing.assert_close(layer(x, more.float()), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_norm_and_activation_round_to_bfloat16_once(layout, kept):
    torch.manual_seed(0)
    norm = Norm(5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    shape = 1, 5, 20, 52, 53  # a slab and the beginning of another
    x, added = 2 + torch.randn(shape).to(memory_format=layout), torch.randn(shape)
    wanted = torch.nn.functional.leaky_relu(norm(x) + added, 0.2)
    with torch.inference_mode():
        torch.testing.assert_close(finish(x, norm, 0.2, added, kept), wanted)
        with torch.autocast("cpu", torch.bfloat16):
            found = finish(x, norm, 0.2, added, kept)
            alone = finish(x, norm, 0.2)
    assert found.dtype == kept
    bit = 0.0 if kept == torch.float32 else 2**-8
    torch.testing.assert_close(found.float(), wanted, rtol=bit + 1e-4, atol=1e-4)
    plain = torch.nn.functional.leaky_relu(norm(x), 0.2)
    torch.testing.assert_close(alone.float(), plain, rtol=2**-8 + 1e-4, atol=1e-4)


def test_what_is_not_a_product_is_not_rounded_where_nothing_is_learned():
    """Training rounds after every step of a block, labelling before a convolution alone."""
    torch.manual_seed(0)
    network = build("unet", out_channels=4, features=[8, 12, 16], stem=2, detail=5)
    torch.nn.init.normal_(network.heads[0].weight)
    for weights in network.parameters():
        weights.data = weights.data.bfloat16().float()
    error = {}
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            wanted = network.body(image(32))[0]
            with torch.autocast("cpu", torch.bfloat16):
                error[learns] = float((network.body(image(32))[0] - wanted).detach().std())
    assert 0 < error[False] < 0.8 * error[True], error


@pytest.mark.parametrize("inputs", [1, 16])
def test_a_pointwise_layer_is_the_same_whether_it_learns_or_not(inputs):
    torch.manual_seed(0)
    layer, x = Pointwise(inputs, 5), image(12, inputs)
    learning = layer(x)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), learning.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("design", [{}, {"shortcut": "input"}, {"up": "transposed"}])
def test_a_network_answers_the_same_whether_it_learns_or_not(design):
    torch.manual_seed(0)
    network = build("unet", out_channels=3, features=[4, 6, 8], design=design)
    learning = network(image())
    with torch.inference_mode():
        torch.testing.assert_close(network(image()), learning.detach(), rtol=1e-4, atol=1e-5)


THIN = """
import sys
import torch
from tlseg_bids.networks.blocks import Block, Design
torch.manual_seed(0)
block = Block(16, 16, Design(shortcut="input"), int(sys.argv[1]))
image = torch.randn(1, 16, *map(int, sys.argv[2:]))
with torch.autocast("cpu", torch.bfloat16):
    block(image).float().square().mean().backward()
found = {name: value.grad.clone() for name, value in block.named_parameters()}
block.zero_grad()
block(image).square().mean().backward()
for name, value in block.named_parameters():
    assert (found[name] - value.grad).abs().max() < 0.5, name
"""


@pytest.mark.parametrize("given", ["1 2 2 2", "1 2 3 4", "2 4 4 4", "2 4 4 1"])
def test_thin_features_teach_nothing_that_was_in_memory_before(given):
    """glibc fills every new piece of memory with 0x7f: 3e38 as a number in bfloat16."""
    ran = subprocess.run(
        [sys.executable, "-c", THIN, *given.split()], env={**os.environ, "MALLOC_PERTURB_": "128"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr

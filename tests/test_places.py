"""Networks that share the volume: where their examples lie, and that each learns alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from heads import PROTOCOL, tiny_recipe, write_heads

from tlseg_bids.errors import UsageError
from tlseg_bids.train.loop import Training, batches
from tlseg_bids.train.places import Places, draw_spot, draw_voxels
from tlseg_bids.train.recipe import Recipe
from tlseg_bids.train.synth import Random

BOX = [[-48.0, 48.0], [-48.0, 48.0], [-40.0, 40.0]]
HALVES = Places("tiles", begins=[[0, 24], [0, 20], [0, 20]])


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    return write_heads(tmp_path_factory.mktemp("data"))


def shared(places: Places, patch: list[int], network: dict) -> Recipe:
    return replace(tiny_recipe(), places=places, patch=patch, box_mm=BOX, warmup=0, network=network)


def test_a_tile_lies_where_the_strategy_has_it():
    rng, seen = Random(0), {}
    for _ in range(80):
        spot = draw_spot(rng, HALVES, [24, 28, 20], BOX, 2.0)
        assert spot.sides == (24, 28, 20)
        seen[spot.member] = tuple(((spot.corner - [-47, -47, -39]) / 2).tolist())
    assert seen[0] == (0, 0, 0) and seen[3] == (0, 20, 20) and seen[4] == (24, 0, 0)
    assert sorted(seen) == list(range(8))


def test_a_window_lies_where_the_strategy_has_it_and_teaches_the_one_network(heads):
    places = Places("windows", begins=[[2], [0, 20], [4]])
    rng, seen = Random(0), set()
    for _ in range(40):
        spot = draw_spot(rng, places, [24, 28, 20], BOX, 2.0)
        assert spot.member is None and spot.sides == (24, 28, 20)
        seen.add(tuple(((spot.corner - [-47, -47, -39]) / 2).tolist()))
    assert seen == {(2, 0, 4), (2, 20, 4)}
    recipe = replace(tiny_recipe(), places=places, patch=[24, 28, 20], box_mm=BOX)
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    assert one.member is None and one.image.shape[2:] == (24, 28, 20)
    assert places.count == 0


def test_a_slab_lies_across_its_axis_and_anywhere_along_it():
    places = Places("views", axes=[2, 0], slices=4)
    rng, along = Random(0), {0: set(), 1: set()}
    for _ in range(400):
        spot = draw_spot(rng, places, [48, 48, 40], BOX, 2.0)
        axis = places.axes[spot.member]
        assert spot.sides == tuple(4 if a == axis else n for a, n in enumerate((48, 48, 40)))
        first = (spot.corner - [-47, -47, -39]) / 2
        assert all(first[a] == 0 for a in range(3) if a != axis)
        along[spot.member].add(int(first[axis]))
    assert (min(along[0]), max(along[0])) == (0, 36)
    assert (min(along[1]), max(along[1])) == (0, 44)


def test_an_example_teaches_the_network_of_its_tile_alone(heads):
    network = {"network": "members", "of": {"network": "unet", "features": [2, 4]},
               "each": [{} for _ in range(8)]}  # fmt: skip
    run = Training(shared(HALVES, [24, 28, 20], network), heads, None)
    one = run.draw(run.rng)
    assert one.image.shape[2:] == (24, 28, 20)
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    run.learn([one])
    after = run.network.state_dict()
    moved = {k.split(".")[1] for k in after if not torch.equal(after[k], before[k])}
    assert moved == {str(one.member)}
    pair = [replace(one, member=0), replace(one, member=1), replace(one, member=0)]
    assert [len(found) for found in batches(pair, 3)] == [2, 1]


def test_a_sagittal_network_is_not_asked_for_sides(heads):
    network = {"network": "members", "of": {"network": "quicknat", "features": [2, 4], "kernel": 3},
               "each": [{"view": "axial"}, {"view": "sagittal"}]}  # fmt: skip
    places = Places("views", axes=[2, 0], slices=4, merged=[1])
    run = Training(shared(places, [48, 48, 40], network), heads, None)
    found = {}
    while set(found) != {0, 1}:
        one = run.draw(run.rng)
        found[one.member] = one
    mirror = torch.as_tensor(PROTOCOL.mirror)
    right = torch.arange(len(mirror)) > mirror
    assert found[1].image.shape == (1, 1, 4, 48, 40)
    assert float(found[1].target[:, right].sum()) == 0
    assert torch.equal(found[1].group[right], mirror[right])
    assert torch.equal(found[0].group, torch.arange(len(mirror)))
    run.learn([found[1]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "balls"}, "unknown kind 'balls'.*places.*patches, windows, tiles, views, voxels"),
        ({"kind": "tiles"}, "tiles lack 'begins'"),
        ({"kind": "views"}, "views lack 'axes'"),
    ],
)
def test_places_that_make_no_sense_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        Places(**values)


def test_half_of_the_voxels_lie_in_structures_the_others_around_them():
    target = torch.zeros(1, 3, 20, 20, 20)
    target[:, 0] = 1
    target[:, :, 8:12, 8:12, 8:12] = torch.tensor([0.0, 0, 1])[:, None, None, None]
    known = torch.ones(1, 20, 20, 20)
    known[:, 6] = 0
    nothing = draw_voxels(Random(0), target, torch.zeros_like(known), Places("voxels", voxels=8))
    assert nothing.shape == (8, 3), "a patch of which nothing is known teaches nothing"
    voxels = draw_voxels(Random(0), target, known, Places("voxels", voxels=200, rim=2))
    inside = target[0, 2][tuple(voxels.T)] > 0
    assert inside[:100].all() and not inside[100:].any()
    assert int(voxels.min()) >= 6 and int(voxels.max()) < 14
    assert 6 not in voxels[:, 0].tolist(), "of that plane nothing is known"

"""What a recipe composes: loss, optimiser, scope, stages, joint heads, age."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import PARCELS, PROTOCOL, tiny_recipe, write_heads, write_parcels
from torch import nn

from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import load_classes
from tlseg_bids.train.descent import Descent, build_optimiser, rate_at, set_rate
from tlseg_bids.train.loop import Training, new_state, train
from tlseg_bids.train.losses import Weights, borders, segmentation_loss
from tlseg_bids.train.places import Places, one_sided
from tlseg_bids.train.recipe import Recipe, load_checkpoint
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.train.supply import load_samples
from tlseg_bids.train.teach import Loss, frequencies, near, set_age_scale


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """Two datasets: `balls` and, with BrainCOLOR labels and an image, `parcels`."""
    root = write_parcels(write_heads(tmp_path_factory.mktemp("data")))
    (root / "parcels" / "participants.tsv").write_text("participant_id\tage\nsub-01\t30\n")
    return root


def plain(**changes) -> Recipe:
    """A full-resolution network without a prior."""
    network = {"network": "unet", "features": [4, 8], **changes.pop("network", {})}
    return replace(tiny_recipe(), network=network, warmup=0, **changes)


def moved(run: Training) -> set[str]:
    """First parts of the names of the parameters that one step changes."""
    before = {k: v.clone() for k, v in run.network.state_dict().items()}
    run.learn([run.draw(run.rng)])
    after = run.network.state_dict()
    return {k.split(".", maxsplit=1)[0] for k in after if not torch.equal(after[k], before[k])}


def test_the_schedules():
    poly = Descent(schedule="poly", power=0.9)
    assert [rate_at(poly, s, 10, 0) for s in (0, 5)] == pytest.approx([1, 0.5**0.9])
    assert rate_at(Descent(schedule="constant"), 9, 10, 2) == 1
    assert rate_at(Descent(), 10, 10, 0) == pytest.approx(0.01)
    assert rate_at(poly, 1, 10, 4) == 0.5


def test_sgd_has_nesterovs_momentum_and_the_age_a_rate_of_its_own():
    descent = Descent(optimiser="sgd", age_rate=0.2)
    network = torch.nn.ModuleDict({"body": torch.nn.Linear(1, 1), "age": torch.nn.Linear(1, 1)})
    optimiser = build_optimiser(network, descent, 1.0, 0.0)
    assert isinstance(optimiser, torch.optim.SGD)
    set_rate(optimiser, 0.5)
    found = [(g["lr"], g["nesterov"], g["momentum"]) for g in optimiser.param_groups]
    assert found == [(0.5, True, 0.99), (pytest.approx(0.1), True, 0.99)]


@pytest.mark.parametrize("kind", ["adam", "sgd", "muon"])
def test_every_optimiser_learns(heads, kind):
    run = Training(plain(descent=Descent(optimiser=kind)), heads, None)
    assert moved(run) == {"down", "up", "heads"}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_muon_moves_a_kernel_in_all_directions_alike(layout):
    """Kernels of several voxels by orthogonal steps; everything else as by AdamW."""
    torch.manual_seed(0)
    networks = [
        nn.Sequential(nn.Conv3d(4, 6, 3), nn.Conv3d(6, 2, 1)).to(memory_format=layout)
        for _ in range(2)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    before = networks[0][0].weight.detach().clone()
    for network, kind in zip(networks, ("muon", "adamw"), strict=True):
        optimiser = build_optimiser(network, Descent(optimiser=kind), 1e-2, 0.0)
        optimiser.zero_grad()
        network(torch.ones(1, 4, 5, 5, 5)).square().sum().backward()
        given = network[0].weight.grad
        optimiser.step()
    step = (before - networks[0][0].weight).reshape(6, -1).detach()
    sizes = torch.linalg.svdvals(step)[: torch.linalg.matrix_rank(given.reshape(6, -1))]
    scale = 1e-2 * 0.2 * np.sqrt(4 * 27)
    assert (sizes > 0.6 * scale).all() and (sizes < 1.3 * scale).all()
    assert (step * given.reshape(6, -1)).sum() > 0, "downhill"
    for name in ("0.bias", "1.weight", "1.bias"):
        one, other = (dict(network.named_parameters())[name] for network in networks)
        torch.testing.assert_close(one, other)
    optimiser.zero_grad()
    assert all(p.grad is None for p in networks[1].parameters())


def test_in_stage_one_only_the_classifier_moves(heads):
    descent = Descent(first_stage=0.4)
    run = Training(plain(steps=5, descent=descent), heads, None)
    assert [moved(run), moved(run)] == [{"heads"}, {"heads"}]
    assert moved(run) == {"down", "up", "heads"}


def test_the_mirror_can_be_left_out(heads):
    plainly = Training(plain(mirror=False), heads, None).draw.samples
    both = Training(plain(), heads, None).draw.samples
    assert {n: 2 * len(found) for n, found in plainly.items()} == {
        n: len(found) for n, found in both.items()
    }


@pytest.mark.parametrize("mirror", [False, True])
def test_a_structure_of_one_side_is_on_both_sides_of_an_atlas_only_with_the_mirror(heads, mirror):
    recipe = plain(mirror=mirror, network={"prior_channels": len(PROTOCOL)})
    samples = load_samples(recipe, heads)
    classes = load_classes(PROTOCOL)
    left = int(np.flatnonzero(classes.index == 10)[0])
    for sample in samples["balls"]:
        sample.classes[sample.classes == left] = 0
    prior = new_state(recipe, samples, None)["priors"]["aseg"]
    assert bool(prior[int(classes.target[left])].any()) == mirror


def test_the_scope_none_changes_nothing(heads):
    run = Training(plain(descent=Descent(scope="none")), heads, None)
    assert moved(run) == set()
    assert run.step == 1 and len(run.losses) == 1


def test_a_head_that_is_reset_does_not_start_from_the_parents(heads, tmp_path):
    first = train(plain(steps=1), heads, tmp_path, _quiet)
    before = load_checkpoint(first)["average"]
    again = plain(start=str(first), name="again")
    kept, reset = (
        Training(replace(again, descent=Descent(head=head)), heads, None).network.state_dict()
        for head in ("keep", "reset")
    )
    assert torch.equal(kept["heads.0.weight"], before["heads.0.weight"])
    assert not torch.equal(reset["heads.0.weight"], before["heads.0.weight"])
    assert torch.equal(reset["up.0.conv1.weight"], before["up.0.conv1.weight"])


def test_a_second_decoder_starts_from_the_first(heads, tmp_path):
    first = train(plain(steps=1), heads, tmp_path, _quiet)
    both = plain(
        name="both", protocol="braincolor", more_heads=["aseg"], datasets={"parcels": PARCELS},
        start=str(first), network={"design": {"decoders": "own"}},
    )  # fmt: skip
    state = Training(both, heads, None).network.state_dict()
    assert torch.equal(state["more_up.0.0.conv1.weight"], state["up.0.conv1.weight"])


def test_one_example_teaches_both_heads_the_mean_of_their_losses(heads):
    recipe = plain(
        protocol="braincolor", more_heads=["aseg"], datasets={"parcels": PARCELS},
        network={"design": {"decoders": "own"}}, loss=Loss(joint=True),
    )  # fmt: skip
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    loss = run.teach(run.network, [one])[0, 0]
    each = []
    for number, name in enumerate(recipe.heads):
        found = run.network.every(one.image, heads=[number], parts=()).logits[0][0]
        target, known = one.target, one.known
        if number:
            matrix = torch.as_tensor(run.teach.folds["braincolor", name])
            target = torch.einsum("tc,ncijk->ntijk", matrix, target)
            known = target.sum(1)
        each.append(segmentation_loss(found, target, known, torch.arange(target.shape[1]))[0])
    assert float(loss.detach()) == pytest.approx(float(torch.stack(each).mean().detach()), rel=0.02)
    assert moved(run) == {"down", "up", "more_up", "heads"}


def test_what_a_dataset_merges_is_merged_for_the_other_head_too(heads):
    """Labels that do not tell a thalamus from a caudate tell them in no head."""
    pairs = load_mapping("braincolor_to_aseg").pairs
    sources = [next(s for s, target in pairs.items() if target == label) for label in (10, 11)]
    recipe = plain(
        protocol="braincolor", more_heads=["aseg"], loss=Loss(joint=True),
        datasets={"parcels": {**PARCELS, "merge": [sources]}},
    )  # fmt: skip
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    indices = load_protocol("aseg").indices
    thalamus, caudate = (int(np.flatnonzero(indices == label)[0]) for label in (10, 11))
    with torch.no_grad():  # all of the two for one of them, then for the other
        found = []
        for answered, empty in ((thalamus, caudate), (caudate, thalamus)):
            run.network.heads[1].bias[answered], run.network.heads[1].bias[empty] = 5.0, -5.0
            found.append(float(run.teach(run.network, [one])[0, 0]))
    assert found[0] == pytest.approx(found[1], rel=2e-4)


def test_what_a_network_cannot_do_is_said(heads):
    network = {"network": "members", "of": {"network": "unet", "features": [2, 4]}, "each": [{}]}
    recipe = replace(tiny_recipe(), network=network)
    with pytest.raises(UsageError, match="'members' answers for one head at a time.*tiny.*joint"):
        Training(replace(recipe, loss=Loss(joint=True)), heads, None)
    run = Training(replace(recipe, descent=Descent(scope="medium")), heads, None)
    with pytest.raises(UsageError, match="'medium' counts blocks.*this network has none.*norm"):
        run.learn([run.draw(run.rng)])


def test_a_rim_leaves_out_what_is_far_from_structures(heads):
    run = Training(plain(loss=Loss(rim=1)), heads, None)
    one = run.draw(run.rng)
    logits = torch.zeros_like(one.target, requires_grad=True)
    run.teach(lambda *_: logits, [one])[0, 0].backward()
    far = (near(one.target, 1) == 0)[:, None].expand_as(logits)
    assert float(logits.grad[far].abs().sum()) == 0
    assert float(logits.grad[~far].abs().sum()) > 0


def test_coarser_levels_count_half_each(heads):
    recipe = plain(network={"features": [4, 8, 8], "design": {"supervised": 1}})
    run = Training(replace(recipe, loss=Loss(coarser=0.0)), heads, None)
    one = run.draw(run.rng)
    losses = []
    for share in (0.0, 0.5, 1.0):
        run.teach.how = Loss(coarser=share)
        losses.append(float(run.teach(run.network, [one])[0, 0]))
    assert losses[1] - losses[0] == pytest.approx((losses[2] - losses[0]) / 2, rel=1e-3)
    assert losses[2] > losses[0]
    assert "deeper" in moved(run)


def test_the_age_is_learned_where_it_is_known(heads):
    recipe = plain(
        protocol="braincolor", datasets={"parcels": PARCELS}, network={"design": {"age": 3}}
    )
    with pytest.raises(DataError, match="1 of 1 scans has an age.*participants.tsv.*design.age"):
        Training(recipe, heads, None)
    network = Training(plain(), heads, None).network
    set_age_scale(network, [1.0])
    ages = [s.age_years for s in load_dataset(heads / "parcels", "parcels", PARCELS)]
    assert ages == [30.0]
    assert all(math.isnan(s.age_years) for s in load_dataset(heads / "balls", "balls", {}))


def test_an_age_moves_the_age_head_alone_beside_the_encoder(heads, monkeypatch):
    monkeypatch.setattr("tlseg_bids.train.loop.set_age_scale", lambda *_: None)
    recipe = plain(
        protocol="braincolor", datasets={"parcels": PARCELS}, network={"design": {"age": 3}},
        loss=Loss(entropy=0.0, age=1.0), dice_weight=0.0,
    )  # fmt: skip
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    run.teach(run.network, [one])[0, 0].backward()
    moving = {n.split(".")[0] for n, p in run.network.named_parameters()
              if p.grad is not None and p.grad.abs().sum() > 0}  # fmt: skip
    assert moving == {"down", "age"}
    blind = run.teach(run.network, [replace(one, age=math.nan)])[0, 0]
    assert float(blind) == 0


def test_weights_of_classes_borders_and_volumes():
    target = torch.zeros(1, 3, 6, 6, 6)
    target[:, 0], target[:, 1, :3], target[:, 2, 3] = 1, 1, 1
    target[:, 0, :4] = 0
    assert borders(target)[0, :, 0, 0].tolist() == [False, False, True, True, True, False]
    logits, known, group = torch.zeros(1, 3, 6, 6, 6), torch.ones(1, 6, 6, 6), torch.arange(3)
    logits[:, 2] = 2.0
    even = segmentation_loss(logits, target, known, group, Weights(dice=0))[0]
    rare = segmentation_loss(
        logits, target, known, group, Weights(dice=0, classes=torch.tensor([1.0, 1, 50]))
    )[0]
    assert rare < even, "the class that is right counts more"
    entropy = -torch.log_softmax(torch.tensor([0.0, 0, 2]), 0)
    assert float(even) == pytest.approx(float((5 * entropy[0] + entropy[2]) / 6), rel=1e-4)
    edge = segmentation_loss(logits, target, known, group, Weights(dice=0, edges=2.0))[0]
    assert float(edge) == pytest.approx(float((9 * entropy[0] + 3 * entropy[2]) / 12), rel=1e-4)
    assert not borders(target, across=0).any(), "the neighbours are in other slices"
    assert torch.equal(borders(target, across=1), borders(target))
    only = Weights(entropy=0, volumes=torch.tensor([0.0, 1.0]))
    wrong = target.clone() * 20
    wrong[:, 0] += wrong[:, 1]
    wrong[:, 1] = 0
    assert float(segmentation_loss(wrong, target, known, group, only)[0]) < 0.05
    assert float(segmentation_loss(wrong, target, known, group, Weights(entropy=0))[0]) > 0.4


def test_a_dice_alone_learns_the_background_only_if_it_counts_all_classes():
    target = torch.zeros(1, 4, 6, 6, 6)
    target[:, 1, :3], target[:, 0, 3:] = 1, 1
    known, group = torch.ones(1, 6, 6, 6), torch.arange(4)
    absent = 20 * target.clone()
    absent[:, 3], absent[:, 0] = (
        absent[:, 0],
        0,
    )  # the background called by a class that is not there
    present, every = Weights(entropy=0), Weights(entropy=0, every=True)
    assert float(segmentation_loss(absent, target, known, group, present)[0]) < 1e-3
    assert float(segmentation_loss(absent, target, known, group, every)[0]) > 0.4
    assert float(segmentation_loss(20 * target, target, known, group, every)[0]) < 1e-3


def test_a_network_that_does_not_tell_sides_has_class_weights_of_both_sides_together(heads):
    samples = load_dataset(heads / "balls", "balls", {})
    views = Places("views", axes=[2, 0], slices=8, merged=[1])
    network = {"network": "members", "of": {"network": "quicknat", "features": [4, 4]},
               "each": [{"view": "axial"}, {"view": "sagittal"}]}  # fmt: skip
    recipe = replace(plain(loss=Loss(balance="median"), places=views), network=network)
    run = Training(recipe, heads, None)
    of = run.teach.weights
    assert {member for _, member in of} == {None, 0, 1}
    name = samples[0].taught
    both, one = of[name, 0].classes, of[name, 1].classes
    assert (of[name, 0].across, of[name, 1].across) == (2, 0)
    into, share = one_sided(name), frequencies(samples)
    joined = np.bincount(into, share, len(into))
    for weights, shares in ((both, share), (one, joined)):
        present = torch.as_tensor(shares[shares > 0])
        wanted = (present.median() / present).float()
        torch.testing.assert_close(weights[torch.as_tensor(shares > 0)], wanted)


def test_frequencies_and_the_balanced_weights(heads):
    samples = load_dataset(heads / "balls", "balls", {})
    share = frequencies(samples)
    assert share.sum() == pytest.approx(1)
    run = Training(plain(loss=Loss(balance="median", dice_by="volume")), heads, None)
    weights = run.teach.weights["aseg", None]
    present = share > 0
    half = torch.as_tensor(share[present]).median()
    assert float(weights.classes[0]) == pytest.approx(float(half / share[0]), rel=1e-4)
    assert weights.volumes.shape == (len(share) - 1,)


def test_far_from_structures_nothing_counts_with_a_rim():
    target = torch.zeros(1, 2, 9, 9, 9)
    target[:, 0] = 1
    target[:, :, 4, 4, 4] = torch.tensor([0.0, 1.0])
    found = near(target, 2)
    assert found.sum() == 125
    assert found[0, 2, 2, 2] == 1 and found[0, 1, 4, 4] == 0


def test_where_nothing_is_known_nothing_is_lost():
    logits = torch.randn(1, 3, 4, 4, 4, requires_grad=True)
    none = torch.zeros(1, 4, 4, 4)
    loss = segmentation_loss(logits, torch.zeros(1, 3, 4, 4, 4), none, torch.arange(3))[0]
    loss.backward()
    assert float(loss) == 0 and float(logits.grad.abs().sum()) == 0


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Descent, {"optimiser": "lion"}, "unknown optimiser 'lion'.*descent.*muon"),
        (Descent, {"first_stage": 1.0}, "first_stage is 1.*share of the steps"),
        (Loss, {"balance": "mean"}, "unknown balance 'mean'.*loss.*'median'"),
    ],
)
def test_tables_that_make_no_sense_are_refused(kind, values, message):
    with pytest.raises(UsageError, match=message):
        kind(**values)


def test_the_standard_scale_is_learned_from_the_scans_and_kept(heads, tmp_path):
    recipe = plain(
        protocol="braincolor", datasets={"parcels": PARCELS}, standard=True, steps=1, name="first"
    )  # fmt: skip
    path = train(recipe, heads, tmp_path, _quiet)
    landmarks = load_checkpoint(path)["standard"]
    assert len(landmarks) == 11 and landmarks[-1] == 1
    further = Training(replace(recipe, name="further", start=str(path)), heads, None)
    assert further.fixed["standard"] == landmarks
    shown = further.draw.samples["parcels"][0].images["T1w"]
    assert float(shown.min()) == 0
    plainly = Training(replace(recipe, standard=False), heads, None)
    assert plainly.fixed["standard"] == []
    assert not torch.equal(plainly.draw.samples["parcels"][0].images["T1w"], shown)


def _quiet(*_: object, **__: object) -> None:
    pass

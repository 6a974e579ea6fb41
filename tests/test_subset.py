"""Which scans and slices a recipe learns from: label budgets, folded protocols, two channels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import PARCELS, PROTOCOL, tiny_recipe, write_heads, write_parcels

from tlseg_bids.errors import UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import IGNORE, Sample
from tlseg_bids.train.draw import folded, mirror_sample
from tlseg_bids.train.loop import Training, train
from tlseg_bids.train.recipe import Recipe, load_checkpoint
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.train.subset import subset, within_budget
from tlseg_bids.train.supply import load_samples
from tlseg_bids.train.synth.mix import Mix


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    return write_parcels(write_heads(tmp_path_factory.mktemp("data")))


def cube(name: str = "sub-01") -> Sample:
    """Labels everywhere in the middle of 24³ voxels."""
    classes = torch.zeros(24, 24, 24, dtype=torch.uint8)
    classes[2:22, 2:22, 2:22] = 5
    return Sample(name, "made-up", classes, {}, np.eye(4), np.arange(len(PROTOCOL)), "a", PROTOCOL)


def labelled(sample: Sample, axis: int) -> list[int]:
    """Slices along an axis of which something is known."""
    known = sample.classes != IGNORE
    return torch.nonzero(known.any(dim=tuple(a for a in range(3) if a != axis)))[:, 0].tolist()


def flat(**changes) -> Recipe:
    network = {"network": "unet", "features": [4, 8], **changes.pop("network", {})}
    return replace(tiny_recipe(), network=network, warmup=0, **changes)


@pytest.mark.parametrize(("axis", "number"), [("sagittal", 0), ("coronal", 1), ("axial", 2)])
def test_a_budget_keeps_a_share_of_the_slices_of_its_axis(axis, number):
    found = within_budget(cube(), axis, 0.3)
    slices = labelled(found, number)
    assert len(slices) == 6 and min(slices) >= 3 and max(slices) < 21
    kept = torch.zeros(24, dtype=torch.bool)
    kept[slices] = True
    whole = (found.classes != IGNORE).movedim(number, 0)
    assert bool(whole[kept].all()) and not bool(whole[~kept].any())
    again = within_budget(cube(), axis, 0.3)
    assert torch.equal(again.classes, found.classes)
    assert labelled(within_budget(cube("sub-02"), axis, 0.3), number) != slices


def test_a_random_budget_has_every_axis():
    found = [within_budget(cube(f"sub-{n:02}"), "random", 0.3) for n in range(12)]
    axes = {min(range(3), key=lambda a, s=sample: len(labelled(s, a))) for sample in found}
    assert axes == {0, 1, 2}


def test_the_mask_goes_through_mirrors_and_beyond_the_map(heads):
    sample = within_budget(cube(), "axial", 0.3)
    twin = mirror_sample(sample)
    assert torch.equal(twin.classes == IGNORE, sample.classes == IGNORE)
    run = Training(
        flat(datasets={"balls": {"budget": {"axis": "axial", "share": 0.2}}}), heads, None
    )
    shares = [float(run.draw(run.rng).known.mean()) for _ in range(6)]
    assert 0 < np.mean(shares) < 0.35


def test_labels_of_hidden_slices_have_no_influence_at_all(heads):
    recipe = flat(datasets={"balls": {"budget": {"axis": "coronal", "share": 0.4}}})
    whole = load_dataset(heads / "balls", "balls", {})

    def gradients(sample: Sample) -> list[torch.Tensor]:
        torch.manual_seed(0)
        run = Training(recipe, heads, None)
        for pool in run.draw.samples.values():
            for one in pool:
                flipped = one.template_from_voxel[0, 0] < 0
                one.classes = (mirror_sample(sample) if flipped else sample).classes
        run.learn([run.draw(run.rng)])
        return [p.grad for p in run.network.parameters()]

    hidden = within_budget(whole[0], "coronal", 0.4)
    other = replace(whole[0], classes=torch.where(whole[0].classes > 0, 7, 0).to(torch.uint8))
    other.classes[hidden.classes != IGNORE] = whole[0].classes[hidden.classes != IGNORE]
    assert not torch.equal(other.classes, whole[0].classes)
    other = within_budget(other, "coronal", 0.4)
    a, b = gradients(hidden), gradients(other)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    logits = torch.zeros_like(one.target, requires_grad=True)
    run.teach(lambda *_: logits, [one])[0, 0].backward()
    unknown = (one.known == 0)[:, None].expand_as(logits)
    assert unknown.any()
    assert float(logits.grad[unknown].abs().max()) == 0
    assert float(logits.grad[~unknown].abs().max()) > 0


def test_the_first_scans_alone(heads):
    recipe = flat(datasets={"balls": {"first": 1}})
    assert [s.name for s in load_samples(recipe, heads)["balls"]] == ["sub-00"]


def test_labels_are_learned_in_a_coarser_protocol(heads, tmp_path):
    recipe = flat(
        protocol="subcortical", datasets={"balls": {"head": "subcortical"}}, steps=1,
        network={"prior_channels": 15},
    )  # fmt: skip
    run = Training(recipe, heads, None)
    one = run.draw(run.rng)
    assert one.target.shape[1] == 15 == len(load_protocol("subcortical"))
    torch.testing.assert_close(one.target.sum(1), one.known)
    saved = load_checkpoint(train(recipe, heads, tmp_path, lambda *_, **__: None))
    prior = saved["priors"]["subcortical"]
    torch.testing.assert_close(prior.sum(0), torch.ones(prior.shape[1:]), atol=1e-4, rtol=0)


def test_merged_labels_stay_merged_when_they_are_folded():
    matrix = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.float32)
    matrix = np.c_[matrix, np.zeros(3)]
    found, group = folded(torch.tensor([0, 1, 3, 4, IGNORE]), np.array([0, 1, 2, 1, 4]), matrix)
    assert found.tolist() == [0, 1, 1, IGNORE, IGNORE], "the last has no counterpart"
    assert group.tolist() == [0, 1, 1]


def test_voxels_of_a_structure_that_is_merged_in_part_are_taught_as_merged():
    """Two of three sources make one structure, and one of them is not told from background."""
    matrix = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.float32)
    found, group = folded(torch.tensor([0, 2, 3]), np.array([0, 0, 2, 2]), matrix)
    assert group.tolist() == [0, 0, 0]
    assert found.tolist() == [0, 0, 0], "no voxel is asked for a channel that answers nothing"


def test_merges_that_share_a_structure_are_one_when_they_are_folded():
    """Of a structure's two sources each is merged with another one: none of the three is told."""
    matrix = np.eye(5, dtype=np.float32)[[0, 1, 3, 4]]
    matrix[1, 2] = 1
    found, group = folded(torch.arange(5), np.array([0, 3, 4, 3, 4]), matrix)
    assert group.tolist() == [0, 1, 1, 1]
    assert found.tolist() == [0, 1, 1, 1, 1]


def test_what_is_merged_into_a_merged_structure_goes_with_it(heads):
    """Whatever their order: 5 is not told from 4, nor 4 from the background."""
    channel = {int(index): number for number, index in enumerate(PROTOCOL.indices)}
    for pairs in ([[5, 4], [4, 0]], [[4, 0], [5, 4]]):
        group = load_dataset(heads / "balls", "balls", {"merge": pairs})[0].group
        assert group[channel[5]] == group[channel[4]] == 0
        assert group[channel[24]] == channel[24]


def test_two_images_are_shown_as_two_channels(heads):
    rules = {**PARCELS, "images": ["T1w"]}
    recipe = flat(
        protocol="braincolor", channels=["T1w", "T2w"], datasets={"parcels": rules},
        network={"image_channels": 2},
    )  # fmt: skip
    shown = replace(recipe, datasets={"parcels": {**rules, "real": 0.5}})
    with pytest.raises(UsageError, match="image T2w is missing.*parcels.*sub-01.*or set real = 0"):
        Training(shown, heads, None)
    samples = load_dataset(heads / "parcels", "parcels", rules)
    samples[0].images["T2w"] = 1 / (0.1 + samples[0].images["T1w"])
    chosen = subset(samples, {"real": 1.0}, ["T1w", "T2w"])
    run = Training(replace(recipe, channels=[], centred=1.0), heads, None)
    run.draw.samples["parcels"] = chosen
    image = run.draw(run.rng).image
    assert image.shape == (1, 2, 16, 16, 16)
    assert not torch.equal(image[:, 0], image[:, 1])


def test_several_channels_are_painted_from_one_label_map(heads):
    """Each with a contrast of its own weighting, both with the same shape."""
    recipe = flat(
        channels=["T2w", "T1w"], network={"image_channels": 2},
        mix=replace(tiny_recipe().mix, t1w=0.6, t2w=0.4, noise=0.1, motion=0.0),
        centred=1.0, datasets={"balls": {}},
    )  # fmt: skip
    run = Training(recipe, heads, None)
    signs = []
    for _ in range(6):
        one = run.draw(run.rng)
        assert one.image.shape == (1, 2, 16, 16, 16)
        inside = one.target[0, 1:].sum(0) > 0.5
        bright, dark = (channel[inside].float() for channel in one.image[0])
        signs.append(float(torch.corrcoef(torch.stack([bright, dark]))[0, 1]))
    assert np.median(signs) < 0.5, "T1w and T2w of a brain are no copies of each other"


def test_the_contrasts_of_a_channel_are_its_own():
    mix = Mix(t1w=0.3, t2w=0.2, infant_t1w=0.1, infant_t2w=0.3)
    for_t2w = mix.weighted("T2w")
    assert (for_t2w.t1w, for_t2w.infant_t1w) == (0, 0)
    assert (for_t2w.t2w, for_t2w.infant_t2w) == pytest.approx((0.5, 0.4))
    assert mix.weighted("T1w").t1w == 0.5
    assert mix.weighted("FLAIR") is mix is mix.weighted("")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"axis": "oblique"}, "unknown axis 'oblique'.*made-up.*sagittal, coronal, axial, random"),
        ({"share": 0}, "the share 0 is not above 0.*made-up"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(budget, message):
    with pytest.raises(UsageError, match=message):
        within_budget(cube(), **budget)

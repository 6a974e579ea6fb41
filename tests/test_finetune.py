"""Fine-tuning: what may change does and nothing else, and the child fits where its parent did."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.test_adapt import NETWORK, PROTOCOL, affine, classes_of, head, paint, tiny_maps
from tlseg_bids.errors import OutputError
from tlseg_bids.networks import build
from tlseg_bids.segment.model import load_model
from tlseg_bids.train.adaptation import SCOPES, Adaptation
from tlseg_bids.train.dataset import Sample
from tlseg_bids.train.finetune import (
    SITE,
    FineTuning,
    Parent,
    blended,
    grown,
    reset_head,
    schedule,
)
from tlseg_bids.train.finetune_run import load_checkpoint, run, save_checkpoint
from tlseg_bids.train.rehearsal import refined, rehearsal_samples
from tlseg_bids.train.scope import trainable
from tlseg_bids.zoo.registry import load_cards
from tlseg_bids.zoo.weights import load_weights


@pytest.fixture
def parent() -> Parent:
    torch.manual_seed(0)
    network = build(**{**NETWORK, "features": [4, 8, 8, 8]}, out_channels=[len(PROTOCOL)])
    prior = torch.full((len(PROTOCOL), 8, 8, 8), 1 / len(PROTOCOL))
    return Parent(network, ("aseg",), [prior], [[-40.0, 40.0]] * 3, 2.0, torch.float32)


def site() -> Sample:
    image = torch.from_numpy(paint(head(0), 0))
    return Sample("one", SITE, classes_of(head(0)), {"T1w": image}, affine(),
                  np.arange(len(PROTOCOL)), "a", PROTOCOL, affine())  # fmt: skip


def tuning(parent: Parent, steps: int = 4, **how) -> FineTuning:
    recipe = Adaptation("test", "for a test", **{"rehearsal": 0.5, "learning_rate": 1e-2, **how})
    return FineTuning(recipe, parent, [site()], tiny_maps(np.zeros(0)), steps, seed=1)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_scope_changes_what_it_names_and_nothing_else(parent, scope):
    one = tuning(parent, scope=scope)
    while one.step < one.steps:
        one.learn()
    child, before = one.finish(), parent.network.state_dict()
    assert list(child) == list(before)
    changed = {key for key in child if not torch.equal(child[key], before[key])}
    if scope == "adapters":
        assert changed
        assert all(key.startswith(("down", "up", "edges")) for key in changed)
        assert all("conv" in key or key.startswith("edges") for key in changed)
        return
    free = set(trainable(parent.network, "all" if scope == "two-stage" else scope))
    assert changed <= free
    assert len(changed) > len(free) / 2


def test_scopes_grow_from_the_bottleneck(parent):
    sizes = [len(trainable(parent.network, s)) for s in ("shallow", "medium", "deep", "all")]
    assert sizes == sorted(set(sizes))
    for scope in ("shallow", "medium", "deep"):
        names = trainable(parent.network, scope)
        assert not any(name.startswith(("down.0", "heads", "details")) for name in names)


def test_the_scopes_are_those_of_the_paper_on_its_network():
    deep = build("unet", out_channels=3, features=[2] * 6)
    blocks = {
        scope: {tuple(name.split(".")[:2]) for name in trainable(deep, scope)}
        for scope in ("shallow", "medium", "deep")
    }
    numbers = {"shallow": 1, "medium": 2, "deep": 4}
    for scope, found in blocks.items():
        down = {("down", str(i)) for i in range(5 - numbers[scope], 6)}
        assert found == down | {("up", str(i)) for i in range(numbers[scope])}
    assert trainable(deep, "none") == {}
    assert not any("conv" in name for name in trainable(deep, "frozen-convolutions"))
    assert {"down.0.norm1.weight", "heads.0.bias"} <= set(trainable(deep, "frozen-convolutions"))
    assert set(trainable(deep, "dense")) == {"heads.0.weight", "heads.0.bias"}


@pytest.mark.parametrize(
    ("arguments", "among"),
    [
        ({"network": "unet", "features": [4, 8],
          "design": {"shortcut": "input", "down": "stride"}}, "down.1.match.1.weight"),
        ({"network": "quicknat", "features": [4, 4]}, "bottom.1.bias"),
        ({"network": "patches", "widths": [2, 2, 3], "dense": [4, 5, 6]}, "paths.0.norms.0.weight"),
    ],
)  # fmt: skip
def test_every_norm_of_every_network_may_change_where_norms_may(arguments, among):
    network = build(**arguments, out_channels=[3])
    norms = {
        f"{name}.{part}" for name, module in network.named_modules()
        if "Norm" in type(module).__name__ for part in ("weight", "bias")
    }  # fmt: skip
    assert among in norms
    assert set(trainable(network, "norm")) == norms


def test_the_pull_holds_the_weights_near_the_parents(parent):
    def moved(pull: float) -> float:
        one = tuning(parent, steps=8, pull=pull, learning_rate=5e-3)
        while one.step < one.steps:
            one.learn()
        before = parent.network.state_dict()
        return sum(float((v - before[k]).square().sum()) for k, v in one.finish().items())

    assert moved(100.0) < moved(0.0)


def test_distillation_adds_to_the_loss_where_labels_say_nothing(parent):
    one = tuning(parent, distillation=1.0)
    example = replace(one.draw(one.rng), source="rehearsal")
    logits = one.network(example.image, example.prior, example.head, example.parts)
    assert float(one._kept(example, logits).detach()) > 0
    shown = replace(example, source=SITE)
    assert float(one._kept(shown, logits).detach()) == 0
    group = torch.zeros(len(PROTOCOL), dtype=torch.long)
    group[3] = 3
    assert float(one._kept(replace(shown, group=group), logits).detach()) > 0


@pytest.mark.parametrize(
    ("source", "weights", "asked"),
    [
        (SITE, {"division": 0.0, "distillation": 1.0}, False),
        (SITE, {"division": 1.0, "distillation": 0.0}, True),
        ("rehearsal", {"division": 1.0, "distillation": 0.0}, False),
        ("rehearsal", {"division": 0.0, "distillation": 1.0}, True),
    ],
)
def test_the_parent_is_asked_for_what_has_a_weight(parent, monkeypatch, source, weights, asked):
    one = tuning(parent, **weights)
    told = []
    monkeypatch.setattr(one, "_kept", lambda *_: told.append(1) or torch.zeros(()))
    draw = one.draw
    monkeypatch.setattr(one, "draw", lambda rng: replace(draw(rng), source=source))
    one.learn()
    assert bool(told) is asked


def test_a_new_head_starts_from_the_structures_that_its_own_are_in():
    torch.manual_seed(1)
    arguments = {"network": "unet", "features": [4, 8], "stem": 2, "detail": 4}
    parent = build(**arguments, out_channels=[3]).eval()
    child = build(**arguments, out_channels=[4, 3]).eval()
    with torch.no_grad():
        grown(child, parent, torch.tensor([0, 1, 1, 2]))
        image = torch.randn(1, 1, 16, 16, 16)
        old, new = parent(image).softmax(1), child(image).softmax(1)
        torch.testing.assert_close(child(image, head=1).softmax(1), old)
    torch.testing.assert_close(new[:, [0, 3]], old[:, [0, 2]])
    torch.testing.assert_close(new[:, 1:3].sum(1), old[:, 1])


def test_an_atlas_of_the_new_head_changes_nothing_of_the_old_one():
    torch.manual_seed(1)
    arguments = {"network": "unet", "features": [4, 8], "stem": 2}
    parent = build(**arguments, out_channels=[3], prior_channels=3).eval()
    child = build(**arguments, out_channels=[4, 3], prior_channels=7).eval()
    image, prior = torch.randn(1, 1, 16, 16, 16), torch.rand(1, 3, 8, 8, 8)
    own = torch.tensor([0.9, 0.05, 0.03, 0.02]).view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 8)
    with torch.no_grad():
        grown(child, parent, torch.tensor([0, 1, 1, 2]))
        both = torch.cat([own, prior], 1)
        old = parent(image, prior).softmax(1)
        torch.testing.assert_close(child(image, both, head=1).softmax(1), old)
        new = child(image, both).softmax(1)
    assert bool((new[:, 1] > new[:, 2]).all()), "of two with one source the atlas prefers the first"


def test_a_reset_head_has_forgotten(parent):
    before = {k: v.clone() for k, v in parent.network.state_dict().items()}
    reset_head(parent.network)
    changed = {k for k, v in parent.network.state_dict().items() if not torch.equal(v, before[k])}
    assert {key.split(".")[0] for key in changed} <= {"heads", "details"}
    assert changed


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({"network": "unet", "features": [4, 8, 8], "design": {"supervised": 1}},
         {"heads.0", "deeper.0.0"}),
        ({"network": "members", "of": {"network": "unet", "features": [4, 8]}, "each": [{}, {}]},
         {"members.0.heads.0", "members.1.heads.0"}),
    ],
)  # fmt: skip
def test_the_first_head_is_reset_in_every_member_and_level(arguments, wanted):
    network = build(**arguments, out_channels=[3, 5])
    before = {k: v.clone() for k, v in network.state_dict().items()}
    reset_head(network)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert {key.rpartition(".")[0] for key in changed} == wanted


def test_half_way_lies_between(parent):
    one = tuning(parent)
    one.learn()
    child, before = one.finish(), parent.network.state_dict()
    half = blended(parent.network, child, 0.5)
    for key, value in half.items():
        torch.testing.assert_close(value, (before[key] + child[key]) / 2)


def test_a_run_that_is_too_slow_ends_early_and_is_kept(parent, tmp_path):
    one = tuning(parent, steps=50)
    run(one, tmp_path / "a.pt", lambda *_: None, limit_s=0.0001)
    assert one.step == 1
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 1
    other = tuning(parent, steps=51)
    assert not other.resume(load_checkpoint(tmp_path / "a.pt"))


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_resumed_run_ends_where_an_uncut_one_does(parent, tmp_path, optimiser):
    whole, cut = (tuning(parent, optimiser=optimiser) for _ in range(2))
    while whole.step < whole.steps:
        whole.learn()
    cut.learn()
    torch.save(cut.content(), tmp_path / "a.pt")
    again = tuning(parent, optimiser=optimiser)
    assert again.resume(load_checkpoint(tmp_path / "a.pt"))
    while again.step < again.steps:
        again.learn()
    for key, value in whole.finish().items():
        torch.testing.assert_close(again.finish()[key], value, rtol=0, atol=0, msg=key)


def test_dropout_of_a_resumed_adaptation_is_that_of_an_uncut_one(tmp_path):
    how = {"network": "quicknat", "features": [4, 4], "kernel": 3, "dropout": 0.5}
    network = build(**how, out_channels=[len(PROTOCOL)])
    parent = Parent(network, ("aseg",), [], [[-16.0, 16.0]] * 3, 2.0, torch.float32)
    whole, cut = (tuning(parent, steps=3) for _ in range(2))
    for one in (whole, whole, whole, cut):
        one.learn()
    torch.save(cut.content(), tmp_path / "a.pt")
    again = tuning(parent, steps=3)
    torch.rand(7)  # what else the program draws before it goes on
    assert again.resume(load_checkpoint(tmp_path / "a.pt"))
    again.learn()
    again.learn()
    for key, value in whole.finish().items():
        assert torch.equal(again.finish()[key], value), key


def test_a_run_that_is_too_slow_takes_its_least_steps(parent, tmp_path):
    one = tuning(parent, steps=5)
    run(one, tmp_path / "a.pt", lambda *_: None, limit_s=0.0001, least_steps=3)
    assert one.step == 3
    run(one, tmp_path / "a.pt", lambda *_: None, limit_s=0.0001, least_steps=9)
    assert one.step == 5


def test_a_damaged_checkpoint_is_begun_anew(parent, tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"damaged")
    assert load_checkpoint(path) is None
    one = tuning(parent, steps=2)
    run(one, path, lambda *_: None)
    assert one.step == 2


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="the checkpoint cannot be written"):
        save_checkpoint({"step": 1}, tmp_path / "file" / "a.pt")


def test_the_rate_warms_up_and_falls():
    rates = [schedule(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1)
    assert rates[-1] < 0.03
    assert schedule(0, 5, 100) == 1


def test_refined_maps_have_the_same_structures_and_smooth_borders():
    coarse = np.zeros((12, 12, 12), np.uint8)
    coarse[3:9, 3:9, 3:9] = 2
    coarse[5:7, 5:7, 5:7] = 7
    fine = refined(coarse)
    assert fine.shape == (24, 24, 24)
    assert set(np.unique(fine)) == {0, 2, 7}
    assert fine[11, 11, 11] == 7 and fine[8, 8, 8] == 2
    assert fine[6, 6, 6] == 0, "a corner is rounded off"


@pytest.mark.slow
def test_the_maps_that_come_with_the_program_are_whole_heads_in_the_template():
    card = next(card for card in load_cards() if card.name == "any")
    model = load_model(card, load_weights(card))
    samples = rehearsal_samples(model.template)
    assert len(samples) == 6
    for sample in samples:
        index = torch.nonzero(sample.classes > 0).double().mean(0).numpy()
        centre = sample.template_from_voxel[:3, :3] @ index + sample.template_from_voxel[:3, 3]
        assert np.abs(centre[0]) < 10
        assert len(np.unique(sample.classes)) > 40

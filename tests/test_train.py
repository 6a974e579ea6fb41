"""The training loop on two tiny label maps: it learns, resumes to the step and exports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from heads import PARCELS, PROTOCOL, tiny_recipe, write_heads, write_parcels

from tlseg_bids.errors import DataError, NoInputError, UsageError
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import COLUMNS, LabelProtocol, load_protocol
from tlseg_bids.networks import build
from tlseg_bids.preprocess.register import affine, centroids, robust_affine, similarity
from tlseg_bids.segment.model import load_model
from tlseg_bids.train import losses
from tlseg_bids.train.dataset import IGNORE, align, build_template, label_centroids, load_classes
from tlseg_bids.train.draw import atlas, prior_patch
from tlseg_bids.train.export import export
from tlseg_bids.train.loop import Training, checkpoint, train
from tlseg_bids.train.losses import fold, segmentation_loss, soft_target
from tlseg_bids.train.recipe import Recipe, load_checkpoint, load_recipe
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.train.start import adopt, load_start
from tlseg_bids.train.supply import load_samples
from tlseg_bids.train.synth import Mix, Random, Shape, class_means, paint, strip_skull
from tlseg_bids.train.watch import Watch
from tlseg_bids.zoo.weights import load_weights


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    """A folder with one dataset of two label maps."""
    return write_heads(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe() -> Recipe:
    """A segmenter small enough for a test."""
    return tiny_recipe()


def test_a_run_that_was_cut_off_ends_where_an_uncut_one_does(heads, recipe, tmp_path):
    whole = load_checkpoint(train(recipe, heads, tmp_path / "whole", _quiet))
    first = load_checkpoint(train(recipe, heads, tmp_path / "cut", _quiet, until=3))
    again = load_checkpoint(train(recipe, heads, tmp_path / "cut", _quiet))
    assert first["step"] == 3
    assert again["step"] == whole["step"] == 6
    assert set(again["data"]) == {"balls/sub-00", "balls/sub-01"}
    assert torch.equal(again["generator"], whole["generator"])
    for part in ("network", "average"):
        for key, value in whole[part].items():
            torch.testing.assert_close(again[part][key], value)


def test_dropout_of_a_resumed_run_is_that_of_an_uncut_one(heads, recipe, tmp_path):
    network = {"network": "quicknat", "features": [4, 4], "dropout": 0.2}
    dropping = replace(recipe, network=network)
    whole = load_checkpoint(train(dropping, heads, tmp_path / "whole", _quiet))
    train(dropping, heads, tmp_path / "cut", _quiet, until=3)
    again = load_checkpoint(train(dropping, heads, tmp_path / "cut", _quiet))
    for key, value in whole["network"].items():
        assert torch.equal(again["network"][key], value), key


def test_a_run_whose_loss_is_no_number_stops_and_keeps_its_checkpoint(heads, recipe, tmp_path):
    path = train(recipe, heads, tmp_path, _quiet, until=3)
    before = path.read_bytes()

    class Broken(Watch):
        def step(self, run: Training) -> None:
            run.losses.append(torch.tensor([torch.nan, 0.5]))

    with pytest.raises(
        DataError, match=r"no number any more, at step 6.*'tiny'.*--start a run of anoth"
    ):
        train(recipe, heads, tmp_path, Broken(_quiet))
    assert path.read_bytes() == before


def test_weights_that_are_no_numbers_are_not_written(heads, recipe, tmp_path):
    """The gradient of the last step before a checkpoint is none, and the loss was one."""
    path = train(recipe, heads, tmp_path, _quiet, until=1)
    run = Training(recipe, heads, load_checkpoint(path))
    for parameter in run.network.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.nan)
    run.learn([run.draw(run.rng)])
    before = path.read_bytes()
    with pytest.raises(DataError, match="the loss or its gradient is no number any more, at step"):
        checkpoint(run, path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_refused(heads, recipe, tmp_path):
    path = tmp_path / "tiny.pt"
    torch.save({"network": {}}, tmp_path / "other.pt")
    whole = (tmp_path / "other.pt").read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"no checkpoint of tlseg-train.*tiny\.pt.*start anew"):
            train(recipe, heads, tmp_path, _quiet)


def test_the_same_seed_gives_the_same_weights(heads, recipe, tmp_path):
    runs = [load_checkpoint(train(recipe, heads, tmp_path / n, _quiet)) for n in ("a", "b")]
    for key, value in runs[0]["network"].items():
        torch.testing.assert_close(value, runs[1]["network"][key])
    other = load_checkpoint(train(replace(recipe, seed=1), heads, tmp_path / "c", _quiet))
    assert not torch.equal(runs[0]["generator"], other["generator"])


def test_the_held_out_fold_is_not_seen(heads, recipe, tmp_path):
    folded = replace(recipe, fold=[0, 2], fold_datasets=["balls"], steps=1)
    saved = load_checkpoint(train(folded, heads, tmp_path, _quiet))
    assert set(saved["data"]) == {"balls/sub-01"}


@pytest.mark.parametrize(
    ("fold", "named", "words"),
    [
        ([0, 2], ["malc"], r"0/2 leaves out no subject.*datasets malc, .* learns from balls"),
        ([0, 2], [], r"0/2 leaves out no subject.*datasets none, .*name datasets .*fold_datasets"),
        ([5, 6], ["balls"], r"5/6 leaves out no subject.*more subjects than K"),
        ([0, 1], ["balls"], r"0/1 leaves out every subject of dataset 'balls'.*larger N"),
    ],
)
def test_a_fold_that_holds_nobody_out_is_refused(heads, recipe, fold, named, words):
    with pytest.raises(UsageError, match=words):
        load_samples(replace(recipe, fold=fold, fold_datasets=named), heads)


def test_an_exported_model_answers_as_its_checkpoint(heads, recipe, tmp_path):
    segmenter = train(recipe, heads, tmp_path, _quiet)
    locating = replace(
        recipe, name="tiny-locator", role="locator",
        network={"network": "unet", "features": [4, 8], "stem": 2},
    )  # fmt: skip
    locator = train(locating, heads, tmp_path, _quiet)
    description = {
        "name": "tiny", "version": "0", "status": "experimental", "summary": "balls",
        "domain": {}, "strategy": {"name": "sliding", "window": 16}, "citations": ["none"],
    }  # fmt: skip
    card = export(
        description, {"locator": locator, "segmenter": segmenter}, heads, tmp_path / "zoo"
    )
    assert card.weights.licence == "CC0-1.0"
    assert set(card.training["data"][0]["subjects"]) == {"sub-00", "sub-01"}
    written = replace(card, path=tmp_path / "zoo" / "tiny.toml")
    model = load_model(written, load_weights(written))
    saved = load_checkpoint(segmenter)
    for key, value in saved["average"].items():
        found = model.networks["segmenter"].state_dict()[key]
        torch.testing.assert_close(found, value, atol=2e-3, rtol=4e-3)
    for role, rounded in (("segmenter", True), ("locator", False)):
        kernels = [one for one in model.networks[role].parameters() if one.dim() == 5]
        assert all(torch.equal(one, one.bfloat16().float()) for one in kernels) == rounded
    apart = model.template - saved["template"]
    assert np.nanmax(np.abs(apart)) < 1e-3
    assert np.isnan(model.template[PROTOCOL.channels(abbreviation="CSF")]).all()

    further = replace(recipe, name="further", start=str(written.path), steps=1, learning_rate=0.0)
    again = load_checkpoint(train(further, heads, tmp_path, _quiet))
    assert again["lineage"][0]["recipe"] == "tiny 0"
    assert again["lineage"][0]["data"] == saved["data"]
    for key, value in saved["average"].items():
        torch.testing.assert_close(again["network"][key], value, atol=2e-3, rtol=4e-3)
    with pytest.raises(DataError, match="no network 'judge'.*tiny.toml.*locator"):
        load_start(written.path, "judge")


def test_centroids_of_all_labels_are_those_of_each_label():
    labels = np.random.default_rng(0).integers(0, 5, (6, 7, 8))
    labels[labels == 3] = 1
    frame = np.array([[0, 1.5, 0, 4], [2, 0.1, 0, -3], [0, 0, -1, 9], [0, 0, 0, 1]])
    points, mass = label_centroids(labels, 5, frame)
    maps = np.stack([(labels == n).astype(np.uint8) for n in range(5)])
    wanted = centroids(maps, frame)
    np.testing.assert_array_equal(points, wanted[0])
    np.testing.assert_array_equal(mass, wanted[1])
    assert np.isnan(points[3]).all() and mass[3] == 0


def test_soft_target_is_the_share_of_each_block():
    channels = torch.zeros(4, 4, 4, dtype=torch.uint8)
    channels[:2] = 3
    channels[0, 0, 0] = IGNORE
    target, known = soft_target(channels, 5, 2)
    assert target[0, 3, 0, 0, 0] == pytest.approx(7 / 8)
    assert known[0, 0, 0, 0] == pytest.approx(7 / 8)
    assert target[0, 0, 1, 1, 1] == 1
    assert known[0, 1, 1, 1] == 1


def test_partial_labels_do_not_tell_merged_structures_apart():
    group = torch.tensor([0, 1, 1])
    probabilities = torch.tensor([0.2, 0.5, 0.3])[None, :, None, None, None]
    assert fold(probabilities, group)[0, :, 0, 0, 0].tolist() == pytest.approx([0.2, 0.8, 0])
    target = torch.tensor([0.0, 1, 0])[None, :, None, None, None].expand(1, 3, 4, 4, 4)
    known = torch.ones(1, 4, 4, 4)
    one = torch.tensor([0.0, 20, 0])[None, :, None, None, None].expand(1, 3, 4, 4, 4)
    other = torch.tensor([0.0, 0, 20])[None, :, None, None, None].expand(1, 3, 4, 4, 4)
    for logits in (one, other):
        assert segmentation_loss(logits, target, known, group)[0] < 1e-3


def test_unknown_voxels_do_not_count():
    target, known = torch.zeros(1, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    target[:, 1, 0], known[:, 0] = 1, 1
    right = torch.zeros(1, 2, 2, 2, 2)
    right[:, 1, 0] = 20
    wrong_where_unknown = right.clone()
    wrong_where_unknown[:, 1, 1] = 20
    group = torch.arange(2)
    a = segmentation_loss(right, target, known, group)[0]
    b = segmentation_loss(wrong_where_unknown, target, known, group)[0]
    torch.testing.assert_close(a, b)


def test_left_and_right_have_one_contrast():
    classes = load_classes(PROTOCOL)
    means, _ = class_means(Random(3), classes, Mix())
    left = int(np.flatnonzero(classes.index == 17)[0])
    right = classes.mirror[left]
    assert classes.index[right] == 53
    assert means[left] == means[right]


def test_t1w_and_t2w_look_as_they_should():
    classes = load_classes(PROTOCOL)
    white, fluid = (int(np.flatnonzero(classes.index == i)[0]) for i in (2, 4))
    for share, brighter, darker in (("t1w", white, fluid), ("t2w", fluid, white)):
        mix = Mix(**{"t1w": 0, "t2w": 0, "infant_t1w": 0, "infant_t2w": 0, share: 1.0})
        draws = [class_means(Random(s), classes, mix)[0] for s in range(20)]
        assert np.mean([float(d[brighter] > d[darker]) for d in draws]) > 0.95


def test_a_painted_scan_can_lose_its_skull():
    classes = load_classes(PROTOCOL)
    numbers = torch.zeros(12, 12, 12, dtype=torch.uint8)
    numbers[2:10] = int(np.flatnonzero(classes.extra)[0])
    numbers[5:7, 5:7, 5:7] = int(np.flatnonzero(classes.index == 2)[0])
    kept = strip_skull(Random(0), classes, numbers)
    assert kept[5:7, 5:7, 5:7].all()
    assert not kept[0].any()
    assert torch.isfinite(paint(Random(0), classes, numbers, Mix(gadolinium=1.0))).all()


def test_the_similarity_never_mirrors():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(12, 3)) * 30
    mirrored = points * [-1, 1, 1]
    assert np.linalg.det(similarity(points, mirrored, np.ones(12))[:3, :3]) > 0


def test_the_affine_is_found_despite_an_outlier():
    rng = np.random.default_rng(2)
    points = rng.normal(size=(20, 3)) * 30
    truth = np.eye(4)
    truth[:3, :3] = np.diag([1.1, 0.9, 1.0]) @ similarity(points, points[::-1], np.ones(20))[:3, :3]
    truth[:3, :3] /= np.cbrt(np.linalg.det(truth[:3, :3]))
    truth[:3, 3] = [10, -5, 3]
    target = points @ truth[:3, :3].T + truth[:3, 3]
    exact = affine(points, target, np.ones(20), ridge=0)
    np.testing.assert_allclose(exact, truth, atol=1e-9)
    target[0] += 80
    robust, _ = robust_affine(points, target, np.ones(20))
    plain = affine(points, target, np.ones(20))
    apart = [np.abs(points[1:] @ (m - truth)[:3, :3].T + (m - truth)[:3, 3]).max()
             for m in (robust, plain)]  # fmt: skip
    assert apart[0] < 1.5 < apart[1]


def test_a_recipe_that_is_not_there_or_not_right_says_so(tmp_path):
    with pytest.raises(NoInputError, match=r"no such recipe.*nothing.toml.*name a TOML file"):
        load_recipe(tmp_path / "nothing.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(UsageError, match=r"not valid TOML.*broken.toml.*mend"):
        load_recipe(broken)
    broken.write_text("nmae = 'x'")
    with pytest.raises(UsageError, match=r"unknown keys .*nmae.*docstring"):
        load_recipe(broken)
    broken.write_text("name = 'x'")
    with pytest.raises(UsageError, match=r"keys do not fit.*missing.*docstring"):
        load_recipe(broken)
    with pytest.raises(NoInputError, match=r"no such checkpoint.*gone.pt.*name the .pt"):
        load_checkpoint(tmp_path / "gone.pt")


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ("[datasets.lab]\nlables = 'x'", r"unknown keys \['lables'\] of dataset 'lab'.*labels"),
        ("[datasets.lab]\nimage = ['T1w']", r"unknown keys \['image'\] of dataset 'lab'.*images"),
        ("[datasets]", r"names no dataset.*add a table \[datasets.NAME\]"),
        ("datasets.lab = 'x'", r"dataset 'lab' is 'x' and no table.*write \[datasets.lab\]"),
    ],
)
def test_a_rule_of_a_dataset_that_nobody_reads_is_refused(tmp_path, datasets, words):
    (tmp_path / "lab.toml").write_text(datasets)
    with pytest.raises(UsageError, match=words):
        load_recipe(tmp_path / "lab.toml")


def test_where_no_labels_are_the_hint_names_what_there_is(heads, recipe):
    with pytest.raises(NoInputError, match=r"no \*_dseg.*nowhere.*check --data.*dataset's name"):
        load_samples(replace(recipe, datasets={"nowhere": {}}), heads)


RECIPES = Path(__file__).parents[1] / "tlseg_bids" / "train" / "recipes"


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.toml")))
def test_the_recipes_that_ship_can_be_read(name):
    recipe = load_recipe(RECIPES / f"{name}.toml")
    assert recipe.name == name
    assert isinstance(recipe.shape, Shape)


@pytest.fixture
def fine(recipe) -> Recipe:
    """The same with a sub-voxel answer and a second head, whose labels are the template's."""
    network = {**recipe.network, "prior_channels": 143 + 33, "detail": 4}
    return replace(
        recipe, name="fine", protocol="braincolor", more_heads=["aseg"], network=network,
        prior_mm={"braincolor": 8.0}, datasets={"balls": {"weight": 1.0}, "parcels": PARCELS},
    )  # fmt: skip


@pytest.fixture(scope="module")
def parcels(heads) -> Path:
    """A second dataset beside the balls: one scan with BrainCOLOR labels and its image."""
    return write_parcels(heads)


def test_two_protocols_learn_on_one_encoder(parcels, recipe, fine, tmp_path):
    first = train(recipe, parcels, tmp_path, _quiet)
    child = replace(fine, start=str(first), steps=8)
    saved = load_checkpoint(train(child, parcels, tmp_path, _quiet))
    assert set(saved["data"]) == {"balls/sub-00", "balls/sub-01", "parcels/sub-01"}
    assert saved["priors"]["braincolor"].shape == (143, 12, 12, 12)
    assert saved["priors"]["aseg"].shape == (33, 24, 24, 24)
    start = load_checkpoint(first)
    for key in ("heads.0.weight", "heads.1.weight", "details.0.weight", "details.1.weight"):
        assert saved["network"][key].shape[0] in (143, 33, 8 * 143, 8 * 33)
    assert not torch.equal(saved["network"]["heads.1.weight"], start["average"]["heads.0.weight"])


def test_a_network_of_two_images_starts_as_its_parent_of_the_first(parcels, recipe, tmp_path):
    start = load_start(train(recipe, parcels, tmp_path, _quiet), "segmenter")
    network = {**recipe.network, "image_channels": 2}
    two = replace(recipe, network=network, channels=["T2w", "T1w"])
    child = build(**network, out_channels=two.head_sizes)
    adopt(child, two, start)
    parent = build(**recipe.network, out_channels=recipe.head_sizes)
    parent.load_state_dict(start["average"])
    first, other = torch.rand(2, 1, 1, 16, 16, 16)
    prior = torch.rand(1, 33, 8, 8, 8)
    with torch.no_grad():
        both = child(torch.cat([first, other], 1), prior)
        torch.testing.assert_close(both, parent(first, prior), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(both, parent(other, prior), atol=1e-2)
    child(torch.cat([first, other], 1), prior).square().sum().backward()
    weight = next(w for w in child.down[0].parameters() if w.dim() == 5)
    assert weight.grad[:, 8:16].abs().max() > 0, "the second image can be learned from"


def test_a_wider_network_starts_as_the_narrow_one_answers(parcels, recipe, fine, tmp_path):
    start = load_start(train(recipe, parcels, tmp_path, _quiet), "segmenter")
    narrow = build(**recipe.network, out_channels=recipe.head_sizes)
    narrow.load_state_dict(start["average"])
    features = [n + 4 * (i + 1) for i, n in enumerate(recipe.network["features"])]
    network = {**fine.network, "features": features}
    wide = build(**network, out_channels=fine.head_sizes)
    adopt(wide, replace(fine, network=network), start)
    image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    even = torch.full((1, 33, 16, 16, 16), 1 / 33)
    prior = torch.cat([torch.full((1, 143, 16, 16, 16), 1 / 143), even], 1)
    with torch.no_grad():
        old = narrow(image, even).softmax(1)
        new = wide(image, prior, head=1, parts=()).softmax(1)
    torch.testing.assert_close(new, old, atol=1e-5, rtol=1e-4)
    wide(image, prior, head=1, parts=()).square().sum().backward()
    read = wide.heads[1].weight.grad[:, recipe.network["features"][0] :]
    assert (read.abs().sum((0, 2, 3, 4)) > 0).all(), "what is new can be learned from"


def test_a_network_that_is_not_wider_everywhere_is_refused(parcels, recipe, tmp_path):
    start = load_start(train(recipe, parcels, tmp_path, _quiet), "segmenter")
    first, *more = recipe.network["features"]
    other = replace(recipe, network={**recipe.network, "features": [first + 4, *more[:-1], 4]})
    child = build(**other.network, out_channels=other.head_sizes)
    with pytest.raises(DataError, match="give the recipe the network of its start"):
        adopt(child, other, start)


def test_a_new_head_starts_from_the_structures_that_its_own_are_part_of(
    parcels, recipe, fine, tmp_path
):
    first = train(recipe, parcels, tmp_path, _quiet)
    start = load_start(first, "segmenter")
    network = build(**fine.network, out_channels=fine.head_sizes)
    adopt(network, fine, start)
    own = load_protocol("braincolor")
    row = load_mapping("braincolor_to_aseg").channel_matrix().argmax(0)
    part = int(own.channels(name="Left hippocampus")[0])
    given = start["average"]["heads.0.weight"]
    assert torch.equal(network.heads[0].weight[part], given[row[part]])
    assert torch.equal(network.heads[1].weight, given)
    parts = np.flatnonzero(row == row[int(own.channels(name="Left insula")[0])])
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    body = build(**recipe.network, out_channels=33)
    body.load_state_dict(start["average"])
    even = torch.full((1, 33, 8, 8, 8), 1 / 33)
    prior = torch.cat([torch.full((1, 143, 8, 8, 8), 1 / 143), even], 1)
    with torch.no_grad():
        old = body(image, even).softmax(1)[:, row[parts[0]]]
        new = network(image, prior, head=0, parts=()).softmax(1)
        same = network(image, prior, head=1, parts=()).softmax(1)
    torch.testing.assert_close(same, body(image, even).softmax(1), atol=1e-5, rtol=1e-4)
    assert len(parts) > 40
    share = new[:, parts]
    torch.testing.assert_close(share.amax(1), share.amin(1), atol=1e-5, rtol=1e-3)
    assert torch.corrcoef(torch.stack([share.sum(1).flatten(), old.flatten()]))[0, 1] > 0.95


def test_a_start_of_another_body_is_refused(heads, recipe, tmp_path):
    first = train(recipe, heads, tmp_path, _quiet)
    features = [n // 2 for n in recipe.network["features"]]
    narrow = replace(recipe, network={**recipe.network, "features": features}, start=str(first))
    with pytest.raises(DataError, match=r"has the shape .* in the start.*network of its start"):
        train(narrow, heads, tmp_path / "narrow", _quiet)


def test_a_protocol_of_too_many_structures_is_refused():
    rows = [(n, f"S{n}", f"S{n}", "#000000", "none", n, "other", 0) for n in range(300)]
    table = pd.DataFrame(rows, columns=COLUMNS)
    with pytest.raises(DataError, match=r"300 structures.*254.*'many'.*merge"):
        load_classes(LabelProtocol("many", table))


def _quiet(*words: object, **how: object) -> None:
    pass


def plain_loss(logits, target, known, group, weights):
    """`segmentation_loss` in one piece, with the gradient that autograd finds."""
    p = fold(logits.float().softmax(1), group)
    told = target * weights.classes[None, :, None, None, None]
    entropy = -(told * p.clamp_min(1e-6).log()).sum() / told.sum()
    inside = p[:, 1:] * known[:, None]
    t = target[:, 1:]
    overlap = 2 * (inside * t).sum((0, 2, 3, 4)) + 1
    size = (inside**2 + t**2).sum((0, 2, 3, 4)) + 1
    present = t.sum((0, 2, 3, 4)) > 4
    share = weights.volumes[present]
    dice = (overlap / size)[present]
    found, true = (x.sum((0, 2, 3, 4))[present] for x in (inside, t))
    gap = (found - true) / (found + true)
    amount = ((gap**2 + losses.GAP_FLOOR**2).sqrt() - losses.GAP_FLOOR).mean()
    return (
        weights.entropy * entropy
        + weights.dice * (1 - dice @ share / share.sum())
        + weights.amount * amount,
        dice.mean(),
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_own_gradient_are_those_of_the_plain_formula(monkeypatch, merged, dtype):
    monkeypatch.setattr(losses, "CACHED_VALUES", 5 * 2 * 100)  # blocks of 100 voxels, one short
    torch.manual_seed(0)
    group = torch.tensor([0, 1, 1, 3, 0] if merged else range(5))
    labels = group[torch.randint(0, 5, (7, 6, 5))]
    labels[labels == 3] = 0  # one is nowhere
    known = (torch.rand(2, 7, 6, 5) > 0.3).float()
    target = torch.nn.functional.one_hot(labels, 5).permute(3, 0, 1, 2)[None] * known[:, None]
    weights = losses.Weights(
        1.5, 0.7, classes=torch.rand(5) + 0.1, volumes=torch.rand(4) + 0.1, amount=0.9
    )
    logits = (8 * torch.randn(2, 5, 7, 6, 5)).to(dtype)
    logits = logits.to(memory_format=torch.channels_last_3d)
    found = []
    for of in (segmentation_loss, plain_loss):
        x = logits.clone().requires_grad_()
        loss, dice = of(x, target, known, group, weights)
        (3 * loss).backward()
        assert not dice.requires_grad or of is plain_loss
        found.append((loss.detach(), dice.detach(), x.grad))
    torch.testing.assert_close(found[0], found[1])
    unknown = (known == 0)[:, None].expand_as(logits)
    assert not found[0][2][unknown].any()


def test_an_atlas_is_read_as_by_linear_interpolation():
    torch.manual_seed(0)
    prior, box = torch.rand(3, 5, 4, 6), [[-40.0, 10.0], [-16.0, 24.0], [0.0, 60.0]]
    corner, sides, spacing = np.array([-50.0, -3.0, 20.0]), (9, 4, 20), 2.5
    axes = [
        2 * (corner[a] + spacing * torch.arange(sides[a]) - box[a][0]) / (box[a][1] - box[a][0]) - 1
        for a in range(3)
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None].float()
    wanted = torch.nn.functional.grid_sample(
        prior[None], grid, padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(prior_patch(prior, box, corner, sides, spacing), wanted)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("spacing_mm", [4.0, 7.0, 8.0])
def test_an_atlas_lies_where_its_structures_do_whatever_the_box(heads, spacing_mm, mirror):
    """A box that no number of such voxels fills, and whose middle is not that of the head."""
    box = [[-80.0, 72.0], [-100.0, 90.0], [-76.0, 80.0]]
    samples = load_dataset(heads / "balls", "balls", {})
    template = build_template(samples, PROTOCOL)
    align(samples, template)
    found = atlas(samples, box, spacing_mm, mirror)
    corner = np.array([-79.0, -99.0, -75.0])
    whole = prior_patch(found, box, corner, (76, 95, 78), 2.0)
    for label in (10, 17, 49, 53):
        row = int(np.flatnonzero(PROTOCOL.indices == label)[0])
        share = whole[0, row].double().numpy()
        index = np.stack(np.nonzero(share), 1)
        centre = np.average(index, 0, share[share > 0]) * 2.0 + corner
        assert np.abs(centre - template[row]).max() < 1.5, (label, centre)

"""A small network that says how far off the locator's frame is, so that the segmenter need not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cards import small_card
from heads import tiny_recipe, write_heads

from tests import toy
from tests.datasets import made_up_job
from tests.phantom import Phantom, grid_over, rotation
from tlseg_bids import placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.cli.train import main
from tlseg_bids.errors import DataError, ScanError
from tlseg_bids.flow import Job, Prediction
from tlseg_bids.networks import build
from tlseg_bids.preprocess.register import (
    QUARTER_TURNS,
    TURNS,
    centroids,
    displacement_mm,
)
from tlseg_bids.report.methods import methods_text
from tlseg_bids.segment.model import Model, load_model, logits_of
from tlseg_bids.segment.place import locate, survey
from tlseg_bids.train.export import export
from tlseg_bids.train.loop import train
from tlseg_bids.volume import Volume, load_scan
from tlseg_bids.zoo.assemble import assemble
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.weights import load_weights

SETTLER = {"network": "unet", "features": [4, 8], "stem": 2, "prior_channels": 33}
SAID = {
    "name": "tiny", "version": "0", "status": "experimental", "summary": "balls", "domain": {},
    "strategy": {"name": "sliding", "window": 16}, "citations": ["none"],
}  # fmt: skip


def settling(folder: Path) -> Model:
    """The toy model with its locator as a settler, too."""
    card = toy.write_toy_model(folder)
    tensors = load_weights(card)
    copies = {
        key.replace("locator.", "settler."): value
        for key, value in tensors.items()
        if key.startswith("locator.")
    }
    own = {**card.networks, "settler": card.networks["locator"]}
    options = {
        **card.preprocess,
        "rounds": 5,
        "settled_mm": 1.5,
        "settler": {"spacing_mm": toy.SPACING_MM, "sure_dice": 0.3, "near_mm": 30.0},
    }
    return load_model(replace(card, networks=own, preprocess=options), {**tensors, **copies})


def seen(path: Path, card: ModelCard) -> tuple[Volume, Job]:
    scan = Scan(path, path.parent, {"sub": "01"}, "T1w", skull_stripped=True)
    return load_scan(path)[0], replace(made_up_job(scan), card=card)


def test_a_frame_that_is_off_is_brought_back_without_the_segmenter(tmp_path, monkeypatch):
    fine = grid_over(Phantom(), (2, 2, 2))
    points, mass = centroids(Phantom().probabilities(fine, sub=1).astype(np.float32), fine.affine)
    points[mass == 0], points[0] = np.nan, np.nan
    model = replace(settling(tmp_path), template=points)
    scan = Scan(tmp_path / "sub-01_T1w.nii", tmp_path, {"sub": "01"}, "T1w", skull_stripped=True)
    volume, job = Phantom().image(fine, sub=1), replace(made_up_job(scan), card=model.card)
    off = np.eye(4)
    off[:3, :3] = 0.9 * rotation(12, -9, 8)
    off[:3, 3] = 14.0, -11.0, 9.0
    seen_in = []

    def perfect(_, prepared):
        seen_in.append(prepared.template_from_native)
        return Prediction(Phantom().probabilities(prepared.grid, sub=2), prepared.grid)

    monkeypatch.setattr(placing, "survey", perfect)
    frame, _ = placing.surveyed(volume, job, model, off)
    assert displacement_mm(np.eye(4), off, points) > 15
    assert displacement_mm(np.eye(4), frame, points) < 1.5
    assert len(seen_in) > 1

    def never(*_):
        raise AssertionError("the segmenter was asked")

    monkeypatch.setattr(placing, "segment", never)
    prepared, dice = placing.settle(volume, job, model, [off])
    assert dice == 1.0
    np.testing.assert_array_equal(prepared.template_from_native, frame)
    assert prepared.grid.shape == (toy.SIDE,) * 3, "in the voxels of the segmenter"


@pytest.mark.parametrize(
    ("dice", "distances", "from_start"),
    [(0.29, [1.0], 3.0), (0.7, [9.0] * 5, 3.0), (0.7, [9.0, 1.0], 40.0)],
    ids=["unsure", "never at rest", "far off"],
)
def test_where_the_settler_does_not_know_the_segmenter_looks(
    dice, distances, from_start, tmp_path, monkeypatch
):
    model = settling(tmp_path)
    volume, job = seen(toy.write_scan(tmp_path / "sub-01_T1w.nii"), model.card)
    moved, asked, usual = iter(distances), [], placing.segment
    better = placing.better_frame
    with monkeypatch.context() as patched:
        patched.setattr(placing, "expected_dice", lambda _: dice)
        patched.setattr(placing, "displacement_mm", lambda *_: from_start)
        patched.setattr(placing, "better_frame", lambda *given: (better(*given)[0], next(moved)))
        assert placing.surveyed(volume, job, model, np.eye(4)) == (None, dice)
    monkeypatch.setattr(placing, "surveyed", lambda *_: (None, dice))
    monkeypatch.setattr(placing, "segment", lambda *given: asked.append(given) or usual(*given))
    placing.settle(volume, job, model, [np.eye(4)])
    assert asked


@pytest.mark.parametrize(("sure_of", "looked"), [(0, 1), (1, 2), (None, 2)])
def test_the_locator_looks_again_only_where_the_settler_does_not_rest(
    sure_of, looked, tmp_path, monkeypatch
):
    model = settling(tmp_path)
    volume, job = seen(toy.write_scan(tmp_path / "sub-01_T1w.nii"), model.card)
    starts = [np.diag([scale, scale, scale, 1.0]) for scale in (1.0, 1.1)]
    rest, taken, segmented, usual = np.diag([1.2, 1.2, 1.2, 1.0]), [], [], placing.segment

    def looks():
        for start in starts:
            taken.append(start)
            yield start

    def surveyed(_scan, _job, _model, frame):
        return rest if sure_of is not None and frame is starts[sure_of] else None, 0.5

    def segment(model, prepared, ask):
        segmented.append(prepared.template_from_native)
        return usual(model, prepared, ask)

    monkeypatch.setattr(placing, "surveyed", surveyed)
    monkeypatch.setattr(placing, "segment", segment)
    prepared, _ = placing.settle(volume, job, model, looks())
    assert len(taken) == looked
    if sure_of is None:
        np.testing.assert_array_equal(segmented[0], starts[1])
    else:
        assert not segmented
        np.testing.assert_array_equal(prepared.template_from_native, rest)


class Directions:
    """`placing` with a settler that is sure in one direction, and expects some Dice in others.

    `shown` and `asked` are the numbers of the directions that settler and segmenter have seen; in
    the third the locator finds nothing. The segmenter expects what `coarse` says, else 0.4.
    """

    EVERY = (*TURNS, *QUARTER_TURNS)

    def __init__(self, folder: Path, monkeypatch, sure_in=None, dices=(), coarse=()) -> None:
        self.model = settling(folder)
        self.volume, self.job = seen(toy.write_scan(folder / "sub-01_T1w.nii"), self.model.card)
        self.shown, self.asked = [], []
        self.sure_in, self.dices, self.coarse = sure_in, dict(dices), dict(coarse)
        for name in ("looks", "surveyed", "coarsely"):
            monkeypatch.setattr(placing, name, getattr(self, name))

    def number(self, frame: np.ndarray) -> int:
        return next(n for n, one in enumerate(self.EVERY) if one is frame)

    def looks(self, _scan, _options, _look, _template, turn, _crew):
        if turn is self.EVERY[2]:
            raise ScanError("no brain found", "", "")
        yield turn

    def surveyed(self, _scan, _job, _model, frame):
        self.shown.append(self.number(frame))
        dice = self.dices.get(self.shown[-1], 0.3)
        return frame if self.shown[-1] == self.sure_in else None, dice

    def coarsely(self, _scan, _job, model, frame, *_, **__):
        self.asked.append(self.number(frame))
        prepared = placing.prepare(self.volume, model.card.preprocess, frame)
        return prepared, self.coarse.get(self.asked[-1], 0.4)

    def find(self):
        return placing.find(self.volume, self.job, self.model)


@pytest.mark.parametrize("sure_in", [0, 3, 9])
def test_the_settler_is_shown_more_directions_before_the_segmenter_is_asked(
    sure_in, tmp_path, monkeypatch
):
    """Half and quarter turns; one in which the locator finds nothing is passed over."""
    there = Directions(tmp_path, monkeypatch, sure_in)
    prepared = there.find()
    assert there.shown == [n for n in range(sure_in + 1) if n != 2]
    assert not there.asked
    np.testing.assert_array_equal(prepared.template_from_native, there.EVERY[sure_in])
    degrees = {0: None, 3: "180°", 9: "90°"}[sure_in]
    told = " ".join(prepared.warnings)
    assert f"the head is turned by {degrees} from upright" in told if degrees else not told


@pytest.mark.parametrize(
    ("dices", "coarse", "asked", "taken"),
    [
        ({}, {0: 0.8}, [0], 0),
        ({7: 0.6, 3: 0.5}, {7: 0.8}, [7], 7),
        ({7: 0.6, 3: 0.5, 4: 0.4, 9: 0.4}, {3: 0.65}, [7, 3, 4, 0], 3),
        ({7: 0.6, 0: 0.5}, {7: 0.55}, [7, 0, 1, 3], 0),
    ],
)
def test_the_segmenter_is_asked_where_the_settler_saw_most_of_a_brain(
    dices, coarse, asked, taken, tmp_path, monkeypatch
):
    """And in the header's direction, which is followed where nothing looks like a brain."""
    there = Directions(tmp_path, monkeypatch, None, dices, coarse)
    prepared = there.find()
    assert len(there.shown) == 9
    assert there.asked == asked
    np.testing.assert_array_equal(prepared.template_from_native, there.EVERY[taken])
    unclear = "in no direction" in " ".join(prepared.warnings)
    assert unclear == (max(coarse.values()) < 0.6)


def test_quarter_turns_are_turns():
    for turn in QUARTER_TURNS:
        assert np.linalg.det(turn) == 1
        np.testing.assert_array_equal(np.linalg.matrix_power(turn, 4), np.eye(4))
        assert not np.array_equal(np.linalg.matrix_power(turn, 2), np.eye(4))
    assert len({turn.tobytes() for turn in QUARTER_TURNS + TURNS}) == 10


def test_the_settler_sees_the_whole_box_and_its_atlas(tmp_path):
    model = settling(tmp_path)
    volume, _ = seen(toy.write_scan(tmp_path / "sub-01_T1w.nii"), model.card)
    prepared = placing.prepare(volume, model.card.preprocess, np.eye(4))
    torch.manual_seed(0)
    network = build("unet", out_channels=33, features=[4, 8], stem=2, prior_channels=33)
    network.prior_weight.data.fill_(2.0)
    model.networks["settler"] = network
    image = prepared.image[None]
    atlas = F.interpolate(model.priors["aseg"], [12] * 3, mode="trilinear")
    for _ in range(2):  # what it makes of the atlas is found for the first
        answer = survey(model, prepared)
        assert answer.grid == prepared.grid.coarser(2, (12, 12, 12))
        with torch.inference_mode():
            expected = network(image, atlas).softmax(1)[0].numpy()
        np.testing.assert_allclose(answer.probabilities, expected, atol=1e-5)
    with torch.inference_mode():
        assert not np.allclose(network(image).softmax(1)[0], expected, atol=1e-3)


def test_a_model_without_a_settler_asks_its_segmenter(tmp_path):
    card = toy.write_toy_model(tmp_path)
    volume, job = seen(toy.write_scan(tmp_path / "sub-01_T1w.nii"), card)
    model = load_model(card, load_weights(card))
    assert placing.surveyed(volume, job, model, np.eye(4)) == (None, 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """Datasets, and a checkpoint for each role."""
    heads = write_heads(tmp_path_factory.mktemp("data"))
    folder, found = tmp_path_factory.mktemp("runs"), {}
    recipe = tiny_recipe()
    for role, network in (
        ("locator", {"network": "unet", "features": [4, 8], "stem": 2}), ("settler", SETTLER),
        ("segmenter", recipe.network),
    ):  # fmt: skip
        own = replace(recipe, name=role, role=role, network=network)
        found[role] = train(own, heads, folder, lambda *_, **__: None)
    return heads, found


def test_export_with_a_settler(runs, tmp_path):
    heads, checkpoints = runs
    card = export(SAID, checkpoints, heads, tmp_path)
    assert set(card.networks) == {"locator", "settler", "segmenter"}
    spacing_mm = tiny_recipe().spacing_mm
    assert card.preprocess["settler"] == {"spacing_mm": spacing_mm}
    assert card.training["settler"]["settings"]["role"] == "settler"
    tensors = load_weights(read_card(tmp_path / "tiny.toml"))
    assert "proof.settler.0" in tensors
    assert set(assemble(card, tensors)) == set(card.networks)


def test_a_settler_needs_a_locator(runs, tmp_path):
    heads, checkpoints = runs
    alone = {role: path for role, path in checkpoints.items() if role != "locator"}
    placed = {**SAID, "preprocess": {"placed_by": "any"}}
    with pytest.raises(DataError, match=r"a settler corrects what a locator found.*leave the set"):
        export(placed, alone, heads, tmp_path)


def test_a_network_of_a_model_is_kept(runs, tmp_path, capsys):
    heads, checkpoints = runs
    plain = {role: path for role, path in checkpoints.items() if role != "settler"}
    before = export(SAID, plain, heads, tmp_path / "before")
    (tmp_path / "said.toml").write_text(
        'name = "tiny"\nversion = "1"\nstatus = "experimental"\nsummary = "balls"\n'
        'citations = ["none"]\n[domain]\n[strategy]\nname = "sliding"\nwindow = 16\n'
    )
    path = str(tmp_path / "before" / "tiny.toml")
    words = ["export", str(tmp_path / "said.toml"), "--locator", path, "--segmenter", path,
             "--out", str(tmp_path / "after")]  # fmt: skip
    assert main([*words, "--settler", str(checkpoints["settler"])]) == 0
    after = read_card(tmp_path / "after" / "tiny.toml")
    assert after.version == "1" and after.heads == before.heads
    assert after.training["segmenter"]["taken_from"] == "tiny 0"
    old, new = load_weights(read_card(Path(path))), load_weights(after)
    kept = [key for key in old if not key.startswith("proof.")]
    assert all((old[key].nan_to_num() == new[key].nan_to_num()).all() for key in kept)

    bare = {**before.training, "segmenter": {"seed": 0, "steps": 1, "seconds": 1}}
    write_card(replace(before, training=bare, path=None), Path(path))
    capsys.readouterr()
    assert main(words) == DataError.exit_code
    told = capsys.readouterr().err
    assert "does not hold the settings of its segmenter's run" in told
    assert "name the checkpoint" in told


@pytest.mark.parametrize(
    ("settler", "told"),
    [
        (2.0, r"2.0 is not a table – .*\[preprocess\], settler"),
        ({"sure_dice": 2}, r"2 is not a number from 0 to 1 – .*settler, sure_dice"),
        ({"spacing_mm": 0}, r"0 is not a number from 0.1 to 50 – .*settler, spacing_mm"),
    ],
)
def test_wrong_settings_are_refused(settler, told, tmp_path):
    with pytest.raises(DataError, match=told):
        write_card(small_card(preprocess={"settler": settler}), tmp_path / "small.toml")


def test_a_settler_that_cannot_see_the_box_is_refused(tmp_path):
    card = toy.write_toy_model(tmp_path)
    network = {"network": "unet", "features": [2, 4], "stem": 2}
    wrong = replace(
        card, networks={**card.networks, "settler": network},
        preprocess={**card.preprocess, "settler": {"spacing_mm": 16.0}},
    )  # fmt: skip
    state = build(**network, out_channels=33).state_dict()
    tensors = {**load_weights(card), **{f"settler.{key}": one for key, one in state.items()}}
    with pytest.raises(DataError, match=r"the settler is shown \[9, 9, 9\] .* multiples of 4"):
        assemble(wrong, tensors)
    hungry = {**network, "prior_channels": 5}
    greedy = replace(wrong, networks={**wrong.networks, "settler": hungry})
    state = build(**hungry, out_channels=33).state_dict()
    own = {**load_weights(card), **{f"settler.{key}": one for key, one in state.items()}}
    with pytest.raises(DataError, match=r"settler takes an atlas of 5 channels.* 'aseg' has 33"):
        assemble(greedy, own)
    slices = {"network": "quicknat"}
    flat = replace(wrong, networks={**wrong.networks, "settler": slices})
    state = build(**slices, out_channels=33).state_dict()
    own = {**load_weights(card), **{f"settler.{key}": one for key, one in state.items()}}
    with pytest.raises(DataError, match=r"settler is of the kind 'quicknat' .* only be a 'unet'"):
        assemble(flat, own)
    lacking = replace(wrong, preprocess=card.preprocess)
    with pytest.raises(DataError, match=r"missing: .*settler.spacing_mm.*\[preprocess\]"):
        assemble(lacking, tensors)


def test_the_methods_text_tells_of_it(tmp_path):
    model = settling(tmp_path)
    assert "corrected" in methods_text([model.card], "1")
    assert "corrected" not in methods_text([toy.write_toy_model(tmp_path / "plain")], "1")


def test_the_brain_is_found_in_float32_whatever_the_segmenter_computes_in(tmp_path):
    model = settling(tmp_path)
    low = replace(model, precision=torch.bfloat16)
    volume, _ = seen(toy.write_scan(tmp_path / "sub-01_T1w.nii"), model.card)
    prepared = placing.prepare(volume, model.card.preprocess, np.eye(4))
    answers = [survey(one, prepared).probabilities for one in (model, low)]
    np.testing.assert_array_equal(*answers)
    places = [locate(one)(prepared.image[0]) for one in (model, low)]
    np.testing.assert_array_equal(*places)
    heard = []
    for role, network in low.networks.items():
        network.register_forward_pre_hook(
            lambda *_, role=role: heard.append((role, torch.is_autocast_enabled("cpu")))
        )
    for role in ("locator", "settler", "segmenter"):
        logits_of(low, role, prepared.image[None], None)
    assert heard == [("locator", False), ("settler", False), ("segmenter", True)]

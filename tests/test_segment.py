"""Finding the brain, preparing the image and running a model, on an analytic head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.cards import small_card
from tests.datasets import made_up_job
from tests.phantom import PROTOCOL, Phantom, grid_over, orientations, rotation
from tlseg_bids import placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.errors import DataError, ScanError
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.labels.landmarks import Landmarks
from tlseg_bids.metrics import dice
from tlseg_bids.networks import build
from tlseg_bids.postprocess import to_native
from tlseg_bids.postprocess.plausibility import turned_degrees
from tlseg_bids.postprocess.quality import expected_dice, implausible
from tlseg_bids.preprocess import prepare as prepare_module
from tlseg_bids.preprocess.geometry import interpolated
from tlseg_bids.preprocess.intensity import standardise
from tlseg_bids.preprocess.prepare import better_frame, looks, prepare
from tlseg_bids.preprocess.register import TURNS, centroids
from tlseg_bids.segment.answer import Ask, _answer, _mirrored, segment
from tlseg_bids.segment.fine import Quarters, Side, both_sides, open_voxels, shares
from tlseg_bids.segment.model import Models, load_model
from tlseg_bids.segment.place import locate
from tlseg_bids.segment.walk import sliding
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.calibration import Calibration

CARD = small_card(
    networks={
        "segmenter": {"network": "unet", "features": [2, 4], "stem": 2, "prior_channels": 33},
        "locator": {"network": "unet", "features": [2, 4], "stem": 2},
    },
    strategy={"name": "sliding", "window": 16},
)


def tensors(card=CARD) -> dict[str, torch.Tensor]:
    """Random weights, an even prior and a template at the origin."""
    torch.manual_seed(0)
    found = {"template": torch.zeros(33, 3), "prior.aseg": torch.full((33, 8, 8, 8), 8).byte()}
    for role, arguments in card.networks.items():
        state = build(**arguments, out_channels=33).state_dict()
        found |= {f"{role}.{key}": value for key, value in state.items()}
    return found


def test_weights_of_another_network_are_refused():
    wrong = tensors()
    wrong["segmenter.heads.0.weight"] = torch.zeros(3, 2, 1, 1, 1)
    with pytest.raises(DataError, match="head 0 of the segmenter has 3 channels.*small.*again"):
        load_model(CARD, wrong)


def test_a_locator_needs_a_template():
    without = {k: v for k, v in tensors().items() if k != "template"}
    with pytest.raises(DataError, match="no template for the locator.*small.*again"):
        load_model(CARD, without)


def test_a_model_that_cannot_find_a_brain_says_so():
    blind = replace(CARD, networks={"segmenter": CARD.networks["segmenter"]})
    with pytest.raises(DataError, match="no locator.*small.*--model"):
        locate(load_model(blind, tensors(blind)))


def test_a_volume_without_structures_is_no_brain():
    image = Volume(np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32),
                   Grid((20, 20, 20), np.diag([9.0, 9, 9, 1])))  # fmt: skip
    background = np.zeros((33, 8, 8, 8), np.float32)
    background[0] = 1
    options = {"locator": {"size": 16, "spacing_mm": 12.0, "looks": 2}}
    with pytest.raises(ScanError, match="no brain found .0 structures.*orientation"):
        list(looks(image, options, lambda _: background, Landmarks(np.zeros((33, 3)))))


class PerfectLocator:
    """Answers with the phantom itself at the voxels that `prepare` shows it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.grids: list[Grid] = []
        monkeypatch.setattr(prepare_module, "interpolated", self._interpolated)

    def _interpolated(self, volume: Volume, grid: Grid, crew: Crew) -> torch.Tensor:
        self.grids.append(grid)
        return interpolated(volume, grid, crew=crew)

    def __call__(self, image: torch.Tensor) -> np.ndarray:
        assert tuple(image.shape) == self.grids[-1].shape
        return Phantom().probabilities(self.grids[-1], sub=1).astype(np.float32)


def template_of(turn: np.ndarray) -> np.ndarray:
    """Centroids of the phantom's structures, turned and shrunk: the frame of a made-up template."""
    grid = grid_over(Phantom(), (2, 2, 2))
    points, mass = centroids(Phantom().probabilities(grid, sub=1).astype(np.float32), grid.affine)
    points[mass == 0] = np.nan
    points[0] = np.nan
    return 0.9 * points @ turn.T + [3, -8, 5]


@pytest.mark.parametrize("number", range(48))
def test_labels_come_back_to_where_they_were(number, monkeypatch):
    axes = rotation(7, -12, 9) @ orientations()[number]
    native = grid_over(Phantom(), (1.5, 3.0, 2.2), axes, offset=(40, -25, 12))
    scan = Phantom().image(native)
    look = PerfectLocator(monkeypatch)
    turn = rotation(-9, 5, 14)
    options = {
        "locator": {"size": 60, "spacing_mm": 4.0, "looks": 2}, "spacing_mm": 2.0,
        "box_mm": [[-90, 90], [-100, 92], [-92, 84]],
    }  # fmt: skip
    *_, frame = looks(scan, options, look, Landmarks(template_of(turn)))
    prepared = prepare(scan, options, frame)
    np.testing.assert_allclose(prepared.template_from_native[:3, :3], 0.9 * turn, atol=0.02)
    seen = Phantom().image(prepared.grid).data
    assert np.corrcoef(seen.ravel(), prepared.image[0].ravel())[0, 1] > 0.95
    answer = Prediction(Phantom().probabilities(prepared.grid, sub=1), prepared.grid)
    assert better_frame(answer, frame, Landmarks(template_of(turn)))[1] < 0.5
    found = to_native(answer, scan, PROTOCOL).labels
    truth = Phantom().labels(native)
    assert found.grid == native
    for label in np.unique(truth.data)[1:]:
        assert dice(found.data == label, truth.data == label) > 0.9, label
    for left, right in PROTOCOL.pairs():
        overlap = np.count_nonzero((found.data == left) & (truth.data == right))
        assert overlap == 0, (left, right)


@pytest.mark.parametrize(
    ("size", "followed"), [(0.7, True), (2.5, True), (0.3, False), (4.0, False)]
)
def test_a_frame_that_fits_no_head_is_not_followed(size, followed, monkeypatch):
    """Labels that lie apart as in no head would have the scan read in voxels of any size."""
    grid = grid_over(Phantom(), (4, 4, 4))
    answer = Prediction(Phantom().probabilities(grid, sub=1).astype(np.float32), grid)
    template = Landmarks(size * template_of(np.eye(3)) / 0.9)
    frame, distance_mm = better_frame(answer, np.eye(4), template)
    assert (distance_mm > 1) == followed
    np.testing.assert_allclose(frame[:3, :3], (size if followed else 1) * np.eye(3), atol=0.01)
    options = {"locator": {"size": 60, "spacing_mm": 4.0, "looks": 1}}
    found = looks(Phantom().image(grid), options, PerfectLocator(monkeypatch), template)
    if followed:
        assert len(list(found)) == 1
    else:
        with pytest.raises(ScanError, match="as in no head.*voxel size are right"):
            list(found)


DETAILED = replace(
    CARD,
    networks={
        **CARD.networks,
        "segmenter": {
            "network": "unet", "features": [2, 4], "stem": 2, "prior_channels": 33, "detail": 3,
        },
    },
)  # fmt: skip


@pytest.mark.parametrize("card", [CARD, DETAILED], ids=["coarse", "fine"])
def test_the_mirror_is_undone(card, monkeypatch):
    monkeypatch.setattr("tlseg_bids.segment.fine.SETTLED", 2.0)
    certain = tensors(card)
    certain["segmenter.heads.0.weight"] *= 100
    model = load_model(card, certain)
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)

    def run(data: np.ndarray) -> np.ndarray:
        prepared = Prepared(torch.from_numpy(data.copy()), scan.grid, scan, np.eye(4), True, ())
        window = prepared.image[None]
        prior = model.priors["aseg"]
        straight = _answer(model, Ask(), window, prior)[0].float().numpy()
        turned = _mirrored(model, Ask(), window, prior)[0].float().numpy()
        assert np.abs(turned - straight).max() > 0.3
        found = np.asarray(segment(model, prepared, Ask(mirror=True)).probabilities, np.float32)
        wanted = (turned + straight) / 2
        if card is DETAILED:  # the logits are averaged there
            wanted = np.sqrt(turned * straight)
            wanted /= wanted.sum(0)
        np.testing.assert_allclose(found, wanted, atol=2e-2)
        return found

    straight, turned = run(image), run(image[:, ::-1])
    np.testing.assert_allclose(turned[:, ::-1][PROTOCOL.mirror], straight, atol=2e-2)


HALVES = {"name": "sliding", "window": [20, 16, 24], "halves": True, "trim": [0, 4, 0]}


@pytest.mark.parametrize("fine", [True, False], ids=["fine", "coarse"])
def test_a_half_is_seen_as_it_is_and_the_other_in_the_mirror(fine, monkeypatch):
    monkeypatch.setattr("tlseg_bids.segment.fine.SETTLED", 2.0)
    certain = tensors(DETAILED)
    certain["segmenter.heads.0.weight"] *= 100
    certain["prior.aseg"] = torch.full((33, 8, 6, 6), 8).byte()
    model = load_model(replace(DETAILED, strategy=HALVES), certain)
    model = replace(model, precision=torch.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    image = np.random.default_rng(0).normal(size=(1, 32, 24, 24)).astype(np.float32)
    factor = 1 if fine else 2

    def run(data: np.ndarray) -> np.ndarray:
        prepared = Prepared(torch.from_numpy(data.copy()), scan.grid, scan, np.eye(4), True, ())
        return np.asarray(segment(model, prepared, Ask(fine=fine)).probabilities, np.float32)

    def window(data: np.ndarray) -> np.ndarray:
        half = torch.from_numpy(data[None, :, :20, 4:20].copy())
        prior = torch.full((1, 33, 10, 8, 12), 1 / 33)
        return _answer(model, Ask(fine=fine), half, prior)[0].float().numpy()

    found = run(image)
    assert found.shape == (33, 32 // factor, 24 // factor, 24 // factor)
    inside = found[:, :, 4 // factor : 20 // factor]
    # 12 of 32 planes are seen by one side alone; the fine answer looks one coarse voxel further
    alone = 10 // factor
    straight, turned = window(image), window(image[:, ::-1])[:, ::-1][PROTOCOL.mirror]
    np.testing.assert_allclose(inside[:, :alone], straight[:, :alone], atol=2e-3)
    np.testing.assert_allclose(inside[:, -alone:], turned[:, -alone:], atol=2e-3)
    assert np.abs(straight[:, -4:] - turned[:, 8 // factor : 8 // factor + 4]).max() > 0.3
    beyond = np.delete(found, np.s_[4 // factor : 20 // factor], axis=2)
    np.testing.assert_array_equal(beyond[0], 1)
    np.testing.assert_array_equal(beyond[1:], 0)
    np.testing.assert_allclose(run(image[:, ::-1])[:, ::-1][PROTOCOL.mirror], found, atol=2e-3)


def test_where_both_halves_reach_they_are_blended():
    share = shares(8, 5)
    assert share[:3].tolist() == [1, 1, 1]
    assert share[5:].tolist() == [0, 0, 0]
    torch.testing.assert_close(share + share.flip(0), torch.ones(8))
    torch.testing.assert_close(shares(6, 6), torch.full((6,), 0.5))
    given = [torch.randn(3, 5, 2, 2) for _ in range(2)]
    swap = torch.tensor([0, 2, 1])
    sides = [Side(given[0], None, share), Side(given[1], None, share.flip(0), swap)]
    coarse, sub = both_sides(sides, None, None)
    assert sub is None
    mirrored = given[1].flip(1)[swap]
    wanted = share[3] * given[0][:, 3] + (1 - share[3]) * mirrored[:, 0]
    torch.testing.assert_close(coarse[3], wanted.permute(1, 2, 0))
    torch.testing.assert_close(coarse[7], mirrored[:, 4].permute(1, 2, 0))


def test_sub_voxels_are_those_of_the_whole_answer():
    network = build("unet", out_channels=[3, 5], features=[4, 6], stem=2, detail=7).eval()
    torch.manual_seed(0)
    for head in network.details:
        torch.nn.init.normal_(head.weight)
    image = torch.randn(1, 1, 8, 12, 16)
    with torch.inference_mode():
        whole = network(image, head=1)[0]
        logits, edges = (one[0].permute(1, 2, 3, 0) for one in network.body(image, head=1))
        where = torch.ones(logits.shape[:3]).nonzero()
        found = Quarters(logits)(where)
        weight, bias = network.corrections(head=1)
        found += torch.einsum("vd,scd->vsc", edges.reshape(-1, 7), weight) + bias
    found = found.reshape(4, 6, 8, 2, 2, 2, 5).permute(6, 0, 3, 1, 4, 2, 5).reshape(whole.shape)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_one_example_is_normalised_as_in_a_batch():
    network = build("unet", out_channels=3, features=[4, 6], stem=2).train()
    images = torch.randn(2, 1, 8, 8, 8)
    together = network(images)
    torch.testing.assert_close(network(images[:1]), together[:1], atol=1e-5, rtol=1e-4)
    inside = images.reshape(1, 2, 8, 8, 8).to(memory_format=torch.channels_last_3d)
    found = build("unet", out_channels=3, features=[2, 6]).down[0].norm1(inside)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("mirror", [False, True])
def test_sub_voxels_are_found_where_the_coarse_answer_is_open(mirror, monkeypatch):
    model = load_model(DETAILED, tensors(DETAILED))
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    prepared = Prepared(torch.from_numpy(image), scan.grid, scan, np.eye(4), True, ())

    def run(where) -> np.ndarray:
        monkeypatch.setattr("tlseg_bids.segment.fine.open_voxels", where)
        found = np.asarray(segment(model, prepared, Ask(mirror=mirror)).probabilities)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found.sum(0, dtype=np.float32), 1, atol=1e-2)
        return found

    every = run(lambda coarse, _: torch.ones(coarse.shape[:3]).nonzero())
    none = run(lambda *_: torch.zeros((0, 3), dtype=torch.int64))
    some = run(lambda *_: torch.tensor([[1, 2, 3]]))
    blocks = none.reshape(len(none), 8, 2, 8, 2, 8, 2)
    assert (blocks == blocks[:, :, :1, :, :1, :, :1]).all()
    changed = np.zeros((16, 16, 16), bool)
    changed[2:4, 4:6, 6:8] = True
    np.testing.assert_array_equal(some[:, ~changed], none[:, ~changed])
    np.testing.assert_array_equal(some[:, changed], every[:, changed])
    assert (every != none).any()


def test_a_voxel_is_open_at_a_border_or_in_doubt():
    coarse = torch.zeros(8, 8, 8, 3)
    coarse[..., 0] = 1
    assert len(open_voxels(coarse)) == 0
    coarse[0, 0, 0] = torch.tensor([0.9, 0.05, 0.05])
    assert open_voxels(coarse).tolist() == [[0, 0, 0]]
    coarse[5, 5, 5] = torch.tensor([0.0, 1.0, 0.0])
    found = set(map(tuple, open_voxels(coarse).tolist())) - {(0, 0, 0)}
    beside = {(4, 5, 5), (6, 5, 5), (5, 4, 5), (5, 6, 5), (5, 5, 4), (5, 5, 6)}
    assert found == {(5, 5, 5), *beside}


def test_the_fine_answer_lies_where_the_coarse_one_lies():
    given = tensors(DETAILED)
    given["segmenter.heads.0.weight"] *= 100
    given["segmenter.details.0.weight"] *= 0
    model = load_model(DETAILED, given)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    prepared = Prepared(torch.from_numpy(image), scan.grid, scan, np.eye(4), True, ())
    fine, coarse = (segment(model, prepared, Ask(fine=fine)) for fine in (True, False))
    assert fine.grid.affine.tolist() == scan.grid.affine.tolist()
    assert fine.probabilities.shape[1:] == (16, 16, 16)
    assert coarse.probabilities.shape[1:] == (8, 8, 8)
    middle = coarse.grid.affine @ [3, 3, 3, 1]
    np.testing.assert_allclose(middle, fine.grid.affine @ [6.5, 6.5, 6.5, 1], atol=1e-4)
    centre = np.asarray(fine.probabilities, np.float32)[:, 6:8, 6:8, 6:8].mean((1, 2, 3))
    apart = [np.abs(centre - coarse.probabilities[:, i, i, i]).sum() for i in (3, 0)]
    assert apart[0] < apart[1]


@pytest.mark.parametrize(
    ("distances", "passes", "warned"),
    [((9, 1), 2, False), ((9, 9, 9), 3, True), ((1,), 1, False), ((4,), 2, False)],
)
def test_a_frame_that_does_not_settle_is_told(distances, passes, warned, monkeypatch):
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    asked, answers = [], iter(distances)

    def prepare_in(volume, _options, frame, *_):
        asked.append(frame)
        return Prepared(torch.zeros(1, 2, 2, 2), volume.grid, volume, frame, True, ())

    monkeypatch.setattr(placing, "prepare", prepare_in)
    monkeypatch.setattr(placing, "segment", lambda *_: SimpleNamespace(probabilities=None))
    monkeypatch.setattr(placing, "expected_dice", lambda _: 0.7)
    monkeypatch.setattr(placing, "better_frame", lambda *given: (given[1] + 1, next(answers)))
    job = made_up_job(
        Scan(Path("x.nii"), Path(), {"sub": "01"}, "T1w"),
        preprocess={"rounds": 3, "settled_mm": 1.5},
    )
    box = {"box_mm": [[-80, 80]] * 3, "spacing_mm": 10.0}
    model = load_model(replace(CARD, preprocess=box), tensors())
    prepared, dice = placing.settle(scan, job, model, [np.eye(4)])
    assert dice == 0.7
    assert len(asked) == passes
    np.testing.assert_array_equal(prepared.template_from_native, np.eye(4) + passes - 1)
    told = [line for line in prepared.warnings if "still moved by 9.0 mm" in line]
    assert bool(told) == warned


def test_a_model_without_the_templates_head_takes_the_locators_word():
    card = replace(
        CARD, protocol="subcortical", heads=("subcortical",), frame="aseg",
        networks={"segmenter": {"network": "unet", "features": [2, 4]},
                  "locator": CARD.networks["locator"]},
        preprocess={"box_mm": [[-80, 80]] * 3, "spacing_mm": 10.0, "rounds": 6},
    )  # fmt: skip
    found = {k: v for k, v in tensors().items() if not k.startswith(("segmenter", "prior"))}
    state = build("unet", out_channels=15, features=[2, 4]).state_dict()
    model = load_model(card, found | {f"segmenter.{key}": value for key, value in state.items()})
    assert model.frame_head is None and len(model.template) == 33
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    job = made_up_job(Scan(Path("x.nii"), Path(), {"sub": "01"}, "T1w"))
    job = replace(job, card=card)
    frame = np.diag([1.1, 1, 1, 1])
    prepared, _ = placing.settle(scan, job, model, [frame])
    answer = segment(model, prepared, Ask())
    np.testing.assert_array_equal(prepared.template_from_native, frame)
    assert answer.probabilities.shape == (15, 16, 16, 16)
    qc = to_native(answer, scan, model.protocol).qc
    assert np.isnan(qc["brain_mm3"])
    assert "l, and a brain has" not in implausible(qc)


def test_the_images_of_a_visit_are_shown_in_the_cards_order(tmp_path):
    grid = grid_over(Phantom(), (10, 10, 10))
    other = Phantom().image(grid, sub=1)
    nib.save(nib.Nifti1Image(other.data, grid.affine), tmp_path / "sub-01_T1w.nii")
    scan = Volume(1 - other.data, grid)
    here = Scan(tmp_path / "sub-01_T2w.nii", Path(), {"sub": "01"}, "T2w")
    job = made_up_job(here, channels=("T1w", "T2w"))
    job = replace(job, companions=(replace(here, path=tmp_path / "sub-01_T1w.nii", suffix="T1w"),))
    shown = placing.shown_together(scan, job)
    assert [one.data[0, 0, 0] for one in shown] == [other.data[0, 0, 0], scan.data[0, 0, 0]]
    options = {"box_mm": [[-80, 80]] * 3, "spacing_mm": 10.0}
    image = prepare(scan, options, np.eye(4), shown).image
    assert image.shape == (2, 16, 16, 16)
    assert np.corrcoef(*image[:, 5:11, 5:11, 5:11].reshape(2, -1))[0, 1] < 0
    assert placing.shown_together(scan, replace(job, card=replace(job.card, channels=()))) == ()


def test_an_image_of_a_visit_that_cannot_be_read_is_told_before_the_brain_is_looked_for(
    tmp_path, monkeypatch
):
    card = replace(CARD, channels=("T1w", "T2w"), preprocess={"box_mm": [[-80, 80]] * 3})
    here = Scan(tmp_path / "sub-01_T1w.nii", Path(), {"sub": "01"}, "T1w", skull_stripped=True)
    damaged = tmp_path / "sub-01_T2w.nii"
    damaged.write_bytes(b"no image")
    job = replace(made_up_job(here), card=card)
    job = replace(job, companions=(replace(here, path=damaged, suffix="T2w"),))
    monkeypatch.setattr(placing, "looks", lambda *_: pytest.fail("the brain was looked for"))
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    with pytest.raises(ScanError, match=r"sub-01_T2w\.nii"):
        placing.find(scan, job, load_model(CARD, tensors()))


def test_a_template_is_shown_as_every_image_of_a_visit(tmp_path, monkeypatch):
    grid = grid_over(Phantom(), (10, 10, 10))
    template = tmp_path / "template.nii"
    nib.save(nib.Nifti1Image(Phantom().image(grid, sub=1).data, grid.affine), template)
    here = Scan(tmp_path / "sub-01_T1w.nii", Path(), {"sub": "01"}, "T1w")
    job = made_up_job(here, channels=("T1w", "T2w"))
    seen = []

    def settled(volume, _job, _model, _frames, together):
        seen.extend([volume, *together])
        return Prepared(torch.zeros(2, 2, 2, 2), grid, volume, np.eye(4), True, ()), 1.0

    monkeypatch.setattr(placing, "settle", settled)
    monkeypatch.setattr(placing, "locate", lambda _: None)
    model = load_model(replace(CARD, preprocess={"box_mm": [[-80, 80]] * 3}), tensors())
    placing.template_frame(template, job, model, {})
    assert len(seen) == 3 and all(one is seen[0] for one in seen)


def test_a_cards_standard_scale_is_applied_to_the_whole_scan():
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    options = {"box_mm": [[-40, 40]] * 3, "spacing_mm": 10.0}
    squared = np.linspace(0, 1, 11) ** 2
    plain = prepare(scan, options, np.eye(4)).image
    found = prepare(scan, {**options, "standard": squared.tolist()}, np.eye(4)).image
    whole = Volume(standardise(scan.data, squared), scan.grid)
    np.testing.assert_array_equal(found, prepare(whole, options, np.eye(4)).image)
    assert not np.allclose(found, plain, atol=0.05)


def test_fat_brighter_than_any_brain_does_not_darken_it():
    scan = Phantom().image(grid_over(Phantom(), (5, 5, 5)), sub=1)
    options = {"box_mm": [[-80, 80]] * 3, "spacing_mm": 5.0}
    brain = torch.zeros(32, 32, 32, dtype=torch.bool)
    brain[10:22, 10:22, 10:22] = True
    fat = scan.data.copy()
    fat[:, :, :3] = 30 * scan.data.max()
    plain, bright = (
        prepare(Volume(data, scan.grid), options, np.eye(4), brain=brain).image[0]
        for data in (scan.data, fat)
    )
    np.testing.assert_array_equal(plain[brain], bright[brain])
    assert bright.max() == 1
    by_all = prepare(Volume(fat, scan.grid), options, np.eye(4)).image[0]
    assert by_all[brain].max() < 0.2 < bright[brain].max()


def test_a_model_knows_from_its_atlas_where_its_box_shows_brain():
    box = {"box_mm": [[-80, 80]] * 3, "spacing_mm": 5.0}
    card = replace(CARD, preprocess=box)
    model = load_model(card, tensors())
    model.priors["aseg"][:, 0] = 1
    model.priors["aseg"][:, 0, 2:6, 2:6, 2:6] = 0
    assert model.brain.shape == (32, 32, 32)
    assert model.brain[12:20, 12:20, 12:20].all()
    assert not model.brain[:7].any() and not model.brain[..., -4:].any()
    model = load_model(card, tensors())
    model.priors.clear()
    assert model.brain is None


def looking(monkeypatch, dices: dict[int, float | str]):
    """`placing.find` where each direction has the given Dice, or fails with the given sentence."""
    tried = []

    def looks(_scan, _options, _look, _template, turn, _crew):
        tried.append(next(n for n, one in enumerate(TURNS) if one is turn))
        if isinstance(dices[tried[-1]], str):
            raise ScanError(dices[tried[-1]], "", "")
        yield turn

    def coarsely(scan, _job, _model, frame, _together, *, patient):
        assert patient == (frame is TURNS[0])
        prepared = Prepared(torch.zeros(1, 2, 2, 2), scan.grid, scan, frame, True, ())
        return prepared, dices[tried[-1]]

    monkeypatch.setattr(placing, "looks", looks)
    monkeypatch.setattr(placing, "coarsely", coarsely)
    monkeypatch.setattr(placing, "locate", lambda _: None)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    known = Scan(Path("x.nii"), Path(), {"sub": "01"}, "T1w", skull_stripped=True)
    card = SimpleNamespace(preprocess={}, channels=(), evidence=())
    model = SimpleNamespace(landmarks=None, crew=ALONE, placer=None, networks={})
    return placing.find(scan, replace(made_up_job(known), card=card), model), tried


@pytest.mark.parametrize(
    ("dices", "tries", "taken"),
    [
        ({0: 0.8}, [0], 0),
        ({0: 0.4, 1: 0.3, 2: 0.8}, [0, 1, 2], 2),
        ({0: 0.4, 1: 0.3, 2: 0.2, 3: 0.5}, [0, 1, 2, 3], 0),
        ({0: 0.61, 1: 0.3, 2: 0.84}, [0, 1, 2], 2),
        ({0: 0.65, 1: 0.3, 2: 0.62, 3: 0.3}, [0, 1, 2, 3], 0),
        ({0: "no brain", 1: 0.3, 2: "none", 3: 0.3}, [0, 1, 2, 3], 1),
    ],
)
def test_a_brain_is_looked_for_in_turned_directions(dices, tries, taken, monkeypatch):
    prepared, tried = looking(monkeypatch, dices)
    assert tried == tries
    np.testing.assert_array_equal(prepared.template_from_native, TURNS[taken])
    told = [line for line in prepared.warnings if "turned by 180° from upright" in line]
    assert len(told) == (taken > 0)
    assert all("left and right are exchanged" in line for line in told)
    unclear = [line for line in prepared.warnings if "clearly show a brain" in line]
    assert len(unclear) == (max(one for one in dices.values() if not isinstance(one, str)) < 0.6)
    assert all("mend the header or leave the scan out" in line for line in unclear)


def test_where_no_direction_shows_a_brain_the_first_reason_is_told(monkeypatch):
    with pytest.raises(ScanError, match="no brain found"):
        looking(monkeypatch, {0: "no brain found", 1: "b", 2: "c", 3: "d"})


@pytest.mark.parametrize("degrees", [0.0, 30.0, 90.0, 180.0])
def test_how_far_a_head_is_turned(degrees):
    frame = np.eye(4)
    frame[:3, :3] = 1.3 * rotation(y=degrees)
    frame[:3, 3] = 5, 6, 7
    assert turned_degrees(frame) == pytest.approx(degrees, abs=0.01)


def test_expected_dice_follows_the_probabilities():
    sure = np.zeros((3, 2, 2, 2), np.float16)
    sure[1, 0], sure[0, 1] = 1, 1
    assert expected_dice(sure) == 1
    half = np.full((3, 2, 2, 2), 0.3, np.float16)
    half[1] = 0.4
    assert expected_dice(half) == pytest.approx(2 * 3.2 / (8 + 3.2), abs=1e-3)
    nothing = np.zeros((3, 2, 2, 2), np.float16)
    nothing[0] = 1
    assert expected_dice(nothing) == 0


@pytest.mark.parametrize(
    ("strategy", "windows"),
    [({"name": "sliding", "window": 16}, 3), ({"name": "sliding", "window": [16, 16, 32]}, 1),
     ({"name": "whole"}, 1)],
    ids=["several", "one", "whole"],
)  # fmt: skip
@pytest.mark.parametrize("detail", [0, 2])
def test_the_age_is_read_with_every_window_of_the_fine_answer(detail, strategy, windows):
    networks = {**CARD.networks, "segmenter": {
        **CARD.networks["segmenter"], "detail": detail, "design": {"age": 3},
    }}  # fmt: skip
    card = replace(CARD, networks=networks, strategy=strategy)
    given = tensors(card)
    given["segmenter.age.centre"], given["segmenter.age.scale"] = map(torch.tensor, (30.0, 8.0))
    model = load_model(card, given)
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 32)).astype(np.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    grid = Grid((16, 16, 32), scan.grid.affine)
    prepared = Prepared(torch.from_numpy(image), grid, scan, np.eye(4), True, ())
    seen: list[torch.Tensor] = []
    known = model.networks["segmenter"].predicted_age
    model.networks["segmenter"].predicted_age = lambda x: seen.append(x) or known(x)
    found = segment(model, prepared, Ask())
    assert len(seen) == windows
    with torch.inference_mode():
        wanted = float(known(torch.cat(seen)).mean())
    assert found.age == pytest.approx(wanted, abs=1e-3)
    assert found.age != 30.0
    assert to_native(found, scan, PROTOCOL).qc["predicted_age"] == found.age
    assert segment(model, prepared, Ask(fine=False)).age is None


def test_no_age_is_made_up_without_an_age_head():
    model = load_model(CARD, tensors())
    image = np.zeros((1, 16, 16, 16), np.float32)
    scan = Phantom().image(grid_over(Phantom(), (10, 10, 10)), sub=1)
    found = segment(
        model, Prepared(torch.from_numpy(image), scan.grid, scan, np.eye(4), True, ()), Ask()
    )
    assert found.age is None
    assert "predicted_age" not in to_native(found, scan, PROTOCOL).qc


def test_windows_may_have_sides_of_their_own():
    shown = []

    def predict(window, corner):
        shown.append((corner, tuple(window.shape[2:])))
        return window

    image = torch.rand(1, 1, 8, 12, 8)
    found = sliding(predict, image, window=[8, 8, 6], overlap=0.25)
    torch.testing.assert_close(found, image[0])
    assert {shape for _, shape in shown} == {(8, 8, 6)}
    assert [corner for corner, _ in shown] == [(0, 0, 0), (0, 0, 2), (0, 4, 0), (0, 4, 2)]


def test_cards_that_share_their_weights_are_models_of_their_own(monkeypatch):
    monkeypatch.setattr("tlseg_bids.segment.model.load_weights", lambda *_: {})
    monkeypatch.setattr("tlseg_bids.segment.model.load_model", lambda card, *_: [card])
    models, card = Models(), small_card()
    cards = (
        card,
        replace(card, strategy={"name": "whole"}),
        replace(card, calibration=Calibration("made up", {"aseg": 1.5})),
        replace(card, heads=("aseg", "braincolor")),
        replace(card, path=Path("elsewhere.toml")),
    )
    for one in cards:
        assert models.get(one, "cpu") == [one]
        assert models.get(one, "cpu") is models.get(one, "cpu")


def test_a_template_is_found_anew_for_each_card(tmp_path, monkeypatch):
    frames, asked = {}, []
    grid = Grid((2, 2, 2), np.eye(4))
    monkeypatch.setattr(placing, "load_volume", lambda _: Volume(np.zeros((2, 2, 2)), grid))
    monkeypatch.setattr(placing, "locate", lambda _: None)
    monkeypatch.setattr(placing, "looks", lambda _, options, *__, **___: asked.append(options))
    model = SimpleNamespace(landmarks=None, crew=ALONE, placer=None)
    prepared = SimpleNamespace(template_from_native=np.eye(4))
    monkeypatch.setattr(placing, "settle", lambda *_: (prepared, 1.0))
    scan = Scan(tmp_path / "sub-01_T1w.nii.gz", tmp_path, {"sub": "01"}, "T1w")
    for spacing_mm in (1.0, 2.0, 1.0):
        job = made_up_job(scan, preprocess={"spacing_mm": spacing_mm})
        placing.template_frame(tmp_path / "t.nii.gz", job, model, frames)
    assert asked == [{"spacing_mm": 1.0}, {"spacing_mm": 2.0}]

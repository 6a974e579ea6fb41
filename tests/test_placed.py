"""A model that leaves finding the brain to another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from cards import small_card
from heads import tiny_recipe, write_heads
from safetensors.torch import load_file, save_file

from tests import toy
from tests.datasets import made_up_job
from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.cli.train import main
from tlseg_bids.crew import Crew
from tlseg_bids.errors import DataError
from tlseg_bids.flow import Job
from tlseg_bids.preprocess.register import between, displacement_mm
from tlseg_bids.segment.model import Model, Models
from tlseg_bids.train.export import export
from tlseg_bids.train.loop import train
from tlseg_bids.volume import Volume, load_scan
from tlseg_bids.zoo import registry
from tlseg_bids.zoo.card import ModelCard
from tlseg_bids.zoo.card_file import read_card, write_card
from tlseg_bids.zoo.weights import describe, load_weights

SHIFT_MM = np.array([4.0, -6.0, 9.0])
SAID = {
    "name": "tiny", "version": "0", "status": "experimental", "summary": "balls", "domain": {},
    "strategy": {"name": "sliding", "window": 16}, "citations": ["none"],
}  # fmt: skip


@pytest.fixture(scope="module")
def heads(tmp_path_factory) -> Path:
    return write_heads(tmp_path_factory.mktemp("data"))


@pytest.fixture
def placer(tmp_path, monkeypatch) -> ModelCard:
    """The toy model, as if it came with the program."""
    card = toy.write_toy_model(tmp_path / "program")
    monkeypatch.setattr(registry, "finders", lambda: {"toy": card})
    return card


@pytest.fixture
def placed(placer, tmp_path) -> ModelCard:
    """The same segmenter without a locator, whose template lies elsewhere."""
    path, file = tmp_path / "placed.toml", tmp_path / "placed.safetensors"
    tensors = load_file(placer.path.with_name("toy.safetensors"))
    kept = {key: value for key, value in tensors.items() if not key.startswith("locator.")}
    kept["template"] = kept["template"] + kept["template"].new_tensor(SHIFT_MM)
    save_file(kept, file)
    box = [[low + shift, high + shift] for (low, high), shift in
           zip(toy.BOX_MM, SHIFT_MM.tolist(), strict=True)]  # fmt: skip
    write_card(replace(
        placer, name="placed", path=None, networks={"segmenter": placer.networks["segmenter"]},
        preprocess={"box_mm": box, "spacing_mm": toy.SPACING_MM, "placed_by": "toy"},
        weights=describe(file, "MIT", path),
    ), path)  # fmt: skip
    return read_card(path)


def seen(card: ModelCard, path: Path) -> tuple[Volume, Job, Model]:
    scan = Scan(path, path.parent, {"sub": "01"}, "T1w")
    volume, _ = load_scan(path)
    return volume, replace(made_up_job(scan), card=card), Models().get(card, "cpu")


def test_the_brain_is_where_the_other_model_sees_it(placer, placed, tmp_path):
    path = toy.write_scan(tmp_path / "sub-01_T1w.nii")
    volume, job, model = seen(placed, path)
    prepared = placing.find(volume, job, model)
    own = placing.find(*seen(placer, path))
    there = prepared.template_from_native @ np.linalg.inv(own.template_from_native)
    np.testing.assert_allclose(there[:3, 3], SHIFT_MM, atol=0.01)
    np.testing.assert_allclose(there[:3, :3], np.eye(3), atol=1e-4)
    np.testing.assert_allclose(prepared.image, own.image, atol=0.02)
    found = app.finely(prepared, model).probabilities.argmax(0)
    assert (found == app.finely(own, seen(placer, path)[2]).probabilities.argmax(0)).mean() > 0.99


@pytest.mark.parametrize("offset", [1000, -1024])
def test_the_zero_of_the_intensities_does_not_move_a_label(placer, tmp_path, offset):
    path, moved = toy.write_scan(tmp_path / "sub-01_T1w.nii"), tmp_path / "sub-02_T1w.nii"
    scan = nib.load(path)
    scan.header.set_data_dtype(np.float32)
    nib.save(nib.Nifti1Image(scan.get_fdata() + offset, scan.affine, scan.header), moved)
    (_, *plain), (_, *other) = seen(placer, path), seen(placer, moved)
    labels = app.answer(*plain)[1].labels.data
    assert set(np.unique(labels)) >= {toy.index_of(name) for name in toy.STRUCTURES}
    np.testing.assert_array_equal(app.answer(*other)[1].labels.data, labels)


def test_a_further_image_of_a_visit_is_counted_from_its_background_too(placer, tmp_path):
    path = toy.write_scan(tmp_path / "sub-01_T1w.nii")
    image = nib.load(path)
    other = Scan(tmp_path / "sub-01_T2w.nii", tmp_path, {"sub": "01"}, "T2w")
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) - 1024, image.affine), other.path)
    volume, job, _ = seen(placer, path)
    both = replace(job, card=replace(placer, channels=("T1w", "T2w")), companions=(other,))
    shown = placing.shown_together(volume, both)
    assert shown[0] is volume
    np.testing.assert_array_equal(shown[1].data, volume.data)


def test_a_child_on_its_parents_grid_sees_its_parents_image(placer, tmp_path, monkeypatch):
    model = Models().get(placer, "cpu")
    child = replace(model, placer=model)
    path = toy.write_scan(tmp_path / "sub-01_T1w.nii")
    volume, job, _ = seen(placer, path)
    images, prepare = [], placing.prepare
    monkeypatch.setattr(
        placing, "prepare", lambda *given: images.append(prepare(*given)) or images[-1]
    )
    assert placing.find(volume, job, child).image is images[-1].image
    alone = len(images)
    elsewhere = replace(child, template=child.template + 1)
    placing.find(volume, job, elsewhere)
    assert len(images) == 2 * alone + 1, "another frame is another image"
    assert placing.seen_alike(child, model) and not placing.seen_alike(elsewhere, model)
    finer = replace(placer, preprocess={**placer.preprocess, "spacing_mm": 3.0})
    assert not placing.seen_alike(replace(child, card=finer), model)
    both = replace(placer, channels=("T1w", "T2w"))
    assert not placing.seen_alike(replace(child, card=both), model)


@pytest.mark.parametrize(("shift_mm", "warned"), [(0.0, False), (9.0, True)])
def test_images_of_a_visit_that_lie_apart_are_told(placer, tmp_path, shift_mm, warned):
    path, other = (toy.write_scan(tmp_path / f"sub-01_T{n}w.nii") for n in (1, 2))
    image = nib.load(other)
    moved = image.affine.copy()
    moved[1, 3] += shift_mm
    nib.save(nib.Nifti1Image(np.array(image.dataobj), moved), other)
    volume, job, model = seen(placer, path)
    job = replace(job, companions=(replace(job.scan, path=other, suffix="T2w"),))
    told = placing.apart(job, model, placing.find(volume, job, model))
    assert bool(told) == warned
    if warned:
        assert "sub-01_T2w.nii, which is shown to the model with this scan, lies 9 mm" in told[0]
        assert "align the images, or choose a model of one image with --model" in told[0]


def test_an_image_of_a_visit_without_a_brain_is_told(placer, tmp_path):
    path, other = (toy.write_scan(tmp_path / f"sub-01_T{n}w.nii") for n in (1, 2))
    image = nib.load(other)
    nib.save(nib.Nifti1Image(np.full(image.shape, 3, np.int16), image.affine), other)
    volume, job, model = seen(placer, path)
    job = replace(job, companions=(replace(job.scan, path=other, suffix="T2w"),))
    (told,) = placing.apart(job, model, placing.find(volume, job, model))
    assert told.startswith("sub-01_T2w.nii, shown with this scan: every voxel is 3")
    assert told.endswith("mend it, or choose a model of one image with --model")


def test_a_template_is_found_by_the_other_model_too(placer, placed, tmp_path):
    path = toy.write_scan(tmp_path / "sub-01_T1w.nii")
    _, job, model = seen(placed, path)
    frames: dict = {}
    grid, there = placing.template_frame(path, job, model, frames)
    assert placing.template_frame(path, job, model, frames)[1] is there
    own = placing.template_frame(path, replace(job, card=placer), model.placer, frames)
    assert grid == own[0]
    np.testing.assert_allclose((there @ np.linalg.inv(own[1]))[:3, 3], SHIFT_MM, atol=0.01)


def test_the_other_model_is_loaded_once_for_all(placer, placed):
    models = Models()
    assert models.get(placed, "cpu").placer is models.get(placer, "cpu")


def test_a_model_that_does_not_come_with_the_program_places_nothing(placed, placer):
    unknown = replace(placed, preprocess={**placed.preprocess, "placed_by": "nobody"})
    with pytest.raises(DataError, match="that finds the brain is called 'nobody' – .*known.*: toy"):
        registry.placing_card(unknown)
    assert registry.placing_card(placer) is None


def test_the_programs_models_find_the_brain_or_are_placed_by_one_that_does():
    assert "any" in registry.finders()
    for card in registry.load_cards():
        finder = registry.placing_card(card)
        assert "locator" in (card if finder is None else finder).networks
    assert registry.finders() is registry.finders(), "the cards are not read for every scan"


def test_a_placed_model_needs_its_grid(placed):
    lacking = {"placed_by": "toy", "spacing_mm": 6.0}
    with pytest.raises(DataError, match=r"missing: box_mm – .*preprocess"):
        Models().get(replace(placed, preprocess=lacking), "cpu")


def test_templates_are_brought_together_by_what_both_have():
    one = np.random.default_rng(0).normal(0, 40, (12, 3))
    turn = np.diag([1.1, 0.9, 1.0, 1.0])
    turn[:3, 3] = SHIFT_MM
    other = one @ turn[:3, :3].T + turn[:3, 3]
    one[3], other[5] = np.nan, np.nan
    assert displacement_mm(between(one, other), turn, one) < 1.0


def test_export_without_a_locator(heads, tmp_path):
    checkpoint = train(tiny_recipe(), heads, tmp_path, lambda *_, **__: None)
    with pytest.raises(DataError, match="nothing finds the brain – .*placed_by"):
        export(SAID, {"segmenter": checkpoint}, heads, tmp_path / "zoo")
    told = {**SAID, "preprocess": {"placed_by": "any"}}
    card = export(told, {"segmenter": checkpoint}, heads, tmp_path / "zoo")
    assert set(card.networks) == {"segmenter"} and card.placed_by == "any"
    assert set(card.preprocess) == {"box_mm", "spacing_mm", "placed_by"}
    written = read_card(tmp_path / "zoo" / "tiny.toml")
    assert Models().get(written, "cpu").placer.card.name == "any"
    assert "template" in load_weights(written)
    locating = replace(
        tiny_recipe(), name="place", role="locator",
        network={"network": "unet", "features": [4, 8], "stem": 2},
    )  # fmt: skip
    locator = train(locating, heads, tmp_path, lambda *_, **__: None)
    own = export(told, {"locator": locator, "segmenter": checkpoint}, heads, tmp_path / "own")
    assert own.placed_by is None, "a locator of its own finds the brain"
    assert {"rounds", "settled_mm", "locator"} < set(own.preprocess)


def test_the_command_needs_no_locator_then(heads, tmp_path, capsys):
    checkpoint = train(tiny_recipe(), heads, tmp_path, lambda *_, **__: None)
    card = tmp_path / "model.toml"
    card.write_text(
        'name = "tiny"\nversion = "0"\nstatus = "experimental"\nsummary = "balls"\n'
        'citations = ["none"]\n[domain]\n[strategy]\nname = "sliding"\nwindow = 16\n'
    )
    words = ["export", str(card), "--segmenter", str(checkpoint), "--data", str(heads),
             "--out", str(tmp_path / "zoo")]  # fmt: skip
    assert main(words) == DataError.exit_code
    assert "nothing finds the brain" in capsys.readouterr().err
    card.write_text(card.read_text() + '[preprocess]\nplaced_by = "any"\n')
    assert main(words) == 0
    assert read_card(tmp_path / "zoo" / "tiny.toml").placed_by == "any"


def test_the_sidecar_names_who_placed_the_scan():
    from tlseg_bids.bids.metadata import model_of

    scan = Scan(Path("x.nii"), Path(), {"sub": "01"}, "T1w")
    job = replace(made_up_job(scan), card=small_card(preprocess={"placed_by": "any"}))
    assert model_of(job)["Model"]["PlacedBy"] == "any"
    assert "PlacedBy" not in model_of(made_up_job(scan))["Model"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("known", [None, True, False])
def test_whether_the_skull_is_there_is_asked_beside_the_rest(
    known, threads, placer, tmp_path, monkeypatch
):
    path = toy.write_scan(tmp_path / "sub-01_T1w.nii")
    volume, job, model = seen(placer, path)
    job = replace(job, scan=replace(job.scan, skull_stripped=known))
    asked = []
    monkeypatch.setattr(placing, "looks_skull_stripped", lambda scan: asked.append(scan) or True)
    prepared = placing.find(volume, job, replace(model, crew=Crew(threads)))
    assert prepared.skull_stripped is (known is not False)
    assert len(asked) == (known is None)

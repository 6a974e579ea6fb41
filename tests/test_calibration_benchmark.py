"""The calibration is fitted on what the program really says at voxels it never saw."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from tests.cards import small_card
from tests.phantom import PROTOCOL, Phantom, grid_over
from tlseg_bids.errors import UsageError
from tlseg_bids.flow import Prepared
from tlseg_bids.labels.mapping import LEFT_OUT, load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.networks import build
from tlseg_bids.postprocess import ProbabilityField
from tlseg_bids.postprocess.calibration import folded
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import load_model
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.calibration import Calibration

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = Phantom(0.4)


@pytest.fixture(scope="module")
def benchmarks() -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import calibrate
        import held_out_voxels
    finally:
        sys.path.remove(str(BENCHMARKS))
    return calibrate, held_out_voxels


def channel(name: str, protocol=PROTOCOL) -> int:
    return int(np.flatnonzero(protocol.table["name"] == name)[0])


def label(name: str, protocol=PROTOCOL) -> int:
    return int(protocol.indices[channel(name, protocol)])


def test_both_passes_are_those_that_the_program_averages(benchmarks) -> None:
    network = {"network": "unet", "features": [2, 4], "stem": 2, "prior_channels": len(PROTOCOL)}
    card = small_card(networks={"segmenter": network}, strategy={"name": "sliding", "window": 16})
    torch.manual_seed(0)
    state = build(**network, out_channels=len(PROTOCOL)).state_dict()
    tensors = {f"segmenter.{key}": 30 * value for key, value in state.items()}
    random = np.random.default_rng(0)
    prior = torch.from_numpy(random.integers(0, 9, (len(PROTOCOL), 8, 8, 8)))
    model = load_model(card, {**tensors, "prior.aseg": prior.byte()})
    image = random.normal(size=(1, 24, 16, 20)).astype(np.float32)
    grid = Grid(image.shape[1:], np.eye(4))
    prepared = Prepared(torch.from_numpy(image), grid, Volume(image[0], grid), np.eye(4), True, ())
    straight = np.asarray(segment(model, prepared, Ask()).probabilities, np.float32)
    mirrored = benchmarks[1].in_the_mirror(model, prepared).astype(np.float32)
    both = np.asarray(segment(model, prepared, Ask(mirror=True)).probabilities, np.float32)
    assert np.abs(straight - mirrored).max() > 0.3
    np.testing.assert_allclose((straight + mirrored) / 2, both, atol=4e-3)


def test_a_model_of_two_images_is_shown_the_other_one_of_the_visit(benchmarks) -> None:
    path = Path("anat/sub-1_ses-2_T1w.nii.gz")
    pair = type("Model", (), {"card": small_card(channels=("T2w", "T1w"))})()
    scan, beside = benchmarks[1].shown(path, pair)
    assert (scan.path, scan.suffix) == (path, "T1w")
    assert [(one.path.name, one.suffix) for one in beside] == [("sub-1_ses-2_T2w.nii.gz", "T2w")]
    alone = type("Model", (), {"card": small_card()})()
    assert benchmarks[1].shown(path, alone)[1] == ()


def test_a_sample_holds_what_the_program_says_at_labelled_voxels(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate, voxels = benchmarks
    grid = grid_over(SMALL, (3, 3, 3))
    native = grid_over(SMALL, (2, 2.5, 2), offset=(0.4, -0.3, 0.1))
    truth = SMALL.labels(native).data
    for name in ("scan.nii.gz", "labels.nii.gz"):
        nib.save(nib.Nifti1Image(truth, native.affine), tmp_path / name)
    answer = SMALL.probabilities(grid, sub=2)
    matrix = grid.index_from(native)
    monkeypatch.setattr(voxels, "both_ways", lambda *_: ([answer], matrix))
    model = type("Model", (), {"protocol": PROTOCOL})()
    reference = calibrate.Reference("made-up", "labels", None)
    found = voxels.sample(tmp_path / "scan.nii.gz", tmp_path / "labels.nii.gz", reference, model)
    assert found["probabilities"].shape[1:] == (8, 1, len(PROTOCOL))
    np.testing.assert_allclose(found["weights"].sum(axis=1), 1, atol=1e-6)
    scan = {**found, "logits": np.log(np.maximum(found["probabilities"], 1e-7))}
    said = folded(scan, 1.0)
    assert (said.argmax(axis=1) == found["target"]).mean() > 0.75
    field = ProbabilityField(answer, grid, native)
    np.testing.assert_allclose(said, field.at(found["voxels"]), atol=2e-3)
    np.testing.assert_array_equal(PROTOCOL.indices[found["target"]], truth.flat[found["voxels"]])


def test_reference_labels_meet_the_prediction_in_one_protocol(benchmarks) -> None:
    parse = benchmarks[0].Reference.parse
    infant, adult = load_protocol("infant"), load_protocol("braincolor")
    ours = parse("infant:derivatives/jlf:aseg_to_infant")
    labels = np.array([0, label("Left thalamus", infant), label("Cerebellar vermis", infant), 999])
    expected = [0, channel("Left thalamus", infant), LEFT_OUT, LEFT_OUT]
    assert ours.targets(labels, PROTOCOL).tolist() == expected
    assert ours.fold(PROTOCOL).shape == (len(infant), len(PROTOCOL))
    theirs = parse("malc:derivatives/manual:braincolor_to_aseg")
    labels = np.array([label("Left thalamus", adult), label("Cerebrospinal fluid", adult)])
    assert theirs.targets(labels, PROTOCOL).tolist() == [channel("Left thalamus"), LEFT_OUT]
    np.testing.assert_array_equal(theirs.fold(PROTOCOL), np.eye(len(PROTOCOL)))
    plain = parse("malc:derivatives/manual:none")
    assert plain.targets(labels, adult).tolist() == [
        channel("Left thalamus", adult), channel("Cerebrospinal fluid", adult),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="'malc:labels' is not DATASET:LABELS:MAPPING"):
        parse("malc:labels")


def test_a_subject_is_labelled_once_by_a_fold_that_has_not_seen_it(benchmarks) -> None:
    unseen = [["a", "x", "y", "z"], ["b", "x", "y", "z"]]
    dealt = benchmarks[0].deal(unseen)
    assert sorted(dealt[0] + dealt[1]) == ["a", "b", "x", "y", "z"]
    assert "a" in dealt[0]
    assert "b" in dealt[1]
    assert all(set(mine) <= set(those) for mine, those in zip(dealt, unseen, strict=True))
    assert abs(len(dealt[0]) - len(dealt[1])) <= 1


def test_one_fold_is_refused(benchmarks, tmp_path: Path) -> None:
    words = [str(tmp_path), str(tmp_path), "malc:derivatives/manual:none", "--fold", "a", "b"]
    with pytest.raises(UsageError, match="too few folds.*two or more --fold, or one with"):
        benchmarks[0].main(benchmarks[0].parse(words))


def test_of_one_fold_each_subject_meets_the_temperature_of_the_others(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    calibrate = benchmarks[0]
    fold = calibrate.Fold(small_card(), tmp_path, {"malc": ["1", "2"], "infant": ["3"]})
    parts = calibrate.by_subject(fold)
    found = [[(d, one) for d, those in part.subjects.items() for one in those] for part in parts]
    assert found == [[("malc", "1")], [("malc", "2")], [("infant", "3")]]
    with pytest.raises(UsageError, match="a fold of one subject.*two or more"):
        calibrate.by_subject(parts[0])
    random = np.random.default_rng(0)

    def sampled(*_) -> list[dict]:
        """A model twice as sure as it may be, of two classes."""
        logits = random.normal(size=(4000, 1, 1, 2))
        likely = 1 / (1 + np.exp(logits[:, 0, 0, 0] - logits[:, 0, 0, 1]))
        target = (random.random(4000) < likely).astype(int)
        return [{"logits": 2 * logits, "weights": np.ones((4000, 1)), "target": target,
                 "fold": np.eye(2)}]  # fmt: skip

    monkeypatch.setattr(calibrate, "folds", lambda *_: [fold])
    monkeypatch.setattr(calibrate, "samples", sampled)
    words = [str(tmp_path), str(tmp_path), "malc:derivatives/manual:none", "--fold", "a", "b"]
    given = calibrate.parse([*words, "--temperature-only", "--card", str(tmp_path / "card.toml")])
    calibrate.write_card(small_card(), given.card)
    assert calibrate.main(given) == 0
    kept = calibrate.read_card(given.card).calibration
    assert kept.temperature == {"aseg": pytest.approx(2.0, abs=0.15)}
    assert not kept.dice_offset and not kept.volume_low
    assert "persons of malc (2) and infant (1)" in kept.how
    assert capsys.readouterr().out.count("of the other folds") == 3


def test_expected_and_true_scores_meet_row_by_row(benchmarks, tmp_path: Path) -> None:
    calibrate = benchmarks[0]
    name = "sub-01_space-T2w_seg-aseg_dseg.nii.gz"
    infant = load_protocol("infant")
    volumes = PROTOCOL.table.iloc[1:][["index", "name"]].assign(
        soft_mm3=100.0, voxels=10, mean_confidence=0.9, predicted_dice=0.8
    )
    whole = volumes["name"] == "Left lateral ventricle"
    volumes.loc[whole, ["voxels", "predicted_dice"]] = [50, 0.7]
    volumes.to_csv(tmp_path / name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv"), sep="\t")
    asked = ["Left thalamus", "Left lateral ventricle with inferior horn"]
    scores = pd.DataFrame({
        "predicted": name, "index": [label(one, infant) for one in asked], "dice": [0.9, 0.6],
        "reference_mm3": [120.0, 300.0],
    })  # fmt: skip
    scores.to_csv(tmp_path / "scores.tsv", sep="\t", index=False)
    reference = calibrate.Reference("infant", "", load_mapping("aseg_to_infant"))
    rows = calibrate.structure_rows(tmp_path, tmp_path / "scores.tsv", reference, PROTOCOL)
    assert rows["structure"].tolist() == ["THA", "LV"]
    assert rows["expected"].tolist() == [0.8, 0.7]
    assert rows["soft_mm3"].tolist()[0] == 100
    assert np.isnan(rows["soft_mm3"].tolist()[1])
    told = rows[["subject", "suffix"]].iloc[0].tolist()
    assert told == ["infant/01", "T2w"], "one label in two datasets is two persons"
    fitted = Calibration("", {}, {"THA": 0.05}, 0.9, {"THA": 0.8}, {"THA": 1.5})
    told = calibrate.apply(rows, fitted)
    assert told["predicted"].tolist()[0] == pytest.approx(0.85)
    assert told[["low", "high"]].iloc[0].tolist() == [80, 150]
    assert told[["predicted", "low"]].iloc[1].isna().all()


def test_a_calibration_is_not_fitted_on_top_of_the_description_s_own(
    benchmarks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate, told = benchmarks[0], []

    def export(description, *_) -> object:
        told.append(description)
        return small_card()

    monkeypatch.setattr(calibrate, "export", export)
    whose = sys.modules[calibrate.held_out.__module__]
    monkeypatch.setattr(whose, "trained_on", lambda _, dataset: {f"sub-{dataset}3"})
    for subject in ("malc1", "malc2", "malc3"):
        (tmp_path / "malc" / f"sub-{subject}").mkdir(parents=True)
    file = tmp_path / "model.toml"
    file.write_text(
        'name = "x"\n[calibration]\nlevel = 0.9\n[calibration.temperature]\naseg = 0.7\n'
    )
    words = [str(tmp_path), str(tmp_path), "malc:derivatives/manual:none", "--fold", "a", "b"]
    given = calibrate.parse([*words, "--description", str(file)])
    found = calibrate.folds(given, [calibrate.Reference.parse(given.reference[0])])
    assert told == [{"name": "fold-0"}]
    assert [fold.subjects for fold in found] == [{"malc": ["malc1", "malc2"]}], "not the third"

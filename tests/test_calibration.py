"""Confidence that can be believed: temperature, predicted Dice and intervals of volumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.cards import small_card
from tests.phantom import PROTOCOL
from tlseg_bids.errors import DataError
from tlseg_bids.flow import Prepared
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import calibration_error
from tlseg_bids.networks import build
from tlseg_bids.postprocess.calibration import (
    fit_dice,
    fit_intervals,
    fit_temperature,
    folded,
    likelihood,
    predicted_dice,
    tempered,
    volume_interval,
)
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import load_model
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.calibration import Calibration, structures
from tlseg_bids.zoo.card_file import check_card, digest, read_card, write_card

SHORT = structures(PROTOCOL)
THALAMI = [channel for channel, name in enumerate(SHORT) if name == "THA"]
GIVEN = Calibration(
    "made up", {"aseg": 1.5}, {"THA": 0.1, "CAU": -0.3}, 0.8, {"THA": 0.9}, {"THA": 1.2}
)


def overconfident(sharpening: float, points: int = 4000) -> dict[str, np.ndarray]:
    """A scan whose labels follow softmax(logits), while it says softmax(sharpening · logits)."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 1.5, (points, 5)).astype(np.float32)
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = (truth.cumsum(axis=1) > random.random((points, 1))).argmax(axis=1)
    corners = np.repeat(sharpening * logits[:, None, None], 8, axis=1)
    return {
        "logits": corners, "weights": np.full((points, 8), 1 / 8, np.float32),
        "target": target, "fold": np.eye(5, dtype=np.float32),
    }  # fmt: skip


# Temperature -------------------------------------------------------------------------------------
@pytest.mark.parametrize("sharpening", [0.6, 1.0, 2.0])
def test_the_temperature_undoes_wrong_confidence(sharpening: float) -> None:
    scan = overconfident(sharpening)
    found = fit_temperature([scan])
    assert found == pytest.approx(sharpening, rel=0.06)
    assert likelihood(scan, found).mean() <= likelihood(scan, 1.0).mean() + 1e-6
    errors = []
    for heat in (1.0, found):
        said = folded(scan, heat)
        errors.append(calibration_error(said.max(axis=1), said.argmax(axis=1) == scan["target"]))
    assert errors[1] < 0.03
    if sharpening != 1:
        assert errors[1] < errors[0] / 2


def test_probabilities_are_softened_before_they_are_averaged() -> None:
    logits = np.log(np.array([[[[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.2, 0.8]]]], np.float32))
    found = tempered(logits, np.array([[0.75, 0.25]], np.float32), 2.0)
    expected = 0.75 * (3 / 4 + 0.5) / 2 + 0.25 * (1 / 3)
    np.testing.assert_allclose(found[0], [expected, 1 - expected], rtol=1e-5)


def test_merged_labels_are_scored_as_one_and_left_out_ones_not_at_all() -> None:
    logits = np.log(np.array([0.2, 0.3, 0.1, 0.4], np.float32))[None, None, None]
    fold = np.array([[1, 0, 0, 0], [0, 1, 1, 0]], np.float32)  # the last channel has no partner
    scan = {"logits": logits, "weights": np.ones((1, 1), np.float32), "fold": fold}
    np.testing.assert_allclose(folded(scan, 1.0), [[1 / 3, 2 / 3]], rtol=1e-5)


def test_calibration_error_is_zero_where_confidence_is_right() -> None:
    confidence = np.repeat([0.8, 0.6], 10)
    correct = np.array([True] * 8 + [False] * 2 + [True] * 6 + [False] * 4)
    assert calibration_error(confidence, correct) == pytest.approx(0)
    assert calibration_error(np.ones(10), np.arange(10) < 7) == pytest.approx(0.3)
    assert calibration_error(np.repeat([0.9, 0.5], [30, 10]), np.repeat([False, True], [30, 10])) \
        == pytest.approx((30 * 0.9 + 10 * 0.5) / 40)  # fmt: skip
    assert np.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))


@pytest.mark.parametrize("detail", [0, 3])
def test_the_card_softens_the_answer_and_leaves_the_frame_alone(detail: int) -> None:
    network = {"network": "unet", "features": [2, 4], "stem": 2, "detail": detail}
    card = small_card(networks={"segmenter": network}, strategy={"name": "sliding", "window": 16})
    torch.manual_seed(0)
    state = build(**network, out_channels=len(PROTOCOL)).state_dict()
    tensors = {f"segmenter.{key}": 40 * value for key, value in state.items()}
    image = np.random.default_rng(0).normal(size=(1, 16, 16, 16)).astype(np.float32)
    grid = Grid((16, 16, 16), np.eye(4))
    prepared = Prepared(torch.from_numpy(image), grid, Volume(image[0], grid), np.eye(4), True, ())
    hot = replace(card, calibration=Calibration("made up", {"aseg": 2.0}))
    asked = {}
    for name, one in (("cold", card), ("hot", hot)):
        model = load_model(one, tensors)
        both = (segment(model, prepared, Ask(fine=fine)) for fine in (True, False))
        asked[name] = [np.asarray(one.probabilities) for one in both]
    cold = asked["cold"][0].astype(np.float64)
    expected = np.sqrt(cold) / np.sqrt(cold).sum(axis=0)
    assert np.abs(expected - cold).max() > 0.05
    other = np.abs(asked["hot"][0] - expected) > 4e-3  # of another voxel the model is sure then
    assert other.mean() < 1e-3
    np.testing.assert_array_equal(asked["hot"][1], asked["cold"][1])


# Predicted Dice ----------------------------------------------------------------------------------
def doubtful(random: np.random.Generator, offsets: np.ndarray, subjects: int) -> pd.DataFrame:
    """Two scans of each subject; the true Dice is the expected one, moved, give or take 0.06."""
    rows = []
    for number, offset in enumerate(offsets):
        for subject, error in enumerate(random.normal(0, 0.06, subjects)):
            for expected in random.uniform(0.6, 0.8, 2):
                rows.append((f"S{number}", subject, expected, expected + offset + error))
    return pd.DataFrame(rows, columns=["structure", "subject", "expected", "dice"])


def test_offsets_are_found_again() -> None:
    random = np.random.default_rng(0)
    offsets = np.array([0.1, -0.2, 0.15, 0.0])
    table = doubtful(random, offsets, 400)
    table.loc[len(table)] = ["S0", 1, np.nan, 0.0]
    np.testing.assert_allclose(list(fit_dice(table).values()), offsets, atol=0.01)


@pytest.mark.parametrize("spread", [0.0, 0.05, 0.3])
def test_few_subjects_are_not_taken_at_their_word(spread: float) -> None:
    """Nearer to the truth than the means of few subjects, on average, however structures differ."""
    random = np.random.default_rng(0)
    errors = []
    for _ in range(60):
        offsets = random.normal(-0.05, spread, 30)
        table = doubtful(random, offsets, 3)
        means = (table["dice"] - table["expected"]).groupby(table["structure"], sort=False).mean()
        found = pd.Series(fit_dice(table))[means.index]
        errors.append([np.mean((one - offsets) ** 2) for one in (found, means)])
    drawn, plain = np.mean(errors, axis=0)
    assert drawn < (plain if spread < 0.2 else 1.02 * plain)
    assert spread or drawn < 0.25 * plain


def test_one_subject_or_one_structure_is_enough_for_an_offset() -> None:
    alone = doubtful(np.random.default_rng(0), np.array([0.1, 0.2]), 1)
    means = (alone["dice"] - alone["expected"]).groupby(alone["structure"]).mean()
    assert fit_dice(alone) == pytest.approx(means.to_dict())
    single = doubtful(np.random.default_rng(0), np.array([0.1]), 5)
    mean = (single["dice"] - single["expected"]).mean()
    assert fit_dice(single) == {"S0": pytest.approx(mean)}


def test_predicted_dice_follows_the_card_on_both_sides() -> None:
    expected = np.full(len(PROTOCOL), 0.8)
    found = predicted_dice(expected, PROTOCOL, GIVEN)
    np.testing.assert_allclose(found[THALAMI], 0.9)
    known = [channel for channel, name in enumerate(SHORT) if name in ("THA", "CAU")]
    assert len(THALAMI) == 2
    assert np.flatnonzero(np.isfinite(found)).tolist() == known
    np.testing.assert_array_equal(predicted_dice(expected, PROTOCOL, Calibration()), expected)
    high = replace(GIVEN, dice_offset={"THA": 0.9})
    assert predicted_dice(expected, PROTOCOL, high)[THALAMI[0]] == 1


@pytest.mark.parametrize("protocol", ["aseg", "braincolor"])
def test_left_and_right_share_a_name_and_nothing_else_does(protocol: str) -> None:
    given = load_protocol(protocol)
    names = structures(given)
    for channel, name in enumerate(names):
        same = {c for c, other in enumerate(names) if other == name}
        assert same == {channel, int(given.mirror[channel])}


# Intervals ---------------------------------------------------------------------------------------
def volumes(random: np.random.Generator, subjects: int) -> pd.DataFrame:
    """Two scans of each subject; the reference is 10 % larger, give or take 15 %."""
    soft = random.uniform(2000, 6000, 2 * subjects)
    error = np.repeat(random.normal(0, 0.15, subjects), 2)  # a subject's scans err alike
    return pd.DataFrame({
        "structure": "THA", "subject": np.repeat(np.arange(subjects), 2), "soft_mm3": soft,
        "reference_mm3": soft * 1.1 * np.exp(error),
    })  # fmt: skip


@pytest.mark.parametrize("subjects", [4, 12])
def test_an_interval_holds_as_often_as_it_says(subjects: int) -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        low, high = fit_intervals(volumes(random, subjects), 0.9)
        new = volumes(random, 5)
        ratio = new["reference_mm3"] / new["soft_mm3"]
        held.append(ratio.between(low["THA"], high["THA"]).mean())
    assert np.mean(held) == pytest.approx(0.9, abs=0.04)


def test_too_few_subjects_give_no_interval() -> None:
    few = volumes(np.random.default_rng(0), 2)
    assert fit_intervals(few, 0.9) == ({}, {})
    absent = volumes(np.random.default_rng(0), 4).assign(reference_mm3=0.0)
    assert fit_intervals(absent, 0.9) == ({}, {})


def test_an_interval_is_a_share_of_the_soft_volume() -> None:
    soft = np.full(len(PROTOCOL), 1000.0)
    low, high = volume_interval(soft, PROTOCOL, GIVEN)
    np.testing.assert_allclose(low[THALAMI], 900)
    np.testing.assert_allclose(high[THALAMI], 1200)
    assert np.isnan(np.delete(low, THALAMI)).all()
    assert np.isnan(np.delete(high, THALAMI)).all()


# In the card -------------------------------------------------------------------------------------
def test_a_card_keeps_its_calibration(tmp_path: Path) -> None:
    plain = small_card()
    card = replace(plain, calibration=GIVEN)
    write_card(card, tmp_path / "small.toml")
    assert read_card(tmp_path / "small.toml").calibration == GIVEN
    assert digest(card) != digest(plain)
    write_card(plain, tmp_path / "plain.toml")
    assert "calibration" not in (tmp_path / "plain.toml").read_text()
    assert not read_card(tmp_path / "plain.toml").calibration
    assert read_card(tmp_path / "plain.toml").calibration.of_head("aseg") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": {"infant": 1.0}}, "temperature for 'infant', and the heads are aseg.*"
         "small.*temperature.*calibrate.py"),
        ({"temperature": {"aseg": 0.0}}, "0.0 is not between 0.2 and 5.*temperature.aseg"),
        ({"temperature": {"aseg": "hot"}}, "'hot' is not between.*temperature.aseg"),
        ({"level": 90}, "90 is not between 0.5 and 0.999.*level"),
        ({"dice_offset": {"L-THA": 0.1}}, "no structure 'L-THA'.*dice_offset.*without the side"),
        ({"dice_offset": {"THA": float("nan")}}, "nan is not between.*dice_offset.THA"),
        ({"volume_high": {}}, "only one end is given for THA.*volume_low and volume_high"),
        ({"volume_low": {"THA": 2.0}}, "interval of 'THA' runs from 2 to 1.2.*smaller number"),
        ({"how": " "}, "nothing says how it was fitted.*how.*calibrate.py"),
    ],
)  # fmt: skip
def test_a_calibration_that_makes_no_sense_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        check_card(small_card(calibration=replace(GIVEN, **changes)))


def test_an_unknown_key_of_the_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    write_card(replace(small_card(), calibration=GIVEN), path)
    path.write_text(path.read_text().replace("level", "bevel"))
    with pytest.raises(DataError, match=r"unknown: bevel.*\[calibration\].*level"):
        read_card(path)

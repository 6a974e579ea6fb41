"""How good a scan is, whether its labels can be, and the verdict."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from phantom import PROTOCOL, Phantom, grid_over
from scipy import ndimage
from test_postprocess import one_hot, truth

from tlseg_bids.bids.metadata import column_texts
from tlseg_bids.bids.scan import Age
from tlseg_bids.flow import Prediction, Segmentation
from tlseg_bids.labels.landmarks import BoxAtlas
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.postprocess import to_native
from tlseg_bids.postprocess.image_quality import (
    cut_mm2,
    explained,
    haar_noise,
    image_quality,
    smoothness_mm,
)
from tlseg_bids.postprocess.judgement import (
    LEVELS,
    NAMED,
    RULES,
    assess,
    cut_structures,
    judge,
)
from tlseg_bids.postprocess.plausibility import (
    euler_number,
    expected_brain_mm3,
    judged_age_years,
    turned_degrees,
)
from tlseg_bids.postprocess.references import compare, load_references
from tlseg_bids.volume import Grid, Volume

SMALL = Phantom(0.6)
GRID = grid_over(SMALL, (2, 2, 2))
LABELS = SMALL.labels(GRID).data
MASK = LABELS > 0
INDEX = {name: int(i) for name, i in zip(PROTOCOL.table["name"], PROTOCOL.indices, strict=True)}


def image(noise: float = 0.0) -> np.ndarray:
    """White matter 100, everything else in the brain 60, and noise."""
    white = np.isin(LABELS, PROTOCOL.indices[PROTOCOL.channels(group="white-matter")])
    clean = np.where(white, 100.0, np.where(MASK, 60.0, 0.0))
    return (clean + noise * np.random.default_rng(0).standard_normal(LABELS.shape)).astype("f4")


def scores(data: np.ndarray) -> dict[str, float]:
    return image_quality(Volume(data, GRID), LABELS, MASK, PROTOCOL)


def test_noise_is_found_with_its_standard_deviation_whatever_the_contrast() -> None:
    found = scores(image(noise=5.0))
    assert found["snr"] == pytest.approx(20, rel=0.05)
    assert found["cnr"] == pytest.approx(8, rel=0.05)
    inverted = scores(160 - image(noise=5.0))
    assert inverted["cnr"] == pytest.approx(found["cnr"], rel=0.01)


def test_scores_do_not_depend_on_the_unit_of_the_image() -> None:
    one, other = scores(image(3.0)), scores(1000 * image(3.0))
    assert other == pytest.approx(one, rel=1e-3)


def test_intensities_around_zero_have_no_signal_to_noise_and_are_not_called_noisy() -> None:
    plain = image(noise=3.0)
    standardised = np.where(MASK, (plain - plain[MASK].mean()) / plain[MASK].std(), 0)
    found = scores(standardised.astype("f4"))
    assert found.keys() == scores(plain).keys() - {"snr"}
    assert judge(found, (), ()) == ("use", ())
    ringing = np.where(MASK & (np.random.default_rng(2).random(MASK.shape) < 0.05), -1.0, plain)
    assert "snr" in scores(ringing.astype("f4"))


def test_noise_of_a_plane_is_not_mistaken_for_noise_and_a_direction_shows() -> None:
    ramp = np.arange(30.0)[:, None, None] + np.arange(20.0)[:, None] + np.arange(10.0)
    every = np.ones(ramp.shape, bool)
    assert haar_noise(ramp, every, (0, 1, 2)) == pytest.approx(0, abs=1e-9)
    striped = ramp + 3 * (-1.0) ** np.arange(30)[:, None, None]
    assert haar_noise(striped, every, (0,)) > 3 * haar_noise(striped, every, (1,))


@pytest.mark.parametrize("fwhm_mm", [4.0, 7.0])
def test_smoothness_is_the_width_of_the_kernel_that_made_it(fwhm_mm: float) -> None:
    white = np.random.default_rng(1).standard_normal((60, 60, 60))
    spacing = np.array([1.0, 1.0, 2.0])
    sigma = fwhm_mm / np.sqrt(8 * np.log(2)) / spacing
    smooth = ndimage.gaussian_filter(white, sigma, mode="wrap")
    found = smoothness_mm(smooth, np.ones(smooth.shape, bool), spacing)
    # neighbours of a smoothed field are correlated as the kernel convolved with itself
    np.testing.assert_allclose(found[:2], fwhm_mm, rtol=0.05)


def test_labels_explain_the_image_that_they_were_drawn_from_and_no_other() -> None:
    assert scores(image(2.0))["explained"] > 0.95
    moved = np.roll(image(2.0), (9, 9, 9), (0, 1, 2))
    assert scores(moved)["explained"] < 0.3
    assert explained(np.array([1.0, 1, 2, 2]), np.array([7, 7, 9, 9])) == pytest.approx(1)
    assert explained(np.ones(4), np.array([7, 7, 9, 9])) == 0


def test_the_area_of_a_cut_is_that_of_the_largest_face() -> None:
    mask = np.zeros((10, 10, 10), bool)
    mask[:5, 2:6, 2:7] = True
    assert cut_mm2(mask, np.array([1.0, 2.0, 3.0])) == 4 * 5 * 6
    assert cut_mm2(mask[1:-5, 1:, 1:], np.array([1.0, 2.0, 3.0])) == 4 * 5 * 6
    assert cut_mm2(np.pad(mask, 1), np.array([1.0, 2.0, 3.0])) == 0


def test_an_image_without_tissue_has_only_the_scores_that_need_none() -> None:
    nothing = image_quality(Volume(image(), GRID), np.zeros_like(LABELS), MASK, PROTOCOL)
    assert set(nothing) == {"cut_mm2"}


def test_euler_number_counts_pieces_handles_and_cavities() -> None:
    cube = np.zeros((9, 9, 9), bool)
    cube[2:7, 2:7, 2:7] = True
    assert euler_number(cube) == 1
    holed = cube.copy()
    holed[4, 4, 4] = False
    assert euler_number(holed) == 2
    holed[4, 4, :] = False
    assert euler_number(holed) == 0
    cube[0, 0, 0] = True
    assert euler_number(cube) == 2


def test_expected_brain_volume_follows_its_sources() -> None:
    assert expected_brain_mm3(0) == pytest.approx(341e3)
    assert expected_brain_mm3(90 / 365.25) / expected_brain_mm3(0) == pytest.approx(1.64)
    assert expected_brain_mm3(26 / 12) / expected_brain_mm3(1) == pytest.approx(1.15)
    assert expected_brain_mm3(14) / expected_brain_mm3(26 / 12) == pytest.approx(1.26)
    assert expected_brain_mm3(80) == expected_brain_mm3(75.5)
    ages = np.linspace(0, 14, 50)
    assert (np.diff([expected_brain_mm3(age) for age in ages]) > 0).all()


def test_a_preterm_brain_is_judged_by_its_age_since_term() -> None:
    assert judged_age_years(Age(pma_weeks=28.0)) is None
    assert judged_age_years(Age(days=7.0, pma_weeks=39.9)) is None
    assert judged_age_years(Age(days=98.0, pma_weeks=40.0)) == 0
    assert expected_brain_mm3(judged_age_years(Age(98.0, 40.0))) == pytest.approx(341e3)
    assert judged_age_years(Age(pma_weeks=40 + 365.25 / 7)) == pytest.approx(1)
    assert judged_age_years(Age(days=365.25 * 3, pma_weeks=182.5)) == pytest.approx(3)
    assert judged_age_years(Age(days=30.0)) == pytest.approx(30 / 365.25)
    assert judged_age_years(Age()) is None


@pytest.mark.parametrize("angle", [0, 30, 90, 180])
def test_a_turned_head_is_measured_whatever_the_size_of_the_brain(angle: float) -> None:
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turn = np.array([[1, 0, 0, 5], [0, c, -s, 2], [0, s, c, 1], [0, 0, 0, 1.0]])
    assert turned_degrees(np.diag([1.2, 1.1, 0.9, 1]) @ turn) == pytest.approx(angle, abs=8)
    assert turned_degrees(turn) == pytest.approx(angle, abs=1e-5)


GOOD = {
    "snr": 40.0, "explained": 0.6, "cut_mm2": 0.0, "brain_by_age": 0.1,
    "expected_dice": 0.8, "brain_mm3": 1.2e6, "expected_brain_mm3": 1.3e6,
}  # fmt: skip


def test_a_good_scan_is_used_and_unknown_scores_are_no_reason() -> None:
    assert judge(GOOD, (), ()) == ("use", ())
    assert judge({}, (), ()) == ("use", ())
    assert judge({**GOOD, "snr": math.nan}, (), ()) == ("use", ())


def test_flags_and_warnings_are_reasons_to_look() -> None:
    level, reasons = judge(GOOD, ("Not found: Left amygdala.",), ("voxels of 1 × 1 × 6 mm",))
    assert level == "look"
    assert reasons == ("Not found: Left amygdala.", "voxels of 1 × 1 × 6 mm")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.score)
def test_every_rule_has_its_two_sides(rule) -> None:
    for beyond, level in ((-0.01, "use"), (0.01, "look")):
        value = rule.look + rule.sign * beyond * max(rule.look, 1)
        assert judge({**GOOD, rule.score: value}, (), ())[0] == level
    if rule.exclude is not None:
        value = rule.exclude + rule.sign * 0.01
        assert judge({**GOOD, rule.score: value}, (), ())[0] == "exclude"


def test_the_gravest_reason_comes_first_and_says_what_to_check() -> None:
    qc = {**GOOD, "brain_mm3": 1.3e6, "expected_brain_mm3": 5e5, "brain_by_age": math.log(2.6)}
    level, reasons = judge(qc, ("The model is unsure.",), ())
    assert level == "exclude"
    assert reasons[0] == (
        "The brain is 2.6 times larger than at this age: check age and voxel size."
    )
    assert judge({**GOOD, "snr": 6.0}, (), ())[1] == (
        "The image is noisy: signal to noise 6.0, 15 expected.",
    )


def test_assessing_adds_scores_and_a_verdict_and_leaves_the_labels() -> None:
    prediction = Prediction(one_hot(truth()).astype(np.float16), GRID)
    before = to_native(prediction, Volume(np.zeros(0), GRID), PROTOCOL)
    scan = Volume(image(2.0), GRID)
    after = assess(before, scan, PROTOCOL, np.eye(4), 0.05, ("odd",))
    assert after.labels is before.labels
    assert after.verdict in LEVELS
    assert "odd" in after.reasons
    assert {"snr", "turned_degrees", "brain_euler_number", "brain_by_age"} <= set(after.qc)
    assert set(column_texts(after.volumes)) == set(after.volumes), "every column is described"
    assert "brain_by_age" not in assess(before, scan, PROTOCOL, np.eye(4), None).qc
    assert all(math.isfinite(value) for name, value in after.qc.items() if name in GOOD)


def cut_at(first: int) -> Segmentation:
    """What is found in a scan that begins at a slice, by a model whose atlas is the truth."""
    atlas = BoxAtlas(one_hot(truth()), box_of(GRID))
    affine = GRID.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    scan = Volume(
        image(2.0)[..., first:].copy(), Grid((*GRID.shape[:2], GRID.shape[2] - first), affine)
    )
    found = to_native(Prediction(one_hot(truth()).astype(np.float16), GRID), scan, PROTOCOL)
    return assess(found, scan, PROTOCOL, np.eye(4), None, (), atlas)


def box_of(grid: Grid) -> np.ndarray:
    """[low, high] of a grid along the axes of the world, to which it is parallel."""
    corners = grid.affine[:3, :3] @ np.array([[-0.5] * 3, np.array(grid.shape) - 0.5]).T
    return np.sort(corners + grid.affine[:3, 3:], axis=1)


def test_structures_that_a_scan_cuts_are_named_with_the_share_that_is_missing() -> None:
    thalamus = INDEX["Left thalamus"]
    first = int(np.argwhere(thalamus == LABELS)[:, 2].mean())
    whole, cut = cut_at(0), cut_at(first)
    assert whole.volumes["cut_share"].max() < 0.01
    assert not [flag for flag in whole.flags if "ends before" in flag]
    every = one_hot(truth())[1:]
    with np.errstate(invalid="ignore"):
        missing = 1 - every[..., first:].sum((1, 2, 3)) / every.sum((1, 2, 3))
    np.testing.assert_allclose(cut.volumes["cut_share"], missing, atol=1e-3)
    told = next(flag for flag in cut.flags if "The scan ends before" in flag)
    assert "brain stem (100%)" in told and "expected beyond its faces" in told
    assert "cerebrospinal fluid" not in told
    assert cut.verdict != "use" and told in cut.reasons


def test_without_an_atlas_nothing_is_said_to_be_cut() -> None:
    found = to_native(
        Prediction(one_hot(truth()).astype(np.float16), GRID), Volume(np.zeros(0), GRID), PROTOCOL
    )
    after = assess(found, Volume(image(2.0), GRID), PROTOCOL, np.eye(4), None)
    assert after.volumes["cut_share"].isna().all()
    assert not [flag for flag in after.flags if "ends before" in flag]


def test_many_cut_structures_are_counted_after_the_worst() -> None:
    table = pd.DataFrame({
        "index": PROTOCOL.indices[1:], "name": PROTOCOL.table["name"][1:],
        "cut_share": np.linspace(0.9, 0.5, len(PROTOCOL) - 1),
    })  # fmt: skip
    told = cut_structures(table, PROTOCOL)[0]
    around = len(PROTOCOL.channels(group="outer-csf"))
    assert f"and {len(PROTOCOL) - 1 - around - NAMED} more do" in told


# Usual at an age ---------------------------------------------------------------------------------


def usual(group: str, age: float) -> tuple[pd.DataFrame, float, float]:
    """A brain of 1.2 l whose structures have the mean share of a group."""
    known = load_references()
    known = known[known["group"] == group]
    table = load_protocol("aseg").table.set_index("index").loc[known["index"], ["name"]]
    mm3 = 1.2e6 * np.exp(known["log_share"].to_numpy())
    return table.assign(hard_mm3=mm3).reset_index(), 1.2e6, age


@pytest.mark.parametrize("group", load_references()["group"].unique())
def test_usual_volumes_are_no_reason_and_score_about_nought(group: str) -> None:
    young = load_references().set_index("group").loc[group, "youngest"].iloc[0]
    scores, said = compare(*usual(group, young), load_protocol("aseg"))
    assert said == ()
    assert scores["volume_z"].abs().max() == pytest.approx(0, abs=1e-9)
    assert scores["side_z"].abs().max() < 3


def test_a_structure_a_fifth_as_large_and_a_side_twice_the_other_are_told() -> None:
    table, brain, age = usual("adults of 19 to 34 years", 25.0)
    for index, factor in ((53, 0.2), (10, 0.4)):
        table.loc[table["index"] == index, "hard_mm3"] *= factor
    scores, said = compare(table, brain, age, load_protocol("aseg"))
    assert said == (
        "Right hippocampus: 0.2 times the share of the brain that is usual in adults of 19 to 34 "
        "years.",
        "Left and right thalamus differ as is unusual in adults of 19 to 34 years.",
        "Left and right hippocampus differ as is unusual in adults of 19 to 34 years.",
    )
    assert scores.loc[53, "volume_z"] < -5
    assert scores.loc[10, "side_z"] > 4


def test_without_age_group_or_protocol_nothing_is_compared() -> None:
    table, brain, _ = usual("adults of 19 to 34 years", 25.0)
    for age, protocol in ((None, "aseg"), (70.0, "aseg"), (25.0, "braincolor")):
        scores, said = compare(table, brain, age, load_protocol(protocol))
        assert scores.empty
        assert said == ()

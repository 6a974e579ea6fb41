"""From probabilities to a segmentation: pieces, holes, volumes, scores and flags."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phantom import PROTOCOL, Phantom, grid_over
from scipy import ndimage

from tlseg_bids.flow import Prediction, SharedRows
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.postprocess import (
    ProbabilityField,
    probability_maps,
    resample_probabilities,
    to_native,
)
from tlseg_bids.postprocess.quality import implausible, intracranial
from tlseg_bids.postprocess.references import widest_side
from tlseg_bids.preprocess.geometry import resample
from tlseg_bids.volume import Grid, Volume
from tlseg_bids.zoo.calibration import Calibration, structures

SMALL = Phantom(0.6)
GRID = grid_over(SMALL, (2, 2, 2))
CHANNEL = {int(label): c for c, label in enumerate(PROTOCOL.indices)}


def channel(name: str) -> int:
    return int(np.flatnonzero(PROTOCOL.table["name"] == name)[0])


def label(name: str) -> int:
    return int(PROTOCOL.indices[channel(name)])


def one_hot(channels: np.ndarray, sure: float = 0.9) -> np.ndarray:
    """Probability `sure` for the given channel, the rest for the cortex of the left."""
    out = np.zeros((len(PROTOCOL), *channels.shape), np.float32)
    rest = np.where(channels == channel("Left cerebral cortex"), 0, channel("Left cerebral cortex"))
    np.put_along_axis(out, rest[None], 1 - sure, axis=0)
    np.put_along_axis(out, channels[None], sure, axis=0)
    return out


def segment(channels: np.ndarray, grid: Grid = GRID, native: Grid | None = None):
    native = native or grid
    scan = Volume(np.zeros(0), native)
    return to_native(Prediction(one_hot(channels).astype(np.float16), grid), scan, PROTOCOL)


def truth() -> np.ndarray:
    labels = SMALL.labels(GRID).data
    return np.vectorize(CHANNEL.get)(labels)


def place(name: str) -> tuple[int, int, int]:
    """A voxel in the middle of a structure."""
    return tuple(int(n) for n in np.argwhere(truth() == channel(name)).mean(axis=0).round())


def around(where: tuple[int, int, int], reach: int = 0) -> tuple[slice, ...]:
    return tuple(slice(n - reach, n + reach + 1) for n in where)


def test_labels_come_back_unchanged_on_the_same_grid() -> None:
    result = segment(truth())
    np.testing.assert_array_equal(result.labels.data, SMALL.labels(GRID).data)
    assert result.labels.data.dtype == np.int16
    assert result.confidence.dtype == np.uint8
    assert set(np.unique(result.confidence[result.labels.data > 0])) == {
        round(float(np.float16(0.9)) * 255)
    }
    assert result.qc["pieces_removed"] == 0


def test_a_stray_piece_goes_to_the_next_most_probable_structure() -> None:
    channels = truth()
    where = place("Right cerebral white matter")
    stray = (where[0], where[1] + 12, where[2])
    assert channels[stray] == channel("Right cerebral white matter")
    field = one_hot(channels)
    field[(slice(None), *stray)] = 0
    field[(channel("Left hippocampus"), *stray)] = 0.6
    field[(channel("Right cerebral white matter"), *stray)] = 0.4
    result = to_native(Prediction(field, GRID), Volume(np.zeros(0), GRID), PROTOCOL)
    assert result.labels.data[stray] == label("Right cerebral white matter")
    assert result.confidence[stray] == round(0.4 * 255)
    assert result.qc["pieces_removed"] == 1


def test_a_stray_piece_whose_next_best_is_stray_takes_its_surroundings() -> None:
    channels = truth()
    where = place("Right cerebral white matter")
    stray = around((where[0], where[1] + 12, where[2]), 1)
    field = one_hot(channels)
    field[(slice(None), *stray)] = 0
    field[(channel("Left hippocampus"), *stray)] = 0.6
    field[(channel("Left putamen"), *stray)] = 0.4
    result = to_native(Prediction(field, GRID), Volume(np.zeros(0), GRID), PROTOCOL)
    assert (result.labels.data[stray] == label("Right cerebral white matter")).all()


def test_a_second_large_piece_of_a_spread_structure_stays() -> None:
    channels = truth()
    cortex = channel("Right cerebral cortex")
    keep = np.zeros(channels.shape, bool)
    middle = place("Right cerebral cortex")[1]
    channels[:, middle - 1 : middle + 2][channels[:, middle - 1 : middle + 2] == cortex] = channel(
        "Right cerebral white matter"
    )
    keep[channels == cortex] = True
    result = segment(channels)
    assert (result.labels.data[keep] == label("Right cerebral cortex")).mean() > 0.99


def test_a_piece_far_from_the_brain_becomes_background() -> None:
    channels = truth()
    channels[0:2, 0:2, 0:2] = channel("Left cerebral cortex")
    result = segment(channels)
    assert (result.labels.data[0:2, 0:2, 0:2] == 0).all()
    assert not result.brain_mask[0:2, 0:2, 0:2].any()
    np.testing.assert_array_equal(result.labels.data, SMALL.labels(GRID).data)


def test_a_hole_is_closed_with_the_next_most_probable_structure() -> None:
    channels = truth()
    where = around(place("Left thalamus"))
    field = one_hot(channels)
    field[(slice(None), *where)] = 0
    field[(0, *where)] = 0.7
    field[(channel("Left thalamus"), *where)] = 0.3
    result = to_native(Prediction(field, GRID), Volume(np.zeros(0), GRID), PROTOCOL)
    np.testing.assert_array_equal(result.labels.data, SMALL.labels(GRID).data)
    assert result.confidence[where].item() == round(0.3 * 255)


def test_a_large_hole_stays_in_the_labels_but_not_in_the_mask() -> None:
    channels = truth()
    hole = around(place("Left cerebral white matter"), 6)
    channels[hole] = 0
    result = segment(channels)
    assert (result.labels.data[hole] == 0).all()
    assert result.brain_mask[hole].all()


def test_volumes_have_a_row_per_structure_and_exact_millimetres() -> None:
    native = grid_over(SMALL, (1.0, 1.5, 2.0))
    answer = SMALL.probabilities(GRID, sub=4)
    result = to_native(Prediction(answer, GRID), Volume(np.zeros(0), native), PROTOCOL)
    table = result.volumes.set_index("index")
    assert list(table.index) == [int(i) for i in PROTOCOL.indices[1:]]
    for number, exact in SMALL.exact_mm3().items():
        assert table.loc[number, "soft_mm3"] == pytest.approx(exact, rel=0.03)
        assert table.loc[number, "hard_mm3"] == pytest.approx(exact, rel=0.15)
        assert table.loc[number, "hard_mm3"] == pytest.approx(table.loc[number, "voxels"] * 3)
        assert 0 < table.loc[number, "mean_confidence"] <= 1
    absent = table.loc[label("Left amygdala")]
    assert (absent[["hard_mm3", "soft_mm3", "voxels"]] == 0).all()
    assert absent[["mean_confidence", "predicted_dice"]].isna().all()


def test_predicted_dice_is_one_where_all_is_certain_and_falls_with_doubt() -> None:
    sure = to_native(
        Prediction(one_hot(truth(), 1.0), GRID), Volume(np.zeros(0), GRID), PROTOCOL
    ).volumes
    doubt = segment(truth()).volumes
    present = sure["voxels"] > 0
    np.testing.assert_allclose(sure.loc[present, "predicted_dice"], 1, atol=1e-3)
    putamen = doubt["index"] == label("Left putamen")
    assert doubt.loc[putamen, "predicted_dice"].item() == pytest.approx(1.8 / 1.9, abs=0.01)


def test_quality_and_flags_of_a_good_scan() -> None:
    result = segment(truth())
    mask = result.brain_mask.sum() * GRID.voxel_mm3
    assert result.qc["brain_mm3"] == pytest.approx(mask)
    assert result.qc["mean_confidence"] == pytest.approx(0.9, abs=0.01)
    assert result.qc["fov_border_share"] == 0
    assert result.qc["model_border_share"] == 0
    assert not any("ends inside the brain" in flag for flag in result.flags)


def test_a_scan_that_cuts_the_brain_is_flagged() -> None:
    shape = (*GRID.shape[:2], GRID.shape[2] // 2)
    result = segment(truth(), native=Grid(shape, GRID.affine))
    assert result.qc["fov_border_share"] > 0.01
    assert any("The scan ends inside the brain" in flag for flag in result.flags)


def test_fluid_at_the_border_of_a_scan_is_no_cut_brain() -> None:
    fluid = load_protocol("aseg").channels(group="outer-csf")[0]
    channels = np.full(GRID.shape, fluid)
    half = GRID.shape[2] // 2
    result = segment(channels[:, :, :half], Grid((*GRID.shape[:2], half), GRID.affine))
    assert result.qc["fov_border_share"] == 0
    assert result.qc["head_border_share"] > 0.01
    assert not any("ends inside the brain" in flag for flag in result.flags)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("Left lateral ventricle", 0.5, 0.7), ("Left accumbens area", 0.3, 0.5),
     ("Left thalamus", 0.0, 0.1), ("Left unheard of", 0.0, 0.0)],
)  # fmt: skip
def test_how_uneven_the_sides_of_the_references_are(name, least, most) -> None:
    assert least <= widest_side(name) <= most


def test_a_brain_at_the_edge_of_the_model_is_flagged() -> None:
    half = GRID.shape[2] // 2
    result = segment(truth()[:, :, :half], Grid((*GRID.shape[:2], half), GRID.affine), GRID)
    assert any("edge of the model's field of view" in flag for flag in result.flags)
    assert not result.labels.data[:, :, half + 1 :].any()


def test_asymmetry_is_flagged() -> None:
    channels = truth()
    putamen = np.argwhere(channels == channel("Right putamen"))
    lost = putamen[putamen[:, 2] > np.median(putamen[:, 2])]
    channels[tuple(lost.T)] = channel("Right cerebral white matter")
    result = segment(channels)
    assert result.qc["asymmetry_max"] > 0.3
    assert any("Left and right putamen differ by" in flag for flag in result.flags)


def test_missing_structures_doubt_and_an_implausible_brain_are_flagged() -> None:
    flags = segment(truth()).flags
    assert any("Not found: " in flag and "Left amygdala" in flag for flag in flags)
    tiny = Phantom(0.3)
    grid = grid_over(tiny, (2, 2, 2))
    channels = np.vectorize(CHANNEL.get)(tiny.labels(grid).data)
    answer = one_hot(channels, 0.6)
    result = to_native(Prediction(answer, grid), Volume(np.zeros(0), grid), PROTOCOL)
    assert any("The brain has 0.03 l" in flag for flag in result.flags)
    assert any("The model is unsure" in flag for flag in result.flags)


def test_no_brain_at_all_is_said() -> None:
    result = segment(np.zeros((8, 8, 8), int), Grid((8, 8, 8), np.eye(4)))
    assert result.flags == ("No brain was found.",)
    assert not result.labels.data.any()
    assert not result.brain_mask.any()
    assert (result.volumes["hard_mm3"] == 0).all()


def in_a_skull(thickness: int = 3) -> np.ndarray:
    """The phantom with fluid all around it."""
    channels = truth()
    around_it = ndimage.binary_dilation(channels > 0, iterations=thickness) & (channels == 0)
    channels[around_it] = channel("Cerebrospinal fluid")
    return channels


def whole_head(channels: np.ndarray, grid: Grid = GRID, stripped: bool | None = False):
    answer = Prediction(one_hot(channels).astype(np.float16), grid)
    return to_native(answer, Volume(np.zeros(0), grid), PROTOCOL, skull_stripped=stripped)


def test_the_intracranial_volume_holds_brain_ventricles_and_fluid() -> None:
    channels = in_a_skull()
    result = whole_head(channels)
    brain = np.count_nonzero(truth()) * GRID.voxel_mm3
    assert brain == pytest.approx(sum(SMALL.exact_mm3().values()), rel=0.03)
    assert result.qc["icv_mm3"] == np.count_nonzero(channels) * GRID.voxel_mm3
    assert result.qc["brain_mm3"] == pytest.approx(brain)
    assert result.unmeasured == {}
    np.testing.assert_array_equal(result.brain_mask, channels > 0)


def test_the_intracranial_volume_does_not_lose_a_hole() -> None:
    channels = in_a_skull()
    hole = around(place("Left cerebral white matter"), 6)
    channels[hole] = 0
    result = whole_head(channels)
    filled = np.count_nonzero(in_a_skull()) * GRID.voxel_mm3
    assert result.qc["icv_mm3"] == pytest.approx(filled)


@pytest.mark.parametrize(
    ("stripped", "why"), [(True, "the scan is skull-stripped"), (None, "it is not known whether")]
)
def test_without_a_skull_there_is_no_intracranial_volume(stripped: bool | None, why: str) -> None:
    result = whole_head(in_a_skull(), stripped=stripped)
    assert "icv_mm3" not in result.qc
    assert result.unmeasured["icv_mm3"].startswith(why)
    assert result.qc["brain_mm3"] > 0


def test_a_cut_head_has_no_intracranial_volume() -> None:
    half = GRID.shape[2] // 2
    result = whole_head(in_a_skull()[:, :, :half], Grid((*GRID.shape[:2], half), GRID.affine))
    assert "ends inside the head" in result.unmeasured["icv_mm3"]


def test_labels_without_fluid_give_no_intracranial_volume() -> None:
    qc = {"head_border_share": 0.0}
    volume, why = intracranial(truth() > 0, qc, load_protocol("infant"), 1.0, False)
    assert volume is None
    assert "labels of 'infant' leave out the fluid" in why


def test_the_calibration_reaches_the_table() -> None:
    given = Calibration(
        "made up", {}, {"PUT": -0.1}, 0.9, {"PUT": 0.8, "AMY": 0.7}, {"PUT": 1.1, "AMY": 1.2}
    )
    answer = Prediction(one_hot(truth()).astype(np.float16), GRID)
    scan = Volume(np.zeros(0), GRID)
    plain = to_native(answer, scan, PROTOCOL).volumes.set_index("name")
    result = to_native(answer, scan, PROTOCOL, given)
    table = result.volumes.set_index("name")
    for name in ("Left putamen", "Right putamen"):
        row = table.loc[name]
        corrected = plain.loc[name, "predicted_dice"] - 0.1
        assert row["predicted_dice"] == pytest.approx(corrected)
        assert row["soft_low_mm3"] == pytest.approx(0.8 * row["soft_mm3"])
        assert row["soft_high_mm3"] == pytest.approx(1.1 * row["soft_mm3"])
    assert np.isnan(table.loc["Left amygdala", "predicted_dice"])
    assert table.loc["Left amygdala", "soft_low_mm3"] == 0
    others = table.loc["Left thalamus", ["predicted_dice", "soft_high_mm3"]].astype(float)
    assert np.isnan(others).all()
    assert result.qc["predicted_dice"] == pytest.approx(
        table.loc[["Left putamen", "Right putamen"], "predicted_dice"].mean()
    )
    assert result.qc["expected_dice"] == pytest.approx(plain["predicted_dice"].mean())
    assert plain["soft_low_mm3"].isna().all()


def test_doubt_about_everything_is_no_brain_whatever_the_calibration_says() -> None:
    confident = Calibration("made up", {}, dict.fromkeys(structures(PROTOCOL)[1:], 0.7))
    answer = Prediction(one_hot(truth(), 0.6).astype(np.float16), GRID)
    result = to_native(answer, Volume(np.zeros(0), GRID), PROTOCOL, confident)
    qc = {**result.qc, "expected_dice": 0.3, "brain_mm3": 1e6}
    assert result.qc["predicted_dice"] > 0.95
    assert "expected Dice 0.30, at least 0.45" in implausible(qc)
    assert implausible({**qc, "expected_dice": 0.7}) == ""


def test_a_weak_models_doubt_is_no_sign_against_a_brain() -> None:
    qc = {"expected_dice": 0.3, "brain_mm3": 1.2e6}
    assert implausible(qc, skill=0.5) == ""
    assert "expected Dice 0.30, at least 0.36" in implausible(qc, skill=0.8)
    assert "a brain has" in implausible({**qc, "brain_mm3": 5e6}, skill=0.1)


def test_channels_must_fit_the_protocol() -> None:
    answer = Prediction(np.ones((3, 4, 4, 4), np.float16), Grid((4, 4, 4), np.eye(4)))
    with pytest.raises(ValueError, match="3 channels for 33 labels of protocol 'aseg'"):
        to_native(answer, Volume(np.zeros(0), answer.grid), PROTOCOL)


def _random_field() -> tuple[np.ndarray, Grid, Grid]:
    random = np.random.default_rng(0)
    field = random.dirichlet(np.ones(4), size=(9, 8, 7)).astype(np.float32)
    field = np.moveaxis(field, -1, 0)
    affine = np.diag([2.0, -2, 2, 1])
    affine[:3, 3] = [-8, 7, -5]
    native = np.eye(4)
    native[:3, :3] = [[1.1, 0.2, 0], [-0.2, 1.0, 0.1], [0.05, -0.1, 1.3]]
    native[:3, 3] = [-11.0137, -10.0291, -9.0173]
    return field, Grid((9, 8, 7), affine), Grid((20, 19, 14), native)


def test_slabs_agree_with_plain_interpolation() -> None:
    """Every voxel, with background 1 outside the model's grid."""
    field, grid, native = _random_field()
    dense = np.zeros((4, *native.shape), np.float32)
    dense[0] = 1
    seen = np.zeros(native.shape, int)
    for voxels, probabilities in resample_probabilities(field, grid, native):
        dense.reshape(4, -1)[:, voxels] = probabilities.T
        seen.reshape(-1)[voxels] += 1
    assert seen.max() == 1
    for number, values in enumerate(field):
        fill = float(number == 0)
        expected = resample(Volume(values, grid), native, fill=fill)
        np.testing.assert_allclose(dense[number], expected, atol=1e-5)
    np.testing.assert_allclose(dense.sum(axis=0), 1, atol=1e-5)


def test_single_voxels_agree_with_slabs() -> None:
    field, grid, native = _random_field()
    asked = ProbabilityField(field, grid, native)
    for voxels, probabilities in asked.slabs():
        np.testing.assert_allclose(asked.at(voxels[::7]), probabilities[::7], atol=1e-6)


def test_voxels_that_are_skipped_are_certain_background() -> None:
    answer = SMALL.probabilities(GRID)
    field = ProbabilityField(answer, GRID, GRID)
    seen = np.zeros(GRID.shape, bool)
    for voxels, _ in field.slabs():
        seen.reshape(-1)[voxels] = True
    assert seen.mean() < 0.6
    assert (answer[0][~seen] > 0.998).all()


def test_a_thick_slice_takes_the_mean_of_what_lies_in_it() -> None:
    field = np.zeros((2, 4, 4, 8), np.float32)
    field[1, :, :, 3:5] = 1
    field[0] = 1 - field[1]
    grid = Grid((4, 4, 8), np.eye(4))
    thick = np.diag([1.0, 1, 4, 1])
    thick[2, 3] = 1.5
    found = ProbabilityField(field, grid, Grid((4, 4, 2), thick)).at(np.arange(32))
    np.testing.assert_allclose(found[:, 1], 0.25, atol=1e-6)


def test_shared_rows_are_the_array_that_they_stand_for() -> None:
    field, grid, native = _random_field()
    index = np.random.default_rng(1).integers(0, 40, grid.shape, np.int32)
    rows = np.ascontiguousarray(field.reshape(len(field), -1)[:, :40].T.astype(np.float16))
    shared = SharedRows(torch.from_numpy(rows), torch.from_numpy(index))
    dense = np.asarray(shared)
    assert dense.dtype == np.float16
    assert shared.shape == dense.shape == (len(field), *grid.shape)
    np.testing.assert_array_equal(dense[:, 1, 2, 3], rows[index[1, 2, 3]])
    for one in (shared, dense):
        np.testing.assert_array_equal(Prediction(one, grid).channel, dense.argmax(0))
    with pytest.raises(ValueError, match="only by being copied"):
        np.asarray(shared, copy=False)
    found = [list(ProbabilityField(one, grid, native).slabs()) for one in (shared, dense)]
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("shape", [(1, 5, 6), (5, 1, 6), (5, 6, 1)])
def test_an_answer_of_one_layer_is_read_as_it_is(shape: tuple[int, int, int]) -> None:
    field = np.random.default_rng(0).dirichlet(np.ones(3), shape).transpose(3, 0, 1, 2)
    grid = Grid(shape, np.eye(4))
    found = ProbabilityField(field.astype(np.float32), grid, grid).at(np.arange(30))
    np.testing.assert_allclose(found, field.reshape(3, -1).T, atol=1e-6)


def test_half_precision_is_enough() -> None:
    field, grid, native = _random_field()
    exact = ProbabilityField(field, grid, native).at(np.arange(2000))
    rough = ProbabilityField(field.astype(np.float16), grid, native).at(np.arange(2000))
    np.testing.assert_allclose(rough, exact, atol=2e-3)


def test_probability_maps_are_the_interpolated_channels() -> None:
    field, grid, native = _random_field()
    maps = list(probability_maps(field, grid, native))
    assert len(maps) == len(field)
    for number, (values, found) in enumerate(zip(field, maps, strict=True)):
        expected = resample(Volume(values, grid), native, fill=float(number == 0))
        np.testing.assert_allclose(found, expected, atol=0.5 / 255 + 1e-4)
    np.testing.assert_allclose(sum(maps), 1, atol=0.01)


def test_probability_maps_of_nothing_are_background() -> None:
    grid = Grid((4, 4, 4), np.eye(4))
    empty = np.zeros((3, 4, 4, 4), np.float16)
    empty[0] = 1
    background, *others = probability_maps(empty, grid, grid)
    assert (background == 1).all()
    assert not np.any(others)

"""Intensities to one range, and brains told from heads."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from phantom import Phantom, grid_over

from tlseg_bids.background import constant_background, from_zero
from tlseg_bids.preprocess import brain
from tlseg_bids.preprocess.brain import looks_skull_stripped, skull_evidence
from tlseg_bids.preprocess.intensity import (
    PERCENTILES,
    robust_scale,
    standard_landmarks,
    standardise,
)
from tlseg_bids.volume import Grid, Volume, load_volume

DATA = Path(os.environ.get("TLSEG_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def test_units_of_the_scanner_do_not_matter() -> None:
    image = np.random.default_rng(0).gamma(2, 100, size=(20, 20, 20))
    np.testing.assert_allclose(robust_scale(image), robust_scale(37 * image), atol=1e-5)
    assert robust_scale(image).min() == 0
    assert robust_scale(image).max() == 1


def test_outliers_do_not_set_the_range() -> None:
    image = np.random.default_rng(0).uniform(0, 1, size=(20, 20, 20))
    image[0, 0, 0] = 1e6
    assert robust_scale(image)[1:].std() > 0.25


def test_constant_background_is_left_out_and_becomes_zero() -> None:
    image = np.full((20, 20, 20), -50.0)
    image[5:15, 5:15, 5:15] = np.random.default_rng(0).uniform(100, 200, size=(10, 10, 10))
    scaled = robust_scale(image)
    assert constant_background(image) == -50
    assert (scaled[image == -50] == 0).all()
    assert np.median(scaled[5:15, 5:15, 5:15]) == pytest.approx(0.5, abs=0.05)


def test_noise_is_no_constant_background() -> None:
    assert constant_background(np.random.default_rng(0).normal(size=(20, 20, 20))) is None


def test_a_mask_decides_which_voxels_count() -> None:
    image = np.random.default_rng(0).uniform(0, 1, size=(20, 20, 20))
    image[:10] *= 1000
    mask = np.zeros(image.shape, bool)
    mask[10:] = True
    assert robust_scale(image, mask=mask)[10:].std() > 0.25


def noisy_head() -> Volume:
    """A ball of 300 in air with noise around 3."""
    places = np.indices((30, 30, 30)) - 14.5
    ball = 300.0 * ((places**2).sum(0) < 100)
    air = np.abs(np.random.default_rng(0).normal(3, 1, ball.shape))
    return Volume((ball + air).astype(np.float32), Grid(ball.shape, np.eye(4)))


@pytest.mark.parametrize("air", ["noise", "one value"])
@pytest.mark.parametrize("change", [lambda x: x + 1000, lambda x: x - 1024, lambda x: x / 50 - 3])
def test_a_background_elsewhere_than_at_zero_is_brought_there(air: str, change) -> None:
    head = noisy_head().data if air == "noise" else np.where(noisy_head().data > 50, 300, 0)
    moved = change(head.astype(np.float32))
    found = from_zero(moved)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.median(found[:4]), 0, atol=0.02 * np.ptp(moved))
    np.testing.assert_allclose(found - found.min(), moved - moved.min(), atol=1e-3)


def test_a_scan_whose_background_is_about_zero_stays_as_it_is() -> None:
    head = noisy_head().data
    assert from_zero(head) is head
    values = np.random.default_rng(1).normal(size=head.shape).astype(np.float32)
    brain = np.where(head > 50, values, np.float32(0))
    assert from_zero(brain) is brain, "standardised inside a mask: the background is 0"
    inside = head[10:20, 10:20, 10:20] + np.indices((10, 10, 10))[0]
    assert from_zero(inside) is inside, "a scan that ends inside the head shows no background"
    nothing = np.zeros((9, 9, 9), np.float32)
    assert from_zero(nothing) is nothing


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_constant_images_become_zero(value: float) -> None:
    assert (robust_scale(np.full((4, 4, 4), value)) == 0).all()


def _head(skull: bool) -> Volume:
    phantom = Phantom(1.0)
    grid = grid_over(phantom, (3, 3, 3), margin_mm=24)
    labels = phantom.labels(grid).data
    index = np.indices(grid.shape).reshape(3, -1)
    world = (grid.affine[:3, :3] @ index + grid.affine[:3, 3:]).reshape(3, *grid.shape)
    squares = ((world - np.array([0, 0, -5])[:, None, None, None]).T / [72, 84, 82]).T ** 2
    radius = np.sqrt(squares.sum(axis=0))
    image = np.where(radius < 0.9, 600.0, 0)
    if skull:
        image = np.where((radius >= 0.9) & (radius < 1.02), 60.0, image)
        image = np.where((radius >= 1.02) & (radius < 1.1), 900.0, image)
    image[(labels > 0) & (image == 600)] += 50
    return Volume(image.astype(np.float32), grid)


def test_a_dark_layer_under_the_skin_makes_a_head() -> None:
    """Both images lie in an empty field of view: only the layer tells them apart."""
    bare, head = skull_evidence(_head(skull=False)), skull_evidence(_head(skull=True))
    assert bare.is_stripped
    assert not head.is_stripped
    assert head.face_share == bare.face_share == 1
    assert head.darkest_layer < 0.3 < 0.6 < bare.darkest_layer


def test_air_with_noise_makes_a_head(monkeypatch) -> None:
    scan = _head(skull=False)
    noisy = scan.data + np.abs(np.random.default_rng(0).normal(0, 9, scan.data.shape))
    assert skull_evidence(Volume(noisy, scan.grid)).face_share < 0.5
    monkeypatch.setattr(brain, "_largest", lambda _: pytest.fail("the faces tell enough"))
    assert not looks_skull_stripped(Volume(noisy, scan.grid))


def test_what_is_larger_than_a_brain_is_not_filled(monkeypatch) -> None:
    """A whole head is, and its cavities take most of the time."""
    scan = _head(skull=False)
    large = Volume(scan.data, Grid(scan.grid.shape, scan.grid.affine @ np.diag([1.3] * 3 + [1])))
    assert skull_evidence(scan).litres < brain.MAX_LITRES < skull_evidence(large).litres
    monkeypatch.setattr(brain, "_filled", lambda _: pytest.fail("it is too large already"))
    assert not looks_skull_stripped(large)


def test_an_empty_scan_is_no_brain() -> None:
    empty = Volume(np.zeros((8, 8, 8), np.float32), Grid((8, 8, 8), np.eye(4)))
    assert not looks_skull_stripped(empty)


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real scans at {DATA}")
@pytest.mark.parametrize(
    ("pattern", "stripped"),
    [
        ("malc/sub-100*/anat/*_T1w.nii.gz", True),
        ("infant/sub-inf0[19]/anat/*_T?w.nii.gz", True),
        ("ages/sub-month00/anat/*_T?w.nii.gz", True),
        ("ms/sub-gd07/ses-gd/anat/*w.nii.gz", True),
        ("ms/sub-visit*/ses-*/anat/*.nii.gz", False),
        ("heads/sub-*/anat/*.nii.gz", False),
    ],
)
def test_real_scans(pattern: str, stripped: bool) -> None:
    files = sorted(DATA.glob(pattern))
    assert files
    for file in files:
        assert looks_skull_stripped(load_volume(file)) is stripped, file.name


def test_standard_scans_have_the_mean_histogram():
    rng = np.random.default_rng(0)
    scans = [np.r_[np.zeros(50), scale * rng.gamma(shape, 1.0, 5000) + 5] for scale, shape in
             ((1, 2), (300, 4), (20, 9))]  # fmt: skip
    landmarks = standard_landmarks(scans)
    assert landmarks[0] == 0 and landmarks[-1] == 1 and (np.diff(landmarks) > 0).all()
    for scan in scans:
        found = standardise(scan, landmarks)
        assert (found[:50] == 0).all() and found.dtype == np.float32
        inside = found[50:]
        middle = np.percentile(inside, PERCENTILES)[1:-1]
        np.testing.assert_allclose(middle, landmarks[1:-1], atol=1e-3)
        order = np.argsort(scan[50:])
        assert (np.diff(inside[order]) >= 0).all(), "no two intensities change places"
        assert inside.max() > 1, "what lies beyond the last landmark goes on"
        np.testing.assert_allclose(standardise(7 * scan, landmarks), found, atol=1e-4)
    assert (standardise(np.zeros((3, 3, 3)), landmarks) == 0).all()

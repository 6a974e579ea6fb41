"""One interpolation there and one back: a flip, a shift or a swapped spacing cannot hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from phantom import PROTOCOL, Phantom, grid_over, orientations, rotation
from scipy.ndimage import gaussian_filter1d, map_coordinates

from tlseg_bids.crew import ALONE
from tlseg_bids.flow import Prediction
from tlseg_bids.postprocess import to_native
from tlseg_bids.preprocess.geometry import (
    _interpolate,
    resample,
    thinned,
)
from tlseg_bids.volume import Grid, Volume

SMALL = Phantom(0.8)
MODEL = grid_over(SMALL, (2, 2, 2), rotation(6, -9, 12), offset=(0.7, -0.4, 0.3))
ANSWER = SMALL.probabilities(MODEL)
EMPTY = np.zeros(0)


def dice_by_label(found: np.ndarray, true: np.ndarray) -> dict[int, float]:
    return {
        label: 2 * np.sum((found == label) & (true == label))
        / (np.sum(found == label) + np.sum(true == label))
        for label in SMALL.exact_mm3()
    }  # fmt: skip


def worst_shift_mm(labels: np.ndarray, grid: Grid) -> float:
    """Largest distance of a structure's centroid from its true centre."""
    return max(
        np.linalg.norm(
            grid.affine[:3, :3] @ np.argwhere(labels == label).mean(axis=0)
            + grid.affine[:3, 3] - centre
        )
        for label, centre in SMALL.centres_mm().items()
    )  # fmt: skip


def round_trip(grid: Grid):
    return to_native(Prediction(ANSWER, MODEL), Volume(EMPTY, grid), PROTOCOL)


@pytest.mark.parametrize("number", range(48))
def test_back_in_every_orientation_oblique_and_anisotropic(number: int) -> None:
    """Labels, millimetres and volumes agree however the scan is stored."""
    axes = rotation(11, 7, -13) @ orientations()[number]
    grid = grid_over(SMALL, (1.3, 1.8, 2.2), axes, offset=(3, -2, 1))
    result = round_trip(grid)
    scores = dice_by_label(result.labels.data, SMALL.labels(grid).data)
    assert result.labels.grid == grid
    assert np.mean(list(scores.values())) > 0.95
    assert min(scores.values()) > 0.90
    assert worst_shift_mm(result.labels.data, grid) < 0.3
    soft = dict(zip(result.volumes["index"], result.volumes["soft_mm3"], strict=True))
    for label, exact in SMALL.exact_mm3().items():
        assert soft[label] == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("number", range(48))
def test_there_in_every_orientation_oblique_and_anisotropic(number: int) -> None:
    """The image on the model's grid is the phantom's, however the scan is stored."""
    phantom = Phantom(0.5)
    axes = rotation(-8, 12, 5) @ orientations()[number]
    scan = phantom.image(grid_over(phantom, (1.0, 1.2, 1.5), axes, offset=(2, 1, -3)), sub=1)
    model = grid_over(phantom, (2, 2, 2), rotation(6, -9, 12))
    found, true = resample(scan, model), phantom.image(model).data
    assert np.corrcoef(found.ravel(), true.ravel())[0, 1] > 0.98


def test_a_flip_cannot_hide() -> None:
    grid = grid_over(SMALL, (1.5, 1.5, 1.5))
    wrong = np.flip(round_trip(grid).labels.data, 0)
    assert worst_shift_mm(wrong, grid) > 10


def test_a_half_voxel_shift_cannot_hide() -> None:
    grid = grid_over(SMALL, (1.5, 1.5, 1.5))
    result = round_trip(grid)
    assert worst_shift_mm(result.labels.data, grid) < 0.3
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, 0] / 2
    assert worst_shift_mm(result.labels.data, Grid(grid.shape, affine)) > 0.5


def test_a_spacing_swap_cannot_hide() -> None:
    grid = grid_over(SMALL, (1.5, 1.5, 2.5))
    affine = grid.affine.copy()
    affine[:3, 1], affine[:3, 2] = affine[:3, 1] / 1.5 * 2.5, affine[:3, 2] / 2.5 * 1.5
    result = round_trip(grid)
    assert worst_shift_mm(result.labels.data, Grid(grid.shape, affine)) > 5


@pytest.mark.parametrize("order", ["linear", "nearest"])
def test_agrees_with_scipy_in_the_inside(order: str) -> None:
    """Index conventions: voxel centres at integers, none of torch's half voxels."""
    random = np.random.default_rng(0)
    data = random.normal(size=(9, 11, 13)).astype(np.float32)
    affine = np.diag([1.0, 1.3, 0.9, 1.0])
    affine[:3, :3] = rotation(20, 10, 5) @ affine[:3, :3]
    source = Grid(data.shape, affine)
    target = affine.copy()
    target[:3, 3] += affine[:3, :3] @ [2.31, 3.17, 2.73]
    target[:3, :3] *= 0.8
    grid = Grid((6, 5, 7), target)
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij")).reshape(3, -1)
    matrix = source.index_from(grid)
    points = matrix[:3, :3] @ index + matrix[:3, 3:]
    expected = map_coordinates(data, points, order=1 if order == "linear" else 0)
    found = resample(Volume(data, source), grid, order=order)
    np.testing.assert_allclose(found.ravel(), expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 9, 8), (8, 1, 9), (9, 8, 1), (60, 300, 40)])
def test_planes_are_told_apart(shape: tuple[int, ...]) -> None:
    """Interpolation reads two planes of one picture: neither the next plane's rows nor, where
    there is a single plane, anything else may come in."""
    data = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    points = np.stack([np.linspace(-0.45, n - 0.55, 40) for n in shape])
    matrix = np.eye(4)
    matrix[:3, 0] = (points[:, -1] - points[:, 0]) / 39
    matrix[:3, 3] = points[:, 0]
    matrix[:3, 1], matrix[:3, 2] = np.roll(matrix[:3, 0], 1), np.cross(matrix[:3, 0], [1, 2, 3])
    source, grid = Grid(shape, np.eye(4)), Grid((40, 1, 1), matrix)
    expected = map_coordinates(data, points, order=1, mode="nearest")
    found = _interpolate(torch.from_numpy(data), source.index_from(grid), grid.shape, -9.0, ALONE)
    np.testing.assert_allclose(found.ravel(), expected, atol=2e-3)


def test_same_grid_changes_nothing() -> None:
    data = np.random.default_rng(1).normal(size=(5, 6, 7)).astype(np.float32)
    grid = Grid(data.shape, np.diag([-1.0, 2, 3, 1]))
    np.testing.assert_allclose(resample(Volume(data, grid), grid), data, atol=1e-5)


def test_a_thinned_scan_is_the_means_of_whole_blocks_where_they_lay() -> None:
    data = np.random.default_rng(3).normal(size=(9, 8, 13)).astype(np.float32)
    affine = np.array([[0, 0.9, 0, -5], [-1.0001, 0, 0, 7], [0, 0, 2.5, 3], [0, 0, 0, 1]])
    volume = Volume(np.asfortranarray(data), Grid(data.shape, affine))
    found = thinned(volume, 2.0)
    assert thinned(volume, 2.4) is found, "which is the same blocks"
    assert found.grid.shape == (13, 4, 5), "the axes lie as in memory; the last block is filled up"
    whole = np.concatenate([data, data[-1:]]).reshape(5, 2, 4, 2, 13).mean((1, 3))
    np.testing.assert_allclose(found.data, whole.T, atol=1e-6)
    index = [[12.0, 2, 3, 1], [0.0, 0, 0, 1]]
    where = [[6.5, 4.5, 12.0, 1], [0.5, 0.5, 0.0, 1]]
    np.testing.assert_allclose(np.dot(index, found.grid.affine.T), np.dot(where, affine.T))


def test_large_voxels_are_not_thinned() -> None:
    data = np.random.default_rng(4).normal(size=(5, 6, 7)).astype(np.float32)
    grid = Grid(data.shape, np.diag([1.1, 2, 3, 1]))
    found = thinned(Volume(data, grid), 2.0)
    assert np.shares_memory(found.data, data)
    np.testing.assert_array_equal(found.grid.affine, grid.affine)


def test_border_voxels_reach_half_a_voxel_and_then_comes_fill() -> None:
    scan = Volume(np.full((4, 4, 4), 7, np.float32), Grid((4, 4, 4), np.diag([3.0, 3, 3, 1])))
    affine = np.eye(4)
    affine[:3, 3] = [-3, 4, 4]
    row = resample(scan, Grid((16, 1, 1), affine), fill=-1)[:, 0, 0]
    inside = (np.arange(16) - 3 >= -1.5) & (np.arange(16) - 3 <= 10.5)
    np.testing.assert_allclose(row, np.where(inside, 7, -1), rtol=1e-5)


def test_nothing_in_common_is_all_fill() -> None:
    scan = Volume(np.ones((4, 4, 4), np.float32), Grid((4, 4, 4), np.eye(4)))
    far = np.eye(4)
    far[:3, 3] = 1000
    assert (resample(scan, Grid((2, 2, 2), far), fill=5) == 5).all()
    labels = Volume(np.ones((4, 4, 4), np.int16), scan.grid)
    assert resample(labels, Grid((2, 2, 2), far), order="nearest").dtype == np.int16


def test_small_voxels_are_averaged_not_skipped() -> None:
    """Noise of standard deviation 1 at 0.5 mm falls in 4 mm voxels, and means stay."""
    noise = 10 + np.random.default_rng(2).normal(size=(64, 64, 64)).astype(np.float32)
    scan = Volume(noise, Grid(noise.shape, np.diag([0.5, 0.5, 0.5, 1])))
    affine = np.diag([4.0, 4, 4, 1])
    affine[:3, 3] = 2
    coarse = resample(scan, Grid((7, 7, 7), affine))
    assert coarse.std() < 0.15
    assert coarse.mean() == pytest.approx(10, abs=0.02)


@pytest.mark.parametrize("spacing", [2.0, 3.0, 3.5, 4.0])
def test_blur_does_not_shift(spacing: float) -> None:
    """A ramp stays the same ramp in millimetres at any coarser spacing."""
    x = np.arange(60, dtype=np.float32)
    ramp = np.broadcast_to(x[:, None, None], (60, 20, 20)).copy()
    scan = Volume(ramp, Grid(ramp.shape, np.eye(4)))
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = [15, 8, 8]
    row = resample(scan, Grid((8, 1, 1), affine))[:, 0, 0]
    np.testing.assert_allclose(row, 15 + spacing * np.arange(8), atol=0.02)


def test_the_blur_is_a_gaussian_that_repeats_the_border() -> None:
    """As scipy's along each axis, in slabs of planes that do not divide the scan."""
    data = np.random.default_rng(3).normal(size=(13, 11, 9)).astype(np.float32)
    scan = Volume(data, Grid(data.shape, np.eye(4)))
    steps = np.array([2.5, 2.0, 1.0])
    affine = np.diag([*steps, 1.0])
    found = resample(scan, Grid((5, 5, 9), affine))
    wanted = data.astype(float)
    for axis, step in enumerate(steps):
        if step > 1:
            sigma = np.sqrt(step**2 - 1) / (2 * np.sqrt(2 * np.log(2)))
            radius = int(np.ceil(2.5 * sigma))
            wanted = gaussian_filter1d(wanted, sigma, axis, mode="nearest", radius=radius)
    index = [np.arange(n) * step for n, step in zip((5, 5, 9), steps, strict=True)]
    wanted = map_coordinates(wanted, np.meshgrid(*index, indexing="ij"), order=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_unknown_order_is_named() -> None:
    volume = Volume(np.zeros((2, 2, 2)), Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(ValueError, match="order is 'cubic'"):
        resample(volume, volume.grid, order="cubic")

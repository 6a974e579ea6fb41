"""What a scan that ends inside the brain shows of the template's structures."""

import numpy as np
import pytest

from tlseg_bids.labels.landmarks import BoxAtlas, Landmarks
from tlseg_bids.preprocess.register import displacement_mm, template_from_probabilities
from tlseg_bids.volume import Grid

BOX_MM = [[-40.0, 40.0], [-48.0, 48.0], [-40.0, 40.0]]
SIDE_MM = 2.0


def balls() -> BoxAtlas:
    """Nine balls of 8 mm radius in the corners and the middle of a box, and one that is empty."""
    shape = [round((high - low) / SIDE_MM) for low, high in BOX_MM]
    at = np.stack(np.meshgrid(*(
        low + SIDE_MM * (np.arange(n) + 0.5) for n, (low, _) in zip(shape, BOX_MM, strict=True)
    ), indexing="ij"))  # fmt: skip
    middles = [(x, y, z) for x in (-20, 20) for y in (-26, 26) for z in (-20, 20)] + [(0, 0, 0)]
    maps = [
        (((at - np.array(middle)[:, None, None, None]) ** 2).sum(0) <= 64).astype(np.float32)
        for middle in middles
    ]
    return BoxAtlas(np.stack([1 - np.sum(maps, 0), *maps, 0 * maps[0]]), BOX_MM)


def landmarks() -> Landmarks:
    atlas = balls()
    whole, _ = atlas.shown(np.eye(4), box_grid())
    centroids = atlas._whole[1]
    centroids[0] = np.nan
    assert np.allclose(whole[:-1], 1) and np.isnan(whole[-1])
    return Landmarks(centroids, atlas)


def box_grid(low_z_mm: float = -40.0) -> Grid:
    """A scan of the box in voxels of 2 mm, which begins at a height."""
    affine = np.diag([SIDE_MM] * 3 + [1.0])
    affine[:3, 3] = np.array([-40, -48, low_z_mm]) + SIDE_MM / 2
    return Grid((40, 48, round((40 - low_z_mm) / SIDE_MM)), affine)


def test_a_scan_that_ends_in_a_structure_shows_the_centroid_of_the_rest():
    shares, shifts = landmarks().atlas.shown(np.eye(4), box_grid(low_z_mm=-20.0))
    lower, upper = slice(1, 9, 2), slice(2, 9, 2)
    np.testing.assert_allclose(shares[lower], 0.5)
    np.testing.assert_allclose(shares[upper], 1)
    np.testing.assert_allclose(shifts[lower, 2], 3, atol=0.2)  # 3/8 of the radius of a half ball
    np.testing.assert_allclose(shifts[lower, :2], 0, atol=1e-6)
    np.testing.assert_allclose(shifts[upper], 0, atol=1e-6)


def test_what_is_hardly_in_the_scan_is_no_landmark():
    given = landmarks()
    seen = given.shown(np.eye(4), box_grid(low_z_mm=-16.0))
    assert np.isnan(seen[1:9:2]).all()
    np.testing.assert_allclose(seen[2:10:2], given.centroids[2:10:2], atol=1e-6)
    assert Landmarks(given.centroids).shown(np.eye(4), box_grid(-16.0)) is given.centroids
    assert given.shown(np.eye(4), None) is given.centroids


@pytest.mark.parametrize("low_z_mm", [-40.0, -16.0])
def test_a_cut_does_not_squeeze_the_frame(low_z_mm):
    """The answer of a network that sees all there is, of a brain 4 mm off the template."""
    given, grid = landmarks(), box_grid(low_z_mm)
    first = round((low_z_mm + 40) / SIDE_MM)
    probabilities = np.roll(given.atlas.probabilities, 2, axis=3)[..., first:].copy()
    probabilities[0] = 1 - probabilities[1:].sum(0)
    true = np.eye(4)
    true[2, 3] = -4
    found, count, residual = template_from_probabilities(probabilities, grid.affine, given, grid)
    assert count == 9 and residual < 0.1
    assert displacement_mm(true, found, given.centroids[1:]) < 0.2
    blind, _, _ = template_from_probabilities(probabilities, grid.affine, given)
    squeezed = displacement_mm(true, blind, given.centroids[1:])
    assert (squeezed < 0.2) if low_z_mm == -40 else (squeezed > 0.5)


def test_of_a_scan_that_shows_too_little_whole_structures_are_taken():
    given, grid = landmarks(), box_grid()
    elsewhere = Grid((4, 4, 4), grid.affine)
    found, count, _ = template_from_probabilities(
        given.atlas.probabilities, grid.affine, given, elsewhere
    )
    assert count == 9
    assert displacement_mm(np.eye(4), found, given.centroids[1:]) < 0.1


def test_the_last_digit_of_a_probability_does_not_move_the_frame():
    """Voxels of 0.3 and 0.5 of two structures, as at a border, and what another processor rounds
    otherwise: with a sharp limit at either, one side of a ball would count or not."""
    given, grid = landmarks(), box_grid()
    soft = given.atlas.probabilities.copy()
    soft[1:] *= np.where(np.arange(40) % 2, 0.3, 0.5)[:, None, None]
    soft[0] = 1 - soft[1:].sum(0)
    rounding = np.random.default_rng(0).uniform(-1e-6, 1e-6, soft.shape)
    frames = [
        template_from_probabilities(one.astype(np.float32), grid.affine, given, grid)[0]
        for one in (soft, soft + rounding)
    ]
    assert displacement_mm(*frames, given.centroids) < 1e-4

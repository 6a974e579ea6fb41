"""Reading scans: what is refused, in which words, and what is told."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from tlseg_bids.errors import ScanError
from tlseg_bids.volume import Grid, load_labels, load_scan, load_volume

AFFINE = np.diag([4.0, 4, 4, 1])


def noise(shape=(16, 16, 16), kind=np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, size=shape).astype(kind)


def save(path: Path, data: np.ndarray, affine=AFFINE, sform=1, qform=1) -> Path:
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, sform)
    image.set_qform(affine, qform)
    nib.save(image, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ScanError) as caught:
        load_volume(path)
    error = caught.value
    assert error.what
    assert str(path) == error.where
    assert error.hint
    return str(error)


def test_a_good_scan_keeps_shape_affine_and_values(tmp_path: Path) -> None:
    data = noise((16, 17, 18))
    volume, warnings = load_scan(save(tmp_path / "a.nii.gz", data))
    assert volume.data.dtype == np.float32
    np.testing.assert_array_equal(volume.data, data)
    np.testing.assert_array_equal(volume.grid.affine, AFFINE)
    assert volume.grid.shape == (16, 17, 18)
    assert warnings == ()


def test_slope_and_intercept_are_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    raw = np.fromfile(tmp_path / "a.nii", "<i2", offset=352).reshape((16, 16, 16), order="F")
    volume = load_volume(tmp_path / "a.nii")
    np.testing.assert_allclose(volume.data, raw * 0.5 - 3, atol=1e-3)


def test_a_scan_is_counted_from_its_background_and_labels_are_not(tmp_path: Path) -> None:
    data = noise(kind=np.float32)
    data[:8] = 0
    moved = save(tmp_path / "a.nii.gz", data - 1024)
    for volume in (load_volume(moved), load_scan(moved)[0]):
        np.testing.assert_array_equal(volume.data, data)
    assert load_labels(moved).data.min() == -1024


def test_absent_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.nii.gz")


def test_dangling_link(tmp_path: Path) -> None:
    link = tmp_path / "a.nii.gz"
    link.symlink_to(tmp_path / ".git" / "annex" / "object")
    assert "a link whose content is not here" in refusal(link)
    assert "datalad get" in refusal(link)


def test_truncated_gzip(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise())
    path.write_bytes(path.read_bytes()[:2000])
    message = refusal(path)
    assert "cannot be read" in message
    assert "truncated" in message


def test_truncated_plain_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    path.write_bytes(path.read_bytes()[:2000])
    assert "the voxels cannot be read" in refusal(path)


def test_truncated_header(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read as NIfTI" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"not a scan", gzip.compress(b"not a scan", mtime=0)],
    ids=["empty", "text", "gzip"],
)
def test_not_nifti_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(content)
    assert "cannot be read as NIfTI" in refusal(path)


def test_another_format(tmp_path: Path) -> None:
    path = tmp_path / "a.mgz"
    nib.save(nib.MGHImage(noise(), AFFINE), path)
    assert "is a MGHImage, not NIfTI" in refusal(path)


def test_four_dimensions(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise((16, 16, 16, 2)))
    assert "4 dimensions, shape (16, 16, 16, 2)" in refusal(path)


def test_two_dimensions(tmp_path: Path) -> None:
    assert "2 dimensions" in refusal(save(tmp_path / "a.nii.gz", noise((16, 16))))


def test_fourth_axis_of_length_one_is_dropped_and_told(tmp_path: Path) -> None:
    volume, warnings = load_scan(save(tmp_path / "a.nii.gz", noise((16, 16, 16, 1))))
    assert volume.data.shape == (16, 16, 16) == volume.grid.shape
    assert "axes of length 1 were dropped" in warnings[0]


def test_one_slice(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise((64, 64, 1)))
    assert "only 1 slice along axis K" in refusal(path)


def test_slab(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise((64, 64, 9)), np.diag([4.0, 4, 2, 1]))
    assert "only 18 mm along axis K" in refusal(path)


def test_a_header_that_claims_too_much(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    raw = bytearray(path.read_bytes())
    raw[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    path.write_bytes(raw)
    assert "the header claims 27000000000000 voxels" in refusal(path)


def test_thick_slices_are_told(tmp_path: Path) -> None:
    affine = np.diag([1.0, 1, 5, 1])
    _, warnings = load_scan(save(tmp_path / "a.nii.gz", noise((64, 64, 20)), affine))
    assert "voxels of 1 × 1 × 5 mm" in warnings[0]


@pytest.mark.parametrize("scale", [0.001, 12.0])
def test_voxels_that_no_head_scan_has(tmp_path: Path, scale: float) -> None:
    path = save(tmp_path / "a.nii.gz", noise(), np.diag([scale, scale, scale, 1]))
    assert f"voxels of {scale:g}" in refusal(path)
    assert "unit is mm" in refusal(path)


def test_no_orientation(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise(), sform=0, qform=0)
    assert "left and right are unknown" in refusal(path)


def test_singular_affine(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    raw = bytearray(path.read_bytes())
    raw[296:312] = raw[280:296]
    path.write_bytes(raw)
    assert "the affine is singular" in refusal(path)


def test_affine_with_nan(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    raw = bytearray(path.read_bytes())
    raw[280:284] = np.float32("nan").tobytes()
    path.write_bytes(raw)
    assert "nan" in refusal(path)


def test_sform_and_qform_apart_is_told(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] = 5
    image.set_sform(moved, 2)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    volume, warnings = load_scan(tmp_path / "a.nii.gz")
    assert "a corner 5.0 mm apart; the sform was used" in warnings[0]
    np.testing.assert_array_equal(volume.grid.affine, moved)


def test_sform_mirroring_qform_is_refused(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), AFFINE)
    image.set_sform(np.diag([-4.0, 4, 4, 1]), 1)
    image.set_qform(AFFINE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    assert "disagree on which side is left" in refusal(tmp_path / "a.nii.gz")


def with_rounded_quaternion(path: Path, sform: int) -> Path:
    """A scan whose qform has b² + c² + d² = 1.000002, as some converters round it."""
    save(path, noise(), AFFINE, sform)
    raw = bytearray(path.read_bytes())
    raw[256:268] = np.array([0.7071075, 0.7071075, 0], np.float32).tobytes()
    path.write_bytes(raw)
    return path


def test_a_qform_off_by_rounding_is_told_and_the_sform_used(tmp_path: Path) -> None:
    volume, warnings = load_scan(with_rounded_quaternion(tmp_path / "a.nii", sform=1))
    (said,) = warnings
    assert said.startswith("the qform cannot be read (w2 should be positive, but is -")
    assert said.endswith("); the sform was used")
    np.testing.assert_array_equal(volume.grid.affine, AFFINE)


def test_a_qform_off_by_rounding_is_refused_where_it_stands_alone(tmp_path: Path) -> None:
    assert "w2 should be positive" in refusal(with_rounded_quaternion(tmp_path / "a.nii", sform=0))


@pytest.mark.parametrize(("value", "count"), [(np.nan, 3), (np.inf, 1)])
def test_nan_and_inf(tmp_path: Path, value: float, count: int) -> None:
    data = noise(kind=np.float32)
    data[0, 0, :count] = value
    message = refusal(save(tmp_path / "a.nii.gz", data))
    assert f"{count} of 4096 voxels {'is' if count == 1 else 'are'} NaN or Inf" in message


def test_a_slope_that_overflows(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", noise())
    raw = bytearray(path.read_bytes())
    raw[112:116] = np.float32(3e38).tobytes()
    path.write_bytes(raw)
    assert "slope 3e+38" in refusal(path)


@pytest.mark.parametrize("value", [0, 7])
def test_constant(tmp_path: Path, value: int) -> None:
    path = save(tmp_path / "a.nii.gz", np.full((16, 16, 16), value, np.int16))
    assert f"every voxel is {value}" in refusal(path)


def test_a_mask(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", (noise() > 100).astype(np.uint8))
    assert "only the values 0 and 1" in refusal(path)


def test_wrapped_integers(tmp_path: Path) -> None:
    true = np.random.default_rng(0).integers(0, 65535, size=(16, 16, 16))
    path = save(tmp_path / "a.nii.gz", true.astype(np.uint16).view(np.int16))
    assert "intensities wrapped around" in refusal(path)


def fluid_beside_nothing() -> np.ndarray:
    """A brain cut out of its head, smooth, with the brightest fluid on its outside; 0 around it."""
    places = np.moveaxis(np.indices((40, 40, 40)), 0, -1) - 19.5
    radius = np.linalg.norm(places, axis=-1)
    texture = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=radius.shape), 1.5)
    return np.where(radius < 15, 100 * (0.5 + radius / 30 + texture), 0.0)


@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_clipped_fluid_beside_a_background_is_no_wrap(tmp_path: Path, kind: type) -> None:
    data = fluid_beside_nothing()
    clipped = np.minimum(data, np.percentile(data, 99.5))
    path = tmp_path / "a.nii.gz"
    image = nib.Nifti1Image(clipped, np.diag([2.0, 2, 2, 1]))
    image.set_data_dtype(kind)
    nib.save(image, path)
    stored = np.asanyarray(nib.load(path).dataobj.get_unscaled())
    assert np.ptp(stored.astype(int)) > 0.98 * 65535
    volume, warnings = load_scan(path)
    assert warnings == ()
    assert np.allclose(volume.data.max(), clipped.max(), rtol=1e-4)


@pytest.mark.parametrize("full_scale", [3000, 64000])
def test_undershoot_that_wrapped_beside_a_background_is_refused(tmp_path, full_scale) -> None:
    data = fluid_beside_nothing()
    sharp = data + 0.1 * (data - ndimage.gaussian_filter(data, 1, truncate=2))
    path = save(
        tmp_path / "a.nii.gz", (full_scale / sharp.max() * sharp).astype(np.int64).astype(np.uint16)
    )
    assert "intensities wrapped around" in refusal(path)


def test_clipped_values_are_told(tmp_path: Path) -> None:
    data = noise()
    data[:4] = 255
    _, warnings = load_scan(save(tmp_path / "a.nii.gz", data))
    assert "25% of the voxels are clipped at 255" in warnings[0]


def test_colours(tmp_path: Path) -> None:
    colour = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "voxels are colours" in refusal(save(tmp_path / "a.nii.gz", colour))


def test_complex_numbers(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", noise().astype(np.complex64))
    assert "voxels are complex64 numbers" in refusal(path)


def test_labels_must_be_whole(tmp_path: Path) -> None:
    assert load_labels(save(tmp_path / "a.nii.gz", noise())).data.dtype == np.int32
    path = save(tmp_path / "b.nii.gz", noise(kind=np.float32) + 0.5)
    with pytest.raises(ScanError, match="4096 voxels are not whole numbers"):
        load_labels(path)


def test_grids_are_compared_by_value() -> None:
    one, other = Grid((2, 3, 4), np.eye(4)), Grid((2, 3, 4), np.eye(4))
    assert one == other
    assert one != Grid((2, 3, 4), np.diag([1.0, 1, 2, 1]))
    assert Grid((2, 3, 4), np.diag([-1.0, 2, 3, 1])).voxel_mm3 == pytest.approx(6)
    np.testing.assert_allclose(Grid((1, 1, 1), np.diag([-1.0, 2, 3, 1])).spacing_mm, [1, 2, 3])

"""Voxels that know where they lie.

Axes I, J, K are voxel indices; x, y, z are millimetres in RAS+ world space.

`load_volume` reads a NIfTI scan and refuses, with a sentence, what cannot be segmented honestly.
Which affine counts follows the field (nibabel, fMRIPrep, FSL): the sform if its code is set, else
the qform. Where both are set and put a corner of the scan more than `AFFINE_TOLERANCE_MM` apart,
or a qform beside an sform cannot be read, the sform is used and that is said; where they disagree
on what is left and what is right, or where neither is set, the scan is refused, because sides would
be guessed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from tlseg_bids.background import from_zero
from tlseg_bids.errors import ScanError, amount
from tlseg_bids.grid import Grid

if TYPE_CHECKING:
    import torch

AFFINE_TOLERANCE_MM = 1.0
MIN_VOXELS = 8
MIN_EXTENT_MM = 40.0
MAX_SPACING_MM = 10.0
MIN_SPACING_MM = 0.05
THICK_MM = 4.5
MAX_VOXELS = 1024**3
MAX_WRAPPED_SHARE = 1e-4
BACKGROUND_SHARE = 0.1
CLIPPED_BRIGHT_SHARE = 0.1
MAX_CLIPPED_SHARE = 0.02
NOT_AN_IMAGE = (
    ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError,
)  # fmt: skip
"""What nibabel raises on a file that is none, or whose header holds NaN or Inf as an offset."""


@dataclass(frozen=True, eq=False)
class Volume:
    """An array on a grid.

    Parameters
    ----------
    data : ndarray, shape `grid.shape`
        Intensities or labels.
    grid : Grid
        Where the voxels lie.

    Notes
    -----
    `thin` keeps it in larger voxels once it was asked for so, `there` on a device once it was read
    there (both `preprocess.geometry`).
    """

    data: np.ndarray
    grid: Grid
    thin: dict[tuple[int, ...], Volume] = field(default_factory=dict, init=False, repr=False)
    there: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)


def load_volume(path: Path | str) -> Volume:
    """Read a structural scan as float32.

    Parameters
    ----------
    path : path-like
        A `.nii` or `.nii.gz` file.

    Returns
    -------
    Volume
        Shape (I, J, K) as in the file (a fourth axis of length 1 is dropped), intensities with the
        header's slope and intercept applied, then counted from the background (`from_zero`).

    Raises
    ------
    ScanError
        If the file is absent, damaged, not one 3-D image of real numbers, holds NaN or Inf, is
        constant or two-valued, is too thin, or does not say where left and right are.
    """
    return load_scan(path)[0]


def load_scan(path: Path | str) -> tuple[Volume, tuple[str, ...]]:
    """As `load_volume`, together with sentences the user should know about the scan."""
    image, warnings = _open(Path(path))
    shape, affine = image.shape[:3], image.affine
    data = _read(image, path).reshape(shape)
    warnings += _check_values(data, image, path)
    return Volume(from_zero(data), Grid(tuple(int(n) for n in shape), affine)), tuple(warnings)


def load_grid(path: Path | str) -> tuple[Grid, tuple[str, ...]]:
    """The grid of a scan and sentences about it, from the header alone; no voxel is read.

    Raises
    ------
    ScanError
        As `load_volume`, for what the header shows.
    """
    image, warnings = _open(Path(path))
    return Grid(tuple(int(n) for n in image.shape[:3]), image.affine), tuple(warnings)


def load_labels(path: Path | str) -> Volume:
    """Read a label image as int32 (its own grid, geometry checked as for a scan).

    Raises
    ------
    ScanError
        As `load_volume`; also if a voxel is not a whole number.
    """
    image, _ = _open(Path(path))
    data = _read(image, path).reshape(image.shape[:3])
    labels = np.nan_to_num(data, nan=0.5, posinf=0.5, neginf=0.5).round().astype(np.int32)
    broken = int(np.count_nonzero(labels != data))
    if broken:
        raise ScanError(
            amount(broken, "voxel is not a whole number", "voxels are not whole numbers"),
            path,
            "give a label image (dseg), not a scan",
        )
    return Volume(labels, Grid(tuple(int(n) for n in image.shape[:3]), image.affine))


def _open(path: Path) -> tuple[nib.Nifti1Image, list[str]]:
    """The image with its geometry checked, voxels unread."""
    if not path.exists():
        if path.is_symlink():
            raise ScanError(
                "the file is a link whose content is not here", path, "fetch it with `datalad get`"
            )
        raise ScanError("no such file", path, "check the path")
    if not path.is_file():
        raise ScanError("this is a folder, a pipe or a device", path, "name a NIfTI file")
    try:
        image = nib.load(path)
    except NOT_AN_IMAGE as error:
        raise ScanError(
            f"cannot be read as NIfTI ({error or type(error).__name__})", path,
            "copy or convert the file again, or fetch it with `datalad get`",
        ) from error  # fmt: skip
    if not isinstance(image, nib.Nifti1Pair):
        raise ScanError(
            f"is a {type(image).__name__}, not NIfTI", path, "convert it to .nii.gz, as BIDS asks"
        )
    warnings = _check_shape(image, path)
    warnings += _check_affine(image, path)
    _check_type(image, path)
    return image, warnings


def _check_shape(image: nib.Nifti1Image, path: Path) -> list[str]:
    """Refuse what is not one 3-D image of a plausible size."""
    shape, warnings = tuple(int(n) for n in image.shape), []
    if len(shape) > 3 and all(n == 1 for n in shape[3:]):
        warnings.append(f"the file has shape {shape}; its axes of length 1 were dropped")
    elif len(shape) != 3:
        raise ScanError(
            f"the image has {amount(len(shape), 'dimension')}, shape {shape}, and one 3-D image "
            "is needed",
            path, "keep one volume of it, or exclude the file with --bids-filter-file",
        )  # fmt: skip
    voxels = int(np.prod([float(n) for n in shape[:3]]))
    if voxels > MAX_VOXELS:
        raise ScanError(
            f"the header claims {voxels} voxels, shape {shape}", path,
            f"the header is probably damaged; up to {MAX_VOXELS} voxels can be processed",
        )  # fmt: skip
    if min(shape[:3]) < MIN_VOXELS:
        raise ScanError(
            f"only {amount(min(shape[:3]), 'slice')} along axis "
            f"{'IJK'[int(np.argmin(shape[:3]))]}, shape {shape[:3]}",
            path, f"a scan of at least {MIN_VOXELS} slices is needed; exclude localisers",
        )  # fmt: skip
    return warnings


def _check_affine(image: nib.Nifti1Image, path: Path) -> list[str]:
    """Refuse an affine that does not say where the voxels lie; warn of one that is in doubt."""
    sform, qform, warnings = _read_forms(image.header, path)
    if sform is None and qform is None:
        raise ScanError(
            "no orientation: sform and qform codes are both 0, so left and right are unknown", path,
            "convert the scan from DICOM again, or set the sform if you know it",
        )  # fmt: skip
    affine = image.affine
    if not np.isfinite(affine).all():
        raise ScanError(f"the affine holds {affine.tolist()}", path, "set a valid sform")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if abs(np.linalg.det(affine[:3, :3])) < 1e-3 * np.prod(spacing) or not spacing.all():
        raise ScanError(
            f"the affine is singular, its rows are {affine[:3].tolist()}", path,
            "set a valid sform, or convert the scan from DICOM again",
        )  # fmt: skip
    warnings += _check_spacing(image.shape, spacing, path)
    return warnings + _compare_forms(image, sform, qform, path)


def _read_forms(
    header: nib.Nifti1Header, path: Path
) -> tuple[np.ndarray | None, np.ndarray | None, list[str]]:
    """Sform and qform, None where not set; so is a qform that cannot be read beside an sform."""
    sform = None
    try:
        sform = header.get_sform(coded=True)[0]
        return sform, header.get_qform(coded=True)[0], []
    except (HeaderDataError, ValueError) as error:
        if sform is not None:
            return sform, None, [f"the qform cannot be read ({error}); the sform was used"]
        raise ScanError(
            f"the orientation in the header is damaged ({error})", path,
            "convert the scan from DICOM again",
        ) from error  # fmt: skip


def _check_spacing(shape: tuple[int, ...], spacing: np.ndarray, path: Path) -> list[str]:
    """Refuse voxels or a field of view that no head scan has."""
    text = " × ".join(f"{s:.3g}" for s in spacing)
    if spacing.max() > MAX_SPACING_MM or spacing.min() < MIN_SPACING_MM:
        raise ScanError(
            f"voxels of {text} mm", path,
            f"spacing from {MIN_SPACING_MM} to {MAX_SPACING_MM} mm can be segmented; "
            "check that the header's unit is mm",
        )  # fmt: skip
    extent = np.array(shape[:3]) * spacing
    if extent.min() < MIN_EXTENT_MM:
        raise ScanError(
            f"the field of view is only {extent.min():.0f} mm along axis "
            f"{'IJK'[int(extent.argmin())]}",
            path, f"at least {MIN_EXTENT_MM:.0f} mm are needed; exclude slabs and localisers",
        )  # fmt: skip
    if spacing.max() > THICK_MM:
        return [f"voxels of {text} mm: small structures are unreliable in slices this thick"]
    return []


def _compare_forms(
    image: nib.Nifti1Image, sform: np.ndarray | None, qform: np.ndarray | None, path: Path
) -> list[str]:
    """Compare sform and qform where both are set."""
    if sform is None or qform is None or not np.isfinite(qform).all():
        return []
    if np.linalg.det(sform[:3, :3]) * np.linalg.det(qform[:3, :3]) < 0:
        raise ScanError(
            "sform and qform disagree on which side is left: one mirrors the other", path,
            "find out which is right (the DICOM knows) and copy it to the other",
        )  # fmt: skip
    corners = np.array([[*c, 1] for c in product(*((0, n - 1) for n in image.shape[:3]))])
    apart = np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max()
    if apart > AFFINE_TOLERANCE_MM:
        return [f"sform and qform put a corner {apart:.1f} mm apart; the sform was used"]
    return []


def _check_type(image: nib.Nifti1Image, path: Path) -> None:
    """Refuse colour and complex voxels."""
    dtype = image.get_data_dtype()
    if dtype.fields is not None or dtype.kind not in "iuf":
        kind = "colours" if dtype.fields is not None else f"{dtype} numbers"
        raise ScanError(
            f"voxels are {kind}, and real numbers are needed", path,
            "convert the image to grey values or magnitude",
        )  # fmt: skip


def _read(image: nib.Nifti1Image, path: Path | str) -> np.ndarray:
    """Voxels as float32, slope and intercept applied."""
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            return image.get_fdata(dtype=np.float32, caching="unchanged")
    except NOT_AN_IMAGE as error:
        raise ScanError(
            f"the voxels cannot be read ({error or type(error).__name__})", path,
            "the file is truncated or damaged: copy it again, or fetch it with `datalad get`",
        ) from error  # fmt: skip
    except MemoryError as error:
        raise ScanError(
            f"{np.prod(image.shape)} voxels do not fit into memory", path, "free memory"
        ) from error


def _check_values(data: np.ndarray, image: nib.Nifti1Image, path: Path | str) -> list[str]:
    """Refuse values that are not a scan; warn of clipped ones."""
    low, high = float(data.min()), float(data.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        broken = sum(int(np.count_nonzero(~np.isfinite(part))) for part in data.T)
        slope, inter = image.dataobj.slope, image.dataobj.inter
        raise ScanError(
            f"{broken} of {data.size} voxels {'is' if broken == 1 else 'are'} NaN or Inf (slope "
            f"{slope:g}, intercept {inter:g})",
            path, "repair the scan, for example `fslmaths IN -nan OUT`",
        )  # fmt: skip
    if low == high:
        raise ScanError(f"every voxel is {low:g}", path, "the image is empty: export it again")
    if all(((part == low) | (part == high)).all() for part in data.T):
        raise ScanError(
            f"the image holds only the values {low:g} and {high:g}", path,
            "this is a mask, not a scan: correct the suffix",
        )  # fmt: skip
    return _check_integers(data, image, path)


def _check_integers(data: np.ndarray, image: nib.Nifti1Image, path: Path | str) -> list[str]:
    """Integer overflow: values that wrapped around are refused, clipped ones are told."""
    dtype = image.get_data_dtype()
    if dtype.kind not in "iu":
        return []
    slope, inter = float(image.dataobj.slope), float(image.dataobj.inter)
    limits = np.iinfo(dtype)
    ends = sorted((limits.min * slope + inter, limits.max * slope + inter))
    reach = ends[1] - ends[0]
    if dtype.itemsize == 2 and float(data.max()) - float(data.min()) > 0.98 * reach:
        wrapped = _wrapped_share(data.T[:: max(1, data.shape[2] // 64)], reach)
        if wrapped > MAX_WRAPPED_SHARE:
            raise ScanError(
                f"intensities wrapped around: {wrapped:.2%} of neighbouring voxels differ by "
                f"the whole range of {dtype}",
                path, "export the scan again with a wider type, such as float32",
            )  # fmt: skip
    top = data.max()
    clipped = float(np.mean([np.mean(part == top) for part in data.T[::4]]))
    if clipped > MAX_CLIPPED_SHARE:
        return [f"{clipped:.0%} of the voxels are clipped at {float(top):g}"]
    return []


def _wrapped_share(data: np.ndarray, reach: float) -> float:
    """Share of neighbours that differ by nearly the range `reach` of the type.

    Where the brightest voxels are clipped, those beside a constant background are left out: a
    brain cut out and clipped at a percentile has fluid beside nothing.
    """
    low = np.minimum(data[:, 1:], data[:, :-1])
    pairs = np.abs(np.diff(data, axis=1)) > 0.9 * reach
    if not pairs.any():
        return 0.0
    values, counts = np.unique(low[pairs], return_counts=True)
    background, top = values[counts.argmax()], data.max()
    bright = int(np.count_nonzero(data > top - 0.1 * reach))
    clipped = np.count_nonzero(data == top) > CLIPPED_BRIGHT_SHARE * bright
    if clipped and np.mean(data == background) > BACKGROUND_SHARE:
        pairs &= low != background
    return float(pairs.mean())

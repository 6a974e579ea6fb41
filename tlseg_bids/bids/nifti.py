"""Writes label maps and probabilities on the grid of the scan they were made from."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from tlseg_bids.bids.atomic import atomic
from tlseg_bids.errors import ScanError

COMPRESSION = 5
LABEL_INTENT = "label"
PERSONAL = ("descrip", "aux_file", "db_name", "intent_name", "data_type")


def write_labels(path: Path, labels: np.ndarray, scan: Path, largest: int) -> Path:
    """Write integer labels as 3-D NIfTI with the scan's grid, affine and form codes.

    Parameters
    ----------
    path : Path
        Ends in ``.nii.gz``; the same content gives the same bytes.
    labels : ndarray of int, shape (I, J, K)
        Labels on the scan's grid.
    scan : Path
        The scan; its header is the model, without the free-text fields.
    largest : int
        Largest label that may occur; decides between uint8 and int16, so that all scans of a
        protocol have one type.

    Raises
    ------
    ScanError
        If the labels do not fit the scan's grid or a label does not fit the type.
    CannotCreateError, OutputError
        As in `atomic`.
    """
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    kind = np.uint8 if low >= 0 and max(high, largest) <= 255 else np.int16
    if low < np.iinfo(kind).min or high > np.iinfo(kind).max:
        raise ScanError(
            f"the labels {low} to {high} do not fit {np.dtype(kind).name}", scan,
            "use a protocol with labels below 32768",
        )  # fmt: skip
    header = _header(scan, labels.shape, np.dtype(kind))
    header.set_intent(LABEL_INTENT)
    return _write(path, header, [labels], np.dtype(kind))


def write_fractions(path: Path, volumes: Iterable[np.ndarray], count: int, scan: Path) -> Path:
    """Write fractions from 0 to 1 as uint8 with slope 1/255, one volume after the other.

    Parameters
    ----------
    path : Path
        Ends in ``.nii.gz``.
    volumes : iterable of ndarray, shape (I, J, K)
        Never more than one is held in memory here.
    count : int
        How many there are; the file is 3-D for one, 4-D for more.
    scan : Path
        The scan that gives grid and form codes.

    Raises
    ------
    ScanError
        If a volume does not fit the scan's grid, or their number is not `count`.
    CannotCreateError, OutputError
        As in `atomic`.
    """
    volumes = iter(volumes)
    first = next(volumes, None)
    if first is None:
        raise ScanError("there are no probabilities to write", scan, "report this as a defect")
    header = _header(scan, first.shape, np.dtype(np.uint8), count)
    header["scl_slope"] = 1 / 255

    def quantised():
        number = 0
        for number, volume in enumerate(_chain(first, volumes), start=1):  # noqa: B007
            if volume.shape != first.shape:
                raise _misfit(volume.shape, first.shape, scan)
            yield np.rint(np.clip(np.nan_to_num(volume), 0, 1) * 255)
        if number != count:
            raise ScanError(
                f"{number} probability maps came where {count} are needed", scan,
                "report this as a defect",
            )  # fmt: skip

    return _write(path, header, quantised(), np.dtype(np.uint8))


def _chain(first: np.ndarray, rest: Iterable[np.ndarray]):
    yield first
    yield from rest


def _misfit(shape: tuple[int, ...], needed: tuple[int, ...], scan: Path) -> ScanError:
    return ScanError(
        f"a result of shape {shape} does not fit the scan's shape {needed}", scan,
        "report this as a defect",
    )  # fmt: skip


def _header(scan: Path, shape: tuple[int, ...], kind: np.dtype, count: int = 1):
    """The scan's header for new data on its grid; `count` volumes make a fourth axis.

    Axes of length 1 that the scan has beyond the third are left out.
    """
    try:
        image = nib.load(scan)
    except (OSError, nib.filebasedimages.ImageFileError) as error:
        raise ScanError(
            f"the scan cannot be read any more ({error})", scan, "check the disk and start again"
        ) from error
    old = image.header
    if int(np.prod(shape)) != int(np.prod(image.shape)) or shape != image.shape[:3]:
        raise _misfit(shape, image.shape, scan)
    header = old.as_byteswapped("<") if old.endianness != "<" else old.copy()
    header.extensions.clear()
    header.set_data_shape((*shape, count) if count > 1 else shape)
    header["pixdim"][4:] = 1  # ITK reads no 4-D image whose fourth spacing is 0
    header.set_data_dtype(kind)
    header["magic"] = header.single_magic
    header["vox_offset"] = header.single_vox_offset
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"] = header["cal_max"] = 0
    header["intent_code"] = 0
    for name in PERSONAL:
        if name in header.keys():  # noqa: SIM118 (a header is no dict)
            header[name] = b""
    if header.get_xyzt_units()[0] == "unknown" or count > 1:
        space = header.get_xyzt_units()[0]
        header.set_xyzt_units("mm" if space == "unknown" else space, "sec" if count > 1 else None)
    return header


def _write(path: Path, header, volumes: Iterable[np.ndarray], kind: np.dtype) -> Path:
    with atomic(path) as stream, _deterministic_gzip(stream) as packed:
        packed.write(header.binaryblock)
        packed.write(bytes(int(header["vox_offset"]) - header.sizeof_hdr))
        for volume in volumes:
            for k in range(volume.shape[-1]):
                packed.write(volume[..., k].astype(kind.newbyteorder("<")).tobytes(order="F"))
    return path


def _deterministic_gzip(stream: BinaryIO) -> gzip.GzipFile:
    """No file name and no time in the gzip header."""
    return gzip.GzipFile("", "wb", COMPRESSION, stream, mtime=0)

"""What the interactive viewer is given: scan and labels as NIfTI in base64, colours, places.

The drawing itself is done in the browser by NiiVue (BSD-2-Clause), whose JavaScript comes with
nilearn; the page carries it inline, so nothing is fetched.
"""

from __future__ import annotations

import base64
import gzip
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.report.display import Box, Display

GREY_LEVELS = 64
VOXELS_PER_PAGE = 14_000_000
VOXELS_PER_SCAN = 7_000_000
FILL_ALPHA = 255


@dataclass(frozen=True)
class ViewerData:
    """One scan for the viewer.

    Parameters
    ----------
    scan, labels : str
        Gzipped NIfTI in base64; labels hold rows of the protocol, not its integers. `scan` is
        empty where the scan is not on disk.
    places : dict of int to list of float
        For each row that occurs, RAS+ mm of a voxel of it near its centroid.
    spacing_mm : tuple of float
        Voxel size of what is shown.
    reduced : bool
        Whether it is coarser than the scan.
    """

    scan: str
    labels: str
    places: dict[int, list[float]]
    spacing_mm: tuple[float, ...]
    reduced: bool


@lru_cache
def niivue_script() -> str:
    """NiiVue's JavaScript, made safe to stand inside a ``<script>`` element; empty if not found."""
    spec = find_spec("nilearn")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(root).rglob("niivue.umd.js")):
            source = file.read_text(encoding="utf-8")
            return source.replace("</script", r"<\/script").replace("<!--", r"<\!--")
    return ""


def niivue_licence() -> str:
    """The licence notice that must travel with NiiVue."""
    file = resources.files("tlseg_bids.report") / "templates" / "niivue_licence.txt"
    return file.read_text(encoding="utf-8")


def colours_of(protocol: LabelProtocol) -> np.ndarray:
    """Red, green and blue of each row, shape (channels, 3), uint8; grey where not a hex colour."""
    return np.array([_rgb(str(colour)) for colour in protocol.table["color"]], np.uint8)


def hex_colour(colour: str) -> str:
    """A protocol's colour as the pictures have it, fit for a style sheet: ``#rrggbb``."""
    return f"#{bytes(_rgb(colour)).hex()}"


def _rgb(colour: str) -> tuple[int, int, int]:
    try:
        red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    except ValueError:
        return (128, 128, 128)
    return (red, green, blue)


def label_colormap(protocol: LabelProtocol) -> dict[str, Any]:
    """Colour table of a protocol as NiiVue reads it: a node per row, background clear."""
    colours = colours_of(protocol)
    return {
        "R": colours[:, 0].tolist(),
        "G": colours[:, 1].tolist(),
        "B": colours[:, 2].tolist(),
        "A": [0] + [FILL_ALPHA] * (len(protocol) - 1),
        "I": list(range(len(protocol))),
        "labels": [str(name) for name in protocol.table["name"]],
    }


def viewer_data(display: Display, scans_on_page: int = 1) -> ViewerData:
    """Crop to the head, coarsen if the page would grow too large, and pack.

    Parameters
    ----------
    display : Display
        Scan and labels in RAS+ order.
    scans_on_page : int
        They share `VOXELS_PER_PAGE`.
    """
    budget = min(VOXELS_PER_SCAN, VOXELS_PER_PAGE // max(1, scans_on_page))
    box = _head(display)
    start = np.array([s.start for s in box])
    shape = np.array([s.stop - s.start for s in box])
    new_shape = _fitting(shape, display.spacing_mm, budget)
    step = shape / new_shape
    affine = display.affine @ nib.affines.from_matvec(np.diag(step), start + (step - 1) / 2)
    labels = display.channels[box][_centres(shape, new_shape)]
    scan = ""
    if display.image is not None:
        scan = _packed(_posterised(_averaged(display.grey(display.image[box]), new_shape)), affine)
    return ViewerData(
        scan=scan,
        labels=_packed(labels, affine, intent="label"),
        places=_places(labels, affine),
        spacing_mm=tuple(np.round(np.linalg.norm(affine[:3, :3], axis=0), 2).tolist()),
        reduced=bool((new_shape < shape).any()),
    )


def _head(display: Display) -> Box:
    """The labelled box, grown to everything brighter than a tenth of the window."""
    if display.image is None:
        return display.box
    grown = []
    step = tuple(max(1, n // 64) for n in display.image.shape)
    thin = display.grey(display.image[:: step[0], :: step[1], :: step[2]]) > 25
    for axis, span in enumerate(display.box):
        others = tuple(a for a in range(3) if a != axis)
        line = np.flatnonzero(thin.mean(axis=others) > 0.02) * step[axis]
        low, high = (line[0], line[-1] + 1) if line.size else (span.start, span.stop)
        pad = 2 * step[axis]
        grown.append(
            slice(
                int(max(0, min(span.start, low - pad))),
                int(min(display.image.shape[axis], max(span.stop, high + pad))),
            )
        )
    return tuple(grown)  # type: ignore[return-value]


def _fitting(shape: np.ndarray, spacing: np.ndarray, budget: int) -> np.ndarray:
    """Voxels along each axis so that the total is within `budget`, the finest axes first."""
    low, high = float(spacing.min()), float(spacing.max()) * 64
    if shape.prod() <= budget:
        return shape
    for _ in range(40):
        middle = (low + high) / 2
        if _at(shape, spacing, middle).prod() > budget:
            low = middle
        else:
            high = middle
    return _at(shape, spacing, high)


def _at(shape: np.ndarray, spacing: np.ndarray, target_mm: float) -> np.ndarray:
    return np.maximum(1, np.floor(shape * np.minimum(1.0, spacing / target_mm))).astype(int)


def _centres(shape: np.ndarray, new_shape: np.ndarray) -> tuple[np.ndarray, ...]:
    pairs = zip(shape, new_shape, strict=True)
    return np.ix_(*(((np.arange(m) + 0.5) * n / m).astype(int) for n, m in pairs))


def _averaged(data: np.ndarray, new_shape: np.ndarray) -> np.ndarray:
    """Mean over the part of each old voxel that a new one covers, one axis after the other."""
    for axis, (old, new) in enumerate(zip(data.shape, new_shape, strict=True)):
        if old == new:
            continue
        edges = np.arange(new + 1) * (old / new)
        lower = np.maximum(edges[:-1, None], np.arange(old))
        upper = np.minimum(edges[1:, None], np.arange(1, old + 1))
        weights = (np.clip(upper - lower, 0, None) * (new / old)).astype(np.float32)
        turned = np.moveaxis(data, axis, 0).reshape(old, -1).astype(np.float32)
        rest = [n for a, n in enumerate(data.shape) if a != axis]
        data = np.moveaxis((weights @ turned).reshape(new, *rest), 0, axis)
    return data


def _posterised(grey: np.ndarray) -> np.ndarray:
    """Fewer grey levels than the eye tells apart in a viewer: a third of the bytes."""
    step = 256 // GREY_LEVELS
    coarse = (grey // step * (255 / (GREY_LEVELS - 1))).astype(np.uint8)
    coarse[coarse < 12] = 0
    return coarse


def _packed(data: np.ndarray, affine: np.ndarray, intent: str = "none") -> str:
    image = nib.Nifti1Image(np.ascontiguousarray(data), affine)
    image.header.set_xyzt_units("mm")
    image.header.set_intent(intent)
    return base64.b64encode(gzip.compress(image.to_bytes(), 6, mtime=0)).decode("ascii")


def _places(labels: np.ndarray, affine: np.ndarray) -> dict[int, list[float]]:
    """World position of the voxel of each structure that is nearest to the structure's centroid."""
    filled = np.flatnonzero(labels)
    rows = labels.reshape(-1)[filled].astype(np.int16)
    filled = filled[np.argsort(rows, kind="stable")]  # structure by structure
    count = np.bincount(rows)
    present = np.flatnonzero(count)
    at = np.stack(np.unravel_index(filled, labels.shape), 1).astype(np.float32)
    places, end = {}, 0
    for row, voxels in zip(present, count[present], strict=True):
        own = at[end : (end := end + voxels)]
        nearest = own[((own - own.mean(0, dtype=np.float64)) ** 2).sum(1).argmin()]
        places[int(row)] = np.round(nib.affines.apply_affine(affine, nearest), 2).tolist()
    return places

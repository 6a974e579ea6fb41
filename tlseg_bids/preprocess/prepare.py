"""From a scan to what the card asks for: find the brain, interpolate once, scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tlseg_bids.errors import ScanError
from tlseg_bids.flow import Prepared
from tlseg_bids.preprocess.brain import looks_skull_stripped
from tlseg_bids.preprocess.geometry import resample
from tlseg_bids.preprocess.intensity import robust_scale
from tlseg_bids.preprocess.register import LEAST_LANDMARKS, template_from_probabilities
from tlseg_bids.volume import Grid, Volume

Locate = Callable[[np.ndarray], np.ndarray]
WORST_RESIDUAL_MM = 15.0


def foreground_centre(volume: Volume) -> np.ndarray:
    """Centre of the voxels brighter than the mean, in world mm, (3,)."""
    step = [max(n // 96, 1) for n in volume.data.shape]
    thin = volume.data[:: step[0], :: step[1], :: step[2]]
    index = np.argwhere(thin > thin.mean()).mean(0) * step
    return volume.grid.affine[:3, :3] @ index + volume.grid.affine[:3, 3]


def cube(middle_from_world: np.ndarray, size: int, spacing_mm: float) -> Grid:
    """A cube of `size`³ voxels around the origin of a frame, as a grid in the world."""
    frame = np.diag([spacing_mm] * 3 + [1.0])
    frame[:3, 3] = -(size - 1) / 2 * spacing_mm
    return Grid((size,) * 3, np.linalg.inv(middle_from_world) @ frame)


def find_template(
    volume: Volume, locate: Locate, template: np.ndarray, options: dict[str, Any]
) -> np.ndarray:
    """The affine (4, 4) from the scan's world to the template, both in mm.

    The locator looks twice: at a cube around the head along the scanner's axes, then at one in
    the frame that the first look found, where a turned or small head is upright and of the
    template's size.

    Raises
    ------
    ScanError
        If too few structures are found or they do not lie as in a brain.
    """
    size, spacing = int(options["size"]), float(options["spacing_mm"])
    frame = np.eye(4)
    frame[:3, 3] = -foreground_centre(volume)
    for _ in range(int(options.get("looks", 2))):
        grid = cube(frame, size, spacing)
        probabilities = locate(resample(volume, grid))
        factor = size / probabilities.shape[1]
        coarse = np.diag([factor] * 3 + [1.0])
        coarse[:3, 3] = (factor - 1) / 2
        found, landmarks, residual = template_from_probabilities(
            probabilities, grid.affine @ coarse, template
        )
        if landmarks < LEAST_LANDMARKS or residual > WORST_RESIDUAL_MM:
            raise ScanError(
                f"no brain found ({landmarks} structures recognised, "
                f"{residual:.0f} mm off the template)",
                "", "check that the scan shows a whole brain and that its header's orientation "
                "is right",
            )  # fmt: skip
        frame = found
    return frame


def prepare(
    volume: Volume,
    options: dict[str, Any],
    locate: Locate,
    template: np.ndarray,
    skull_stripped: bool | None,
) -> Prepared:
    """The image on the card's grid, in the template's frame.

    Parameters
    ----------
    volume : Volume
        The scan, float32, on its own grid.
    options : dict
        The card's ``preprocess`` table: ``locator`` (size, spacing_mm, looks), ``box_mm``
        ([low, high] per template axis) and ``spacing_mm``.
    locate : callable
        Image (I, J, K) to class probabilities (channels, i, j, k).
    template : ndarray, shape (channels, 3)
        Template centroids in mm.
    skull_stripped : bool or None
        As the sidecar says; None asks the voxels.

    Raises
    ------
    ScanError
        If no brain is found.
    """
    template_from_native = find_template(volume, locate, template, options["locator"])
    spacing = float(options["spacing_mm"])
    low, high = np.array(options["box_mm"], float).T
    shape = tuple(int(n) for n in np.round((high - low) / spacing))
    frame = np.diag([spacing] * 3 + [1.0])
    frame[:3, 3] = low + spacing / 2
    grid = Grid(shape, np.linalg.inv(template_from_native) @ frame)
    image = robust_scale(resample(volume, grid), low=0.0, high=99.9)
    if skull_stripped is None:
        skull_stripped = looks_skull_stripped(volume)
    return Prepared(
        image=image[None].astype(np.float32, copy=False),
        grid=grid,
        native=volume,
        template_from_native=template_from_native,
        skull_stripped=skull_stripped,
        steps=("locate", "resample", "scale"),
    )

"""From a scan to what the card asks for: find the brain, interpolate once, scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.errors import ScanError, amount
from tlseg_bids.flow import Prediction, Prepared
from tlseg_bids.labels.landmarks import Landmarks
from tlseg_bids.preprocess.geometry import interpolated, thinned
from tlseg_bids.preprocess.intensity import scaled, standardise
from tlseg_bids.preprocess.register import (
    LEAST_LANDMARKS,
    TURNS,
    displacement_mm,
    fits_a_head,
    template_from_probabilities,
)
from tlseg_bids.volume import Grid, Volume

Locate = Callable[[Tensor], np.ndarray]
WORST_RESIDUAL_MM = 15.0


def foreground_centre(volume: Volume) -> np.ndarray:
    """Centre of the voxels brighter than the mean, in world mm, (3,)."""
    step = [max(n // 96, 1) for n in volume.data.shape]
    thin = volume.data[:: step[0], :: step[1], :: step[2]]
    bright = thin > thin.mean()
    along = [bright.sum(tuple(a for a in range(3) if a != axis)) for axis in range(3)]
    index = np.array([np.arange(len(n)) @ n / n.sum() for n in along]) * step
    return volume.grid.affine[:3, :3] @ index + volume.grid.affine[:3, 3]


def cube(middle_from_world: np.ndarray, size: int, spacing_mm: float) -> Grid:
    """A cube of `size`³ voxels around the origin of a frame, as a grid in the world."""
    frame = np.diag([spacing_mm] * 3 + [1.0])
    frame[:3, 3] = -(size - 1) / 2 * spacing_mm
    return Grid((size,) * 3, np.linalg.inv(middle_from_world) @ frame)


def looks(
    volume: Volume, options: dict[str, Any], locate: Locate, template: Landmarks,
    turn: np.ndarray = TURNS[0], crew: Crew = ALONE,
) -> Iterator[np.ndarray]:  # fmt: skip
    """The affine (4, 4) from the scan's world to the template, both in mm, after every look.

    The locator looks at a cube around the head along the scanner's axes, then at one in the frame
    that the look before found, where a turned or small head is upright and of the template's size.

    Parameters
    ----------
    options : dict
        The card's ``preprocess`` table; of it ``locator``: size (voxels), spacing_mm, looks.
    turn : ndarray, shape (4, 4)
        Turns the first cube against the scanner's axes.
    crew : Crew
        Shares out the interpolation.

    Raises
    ------
    ScanError
        If too few structures are found or they do not lie as in a brain.
    """
    look = options["locator"]
    size, spacing = int(look["size"]), float(look["spacing_mm"])
    thin = thinned(volume, spacing)
    frame = np.eye(4)
    frame[:3, 3] = -foreground_centre(thin)
    frame = turn @ frame
    for _ in range(int(look["looks"])):
        grid = cube(frame, size, spacing)
        probabilities = locate(interpolated(thin, grid, crew=crew))
        factor = size / probabilities.shape[1]
        coarse = np.diag([factor] * 3 + [1.0])
        coarse[:3, 3] = (factor - 1) / 2
        found, landmarks, residual = template_from_probabilities(
            probabilities, grid.affine @ coarse, template, volume.grid
        )
        lost = landmarks < LEAST_LANDMARKS or residual > WORST_RESIDUAL_MM
        if lost or not fits_a_head(found):
            sizes = "" if lost else ", far apart or close together as in no head"
            raise ScanError(
                f"no brain found ({amount(landmarks, 'structure')} recognised, "
                f"{residual:.0f} mm off the template{sizes})",
                "", "check that the scan shows a whole brain and that its header's orientation "
                "and voxel size are right",
            )  # fmt: skip
        frame = found
        yield frame


def prepare(
    volume: Volume, options: dict[str, Any], template_from_native: np.ndarray,
    channels: Sequence[Volume] = (), crew: Crew = ALONE, brain: Tensor | None = None,
) -> Prepared:  # fmt: skip
    """The image on the card's grid, in the template's frame: one interpolation.

    Parameters
    ----------
    volume : Volume
        The scan, float32, on its own grid.
    options : dict
        The card's ``preprocess`` table: ``box_mm`` ([low, high] per template axis),
        ``spacing_mm`` and, if it has any, the landmarks of its ``standard`` intensity scale.
    template_from_native : ndarray, shape (4, 4)
        World mm to template mm.
    channels : sequence of Volume, optional
        The images that the model sees together, in its order, the scan among them; they lie in the
        scan's world. The scan alone if not given.
    crew : Crew
        Shares out the interpolation; what is prepared lies on its device.
    brain : Tensor of bool, optional
        Where the card's grid shows brain: these voxels decide how the image is scaled, so that fat
        many times as bright does not. All of it if not given.
    """
    spacing = float(options["spacing_mm"])
    low, high = np.array(options["box_mm"], float).T
    shape = tuple(int(n) for n in np.round((high - low) / spacing))
    frame = np.diag([spacing] * 3 + [1.0])
    frame[:3, 3] = low + spacing / 2
    grid = Grid(shape, np.linalg.inv(template_from_native) @ frame)
    images = [
        scaled(interpolated(_standard(one, options), grid, crew=crew), 0.0, 99.9, brain)
        for one in channels or (volume,)
    ]
    return Prepared(
        image=torch.stack(images) if channels else images[0][None],
        grid=grid,
        native=volume,
        template_from_native=template_from_native,
        skull_stripped=None,
        steps=("locate", "resample", "scale"),
    )


def _standard(volume: Volume, options: dict[str, Any]) -> Volume:
    """On the standard scale, if the card has one; the whole scan's histogram counts."""
    if not options.get("standard"):
        return volume
    return Volume(standardise(volume.data, np.asarray(options["standard"])), volume.grid)


def better_frame(
    prediction: Prediction, template_from_native: np.ndarray, template: Landmarks,
    native: Grid | None = None,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """The frame that a segmentation asks for, and how far it is from the one it was made in.

    Parameters
    ----------
    prediction : Prediction
        Made in the frame `template_from_native`.
    template : Landmarks
    native : Grid, optional
        Of the scan; not given, it shows everything.

    Returns
    -------
    matrix : ndarray, shape (4, 4)
        World mm to template mm; the old one if too few structures were found, or if they lie as in
        no head.
    distance_mm : float
        See `displacement_mm`.
    """
    found, landmarks, _ = template_from_probabilities(
        prediction.probabilities, prediction.grid.affine, template, native
    )
    if landmarks < LEAST_LANDMARKS or not fits_a_head(found):
        return template_from_native, 0.0
    return found, displacement_mm(template_from_native, found, template.centroids)

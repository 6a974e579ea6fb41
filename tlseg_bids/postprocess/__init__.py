"""The way back: probabilities on the model's grid to labels on the scan's own.

The probabilities, never the labels, are interpolated, once. Where a scan's voxel is much larger
than the model's (thick slices), it takes the mean of the probabilities inside it. Memory stays
small: no probability array of the scan's size ever exists.

Then each structure keeps its main piece, the voxels of the other pieces go to their next most
probable structure, and holes in the brain are closed the same way.
"""

from __future__ import annotations

import numpy as np
import torch

from tlseg_bids.crew import ALONE, Crew
from tlseg_bids.flow import Prediction, Segmentation
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess.cleaning import Cleaning, as_byte, bounding_box
from tlseg_bids.postprocess.field import ProbabilityField, probability_maps, resample_probabilities
from tlseg_bids.postprocess.quality import (
    OUTER_FLUID,
    flags,
    intracranial,
    quality,
    volume_table,
)
from tlseg_bids.volume import Volume
from tlseg_bids.zoo.calibration import Calibration

__all__ = [
    "ProbabilityField",
    "most_probable",
    "probability_maps",
    "resample_probabilities",
    "to_native",
]


def to_native(
    prediction: Prediction, native: Volume, protocol: LabelProtocol,
    calibration: Calibration | None = None, skull_stripped: bool | None = None,
    crew: Crew = ALONE,
) -> Segmentation:  # fmt: skip
    """Probabilities on the model's grid to a clean segmentation on the scan's grid.

    Parameters
    ----------
    prediction : Prediction
        Probabilities (channels, I, J, K), channels in the protocol's order.
    native : Volume
        The scan; only its grid counts.
    protocol : LabelProtocol
        What the channels are.
    calibration : Calibration, optional
        Of the card that labelled the scan.
    skull_stripped : bool, optional
        Whether the scan shows the brain alone; then, and where it is not known, the intracranial
        volume is not measured.
    crew : Crew
        Shares out the scan's voxels.

    Returns
    -------
    Segmentation
        `volumes` as `tlseg_bids.postprocess.quality.volume_table`, `qc` as `quality` there and
        ``icv_mm3`` where it can be measured; where not, `unmeasured` says why. ``predicted_age``
        (years) where the model reads one from the image.
    """
    if len(prediction.probabilities) != len(protocol):
        raise ValueError(
            f"{len(prediction.probabilities)} channels for {len(protocol)} labels of "
            f"protocol '{protocol.name}'"
        )
    field = ProbabilityField(prediction.probabilities, prediction.grid, native.grid)
    channel, confidence, soft = most_probable(field, crew)
    box = bounding_box(channel, margin=1)
    cleaning = Cleaning(field, channel[box], confidence[box], [s.start for s in box], protocol)
    mask = np.zeros(channel.shape, bool)
    mask[box], removed = cleaning.run(native.grid.voxel_mm3)
    table = volume_table(
        channel[box], confidence[box], soft, protocol, native.grid.voxel_mm3, calibration
    )
    fluid = np.isin(channel, protocol.channels(group=OUTER_FLUID))
    qc = quality(table, mask, protocol, native.grid.voxel_mm3, fluid)
    qc["model_border_share"] = field.border_share
    qc["pieces_removed"] = float(removed)
    icv, why = intracranial(mask, qc, protocol, native.grid.voxel_mm3, skull_stripped)
    if icv is not None:
        qc["icv_mm3"] = icv
    if prediction.age is not None:
        qc["predicted_age"] = prediction.age
    channel[box] = protocol.indices[channel[box]]
    return Segmentation(
        labels=Volume(channel, native.grid), confidence=confidence, brain_mask=mask,
        volumes=table, qc=qc, flags=flags(table, qc, protocol),
        unmeasured={"icv_mm3": why} if why else {},
    )  # fmt: skip


def most_probable(
    field: ProbabilityField, crew: Crew = ALONE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The likeliest channel everywhere.

    Returns
    -------
    channel : ndarray, int16
        On the native grid.
    confidence : ndarray, uint8
        Its probability × 255.
    soft : ndarray, shape (channels,)
        Sum of each channel's probability over the voxels that may hold something.
    """
    shape, there = field.native.shape, field.device
    channel = torch.zeros(shape, dtype=torch.int16, device=there)
    confidence = torch.full(shape, 255, dtype=torch.uint8, device=there)
    exact = torch.float32 if there.type == "mps" else torch.float64  # which that has not
    soft = np.zeros(field.channels)

    def fill(voxels: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():  # a mode of each thread, and the caller's may be in it
            top = probabilities.max(dim=1)
            channel.view(-1).scatter_(0, voxels, top.indices.to(channel.dtype))
            confidence.view(-1).scatter_(0, voxels, as_byte(top.values))
            return probabilities.sum(0, dtype=exact)

    for found in field.each(fill, crew):
        soft += found.cpu().numpy()
    return channel.cpu().numpy(), confidence.cpu().numpy(), soft

"""Atlases in a file of weights: of each structure only the box that it fills.

An atlas (channels, I, J, K) is mostly 0. In a file it is ``prior.NAME``, the voxels of all boxes,
and ``prior.NAME.boxes``, int16 (1 + channels, 2, 3): the grid's, then each channel's first voxel
and the one behind its last. A file that holds atlases whole is read, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tlseg_bids.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PRIOR, BOXES = "prior.", ".boxes"
MOST_BYTES = 2**29


def pack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every atlas (uint8, four axes) cut down to its boxes."""
    found = dict(tensors)
    for key, atlas in tensors.items():
        if not key.startswith(PRIOR) or atlas.dtype != torch.uint8 or atlas.dim() != 4:
            continue
        boxes = torch.stack([_box(torch.ones(atlas.shape[1:])), *map(_box, atlas)])
        parts = [atlas[n][_slices(box)].flatten() for n, box in enumerate(boxes[1:])]
        found[key], found[f"{key}{BOXES}"] = torch.cat(parts), boxes
    return found


def unpack(tensors: dict[str, Tensor], where: Path | str) -> dict[str, Tensor]:
    """The tensors with every atlas whole again.

    Raises
    ------
    DataError
        If boxes and voxels do not fit together.
    """
    found = {key: value for key, value in tensors.items() if not _of_boxes(key)}
    for key in filter(_of_boxes, tensors):
        name, boxes = key.removesuffix(BOXES), tensors[key]
        voxels = tensors.get(name)
        if voxels is None or not _fit(voxels, boxes):
            raise DataError(
                f"the atlas '{name}' does not fit its boxes", where, "export the model again"
            )
        atlas = torch.zeros(len(boxes) - 1, *boxes[0, 1].tolist(), dtype=torch.uint8)
        at = 0
        for channel, box in zip(atlas, boxes[1:], strict=True):
            shape = (box[1] - box[0]).tolist()
            size = shape[0] * shape[1] * shape[2]
            channel[_slices(box)] = voxels[at : at + size].reshape(shape)
            at += size
        found[name] = atlas
    return found


def _of_boxes(key: str) -> bool:
    return key.startswith(PRIOR) and key.endswith(BOXES)


def _box(channel: Tensor) -> Tensor:
    """First voxel and the one behind the last that are not 0, int16 (2, 3)."""
    places = channel.nonzero()
    if not len(places):
        return torch.zeros(2, 3, dtype=torch.int16)
    return torch.stack([places.amin(0), places.amax(0) + 1]).short()


def _slices(box: Tensor) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box.T.tolist())


def _fit(voxels: Tensor, boxes: Tensor) -> bool:
    if voxels.dtype != torch.uint8 or voxels.dim() != 1 or boxes.dtype != torch.int16:
        return False
    if boxes.dim() != 3 or boxes.shape[1:] != (2, 3) or len(boxes) < 2:
        return False
    ends = boxes.long()
    if (ends[0, 0] != 0).any() or (ends < 0).any() or (ends[:, 0] > ends[:, 1]).any():
        return False
    within = (ends[:, 1] <= ends[0, 1]).all()
    whole = (len(boxes) - 1) * ends[0, 1].double().prod()
    return (
        bool(within)
        and whole <= MOST_BYTES
        and int((ends[1:, 1] - ends[1:, 0]).prod(1).sum()) == len(voxels)
    )

"""Repairs of a label map: one main piece per structure, no holes.

A voxel that is taken from a structure goes to its next most probable one, and only where that is
a stray piece again to what surrounds it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage

from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess.field import ProbabilityField

SPREAD_GROUPS = ("cortex", "white-matter", "csf", "outer-csf")
KEPT_PIECE_SHARE = 0.1
FAR_PIECE_SHARE = 0.01
SHELL_SHARE = 0.7
MAX_HOLE_MM3 = 1000.0

_ANY_NEIGHBOUR = np.ones((3, 3, 3), bool)


def as_byte(probability: torch.Tensor) -> torch.Tensor:
    """0 … 1 to 0 … 255."""
    return (probability * 255).round_().clamp_(0, 255).to(torch.uint8)


def _as_byte(probability: np.ndarray) -> np.ndarray:
    return as_byte(torch.from_numpy(probability)).numpy()


def bounding_box(channel: np.ndarray, margin: int) -> tuple[slice, ...]:
    """The smallest box of everything above 0; one voxel at the origin if there is nothing."""
    box = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        hit = np.flatnonzero(channel.any(axis=other))
        ends = (hit[0], hit[-1] + 1) if hit.size else (0, 1)
        box.append(slice(max(0, int(ends[0]) - margin), int(ends[1]) + margin))
    return tuple(box)


class Cleaning:
    """Repairs of the channel map inside the brain's box, in place.

    Parameters
    ----------
    field : ProbabilityField
        Asked for the next most probable structure.
    channel, confidence : ndarray, int16 and uint8
        Views of the native arrays inside the box.
    corner : sequence of int
        First native index of the box.
    protocol : LabelProtocol
        Its groups say which structures may have several pieces.
    """

    def __init__(
        self, field: ProbabilityField, channel: np.ndarray, confidence: np.ndarray,
        corner: np.ndarray, protocol: LabelProtocol,
    ) -> None:  # fmt: skip
        self.field, self.channel, self.confidence = field, channel, confidence
        self.corner = np.asarray(corner)
        self.is_spread = np.isin(protocol.table["group"].to_numpy(), SPREAD_GROUPS)

    def run(self, voxel_mm3: float) -> tuple[np.ndarray, int]:
        """All repairs.

        Returns
        -------
        brain : ndarray of bool
            The brain without any hole, in the box.
        removed : int
            Pieces that were taken from their structure.
        """
        removed = self._drop_far_pieces()
        holes, _ = self._holes(voxel_mm3)
        self._give_next_best(holes, banned=np.zeros(len(holes), int))
        lost, count = self._lost_pieces()
        if count:
            where = np.argwhere(lost)
            self._give_next_best(where, banned=self.channel[tuple(where.T)])
            self._give_neighbours(np.argwhere(self._lost_pieces()[0]))
        holes, brain = self._holes(voxel_mm3)
        self._give_neighbours(holes)
        return brain, removed + count

    def _holes(self, voxel_mm3: float) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the small holes, and the brain with every hole filled."""
        ground, count = ndimage.label(np.pad(self.channel == 0, 1, constant_values=True))
        ground = ground[1:-1, 1:-1, 1:-1]
        brain = ground != 1
        if count < 2:
            return np.zeros((0, 3), int), brain
        sizes = np.bincount(ground.ravel())
        small = sizes * voxel_mm3 <= MAX_HOLE_MM3
        small[:2] = False
        return np.argwhere(small[ground]), brain

    def _drop_far_pieces(self) -> int:
        """Pieces of brain apart from the brain become background."""
        pieces, count = ndimage.label(self.channel > 0, _ANY_NEIGHBOUR)
        if count < 2:
            return 0
        sizes = np.bincount(pieces.ravel())
        sizes[0] = 0
        far = (sizes < FAR_PIECE_SHARE * sizes.max()) & (sizes > 0)
        where = np.argwhere(far[pieces])
        at = tuple(where.T)
        self.channel[at] = 0
        self.confidence[at] = _as_byte(self._probabilities(where)[:, 0])
        return int(far.sum())

    def _lost_pieces(self) -> tuple[np.ndarray, int]:
        """Voxels of the pieces that a structure does not keep, and the number of pieces."""
        lost, count = np.zeros(self.channel.shape, bool), 0
        reach = SHELL_SHARE * np.array(self.channel.shape)
        for number, box in enumerate(ndimage.find_objects(self.channel), start=1):
            if box is None or all(s.stop - s.start >= r for s, r in zip(box, reach, strict=True)):
                continue
            pieces, found = ndimage.label(self.channel[box] == number, _ANY_NEIGHBOUR)
            if found < 2:
                continue
            sizes = np.bincount(pieces.ravel())
            sizes[0] = 0
            keep = np.arange(len(sizes)) == sizes.argmax()
            if self.is_spread[number]:
                keep |= sizes >= KEPT_PIECE_SHARE * sizes.max()
            keep[0] = True
            lost[box] |= ~keep[pieces]
            count += int((~keep).sum())
        return lost, count

    def _probabilities(self, where: np.ndarray) -> np.ndarray:
        """Probabilities at positions (n, 3) of the box."""
        voxels = np.ravel_multi_index((where + self.corner).T, self.field.native.shape)
        return self.field.at(voxels)

    def _give_next_best(self, where: np.ndarray, banned: np.ndarray) -> None:
        """The most probable channel other than `banned` at each position."""
        probabilities = self._probabilities(where)
        probabilities[np.arange(len(where)), banned] = -1
        best = probabilities.argmax(axis=1)
        at = tuple(where.T)
        self.channel[at] = best
        self.confidence[at] = _as_byte(probabilities[np.arange(len(where)), best])

    def _give_neighbours(self, where: np.ndarray) -> None:
        """The commonest channel among the settled face neighbours, from the rim inwards."""
        steps = np.concatenate([np.eye(3, dtype=int), -np.eye(3, dtype=int)])
        open_ = np.pad(np.zeros(self.channel.shape, bool), 1)
        open_[tuple((where + 1).T)] = True
        values = np.pad(self.channel, 1, constant_values=-1)
        while len(where):
            around = (where[:, None, :] + 1 + steps).reshape(-1, 3)
            at = tuple(around.T)
            candidates = np.where(open_[at], -1, values[at]).reshape(len(where), 6)
            votes = (candidates[:, :, None] == candidates[:, None, :]).sum(axis=2)
            votes[candidates < 0] = 0
            chosen = candidates[np.arange(len(where)), votes.argmax(axis=1)]
            settled = chosen >= 0
            if not settled.any():
                break
            at = tuple(where[settled].T)
            probability = self._probabilities(where[settled])
            self.channel[at] = chosen[settled]
            of_chosen = probability[np.arange(len(probability)), chosen[settled]]
            self.confidence[at] = _as_byte(of_chosen)
            values[tuple((where[settled] + 1).T)] = chosen[settled]
            open_[tuple((where[settled] + 1).T)] = False
            where = where[~settled]

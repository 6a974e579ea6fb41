"""What a model says at random voxels of a scan, and what the reference says there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from tlseg_bids.app import finely
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import UsageError
from tlseg_bids.flow import Job, Prepared
from tlseg_bids.labels.mapping import LEFT_OUT, LabelMapping, load_mapping, look_up
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol
from tlseg_bids.placing import find
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Model
from tlseg_bids.volume import Volume, load_labels, load_scan

POINTS = 3000
TRIED = 200_000
CERTAIN = 1 - 1 / 512


@dataclass(frozen=True)
class Reference:
    """A dataset, its derivative with the reference, the mapping between the protocols."""

    dataset: str
    labels: str
    mapping: LabelMapping | None

    @classmethod
    def parse(cls, words: str) -> Reference:
        """From ``DATASET:LABELS:MAPPING``."""
        parts = words.split(":")
        if len(parts) != 3:
            raise UsageError(f"'{words}' is not DATASET:LABELS:MAPPING", "", "name all three")
        return cls(*parts[:2], None if parts[2] == "none" else load_mapping(parts[2]))

    def common(self, protocol: LabelProtocol) -> LabelProtocol:
        """The protocol in which prediction and reference meet."""
        ours = self.mapping is not None and self.mapping.source.name == protocol.name
        return self.mapping.target if ours and self.mapping is not None else protocol

    def fold(self, protocol: LabelProtocol) -> np.ndarray:
        """(common channels, channels) that merges channels into those of `common`."""
        if self.mapping is not None and self.mapping.source.name == protocol.name:
            return self.mapping.channel_matrix()
        return np.eye(len(protocol), dtype=np.float32)

    def targets(self, labels: np.ndarray, protocol: LabelProtocol) -> np.ndarray:
        """Channel of `common` of reference labels; `LEFT_OUT` where it cannot be scored."""
        common, mapping = self.common(protocol), self.mapping
        if mapping is not None and mapping.target.name == protocol.name:
            labels = mapping.apply(labels)
        known = {int(label): channel for channel, label in enumerate(common.indices)}
        for unreached in mapping.unreached if mapping is not None else ():
            known.pop(unreached)
        return look_up(labels, known)


def shown(path: Path, model: Model) -> tuple[Scan, tuple[Scan, ...]]:
    """A scan, and those beside it that the model sees as further channels."""
    stem, _, suffix = path.name.removesuffix(".nii.gz").rpartition("_")
    others = [one for one in model.card.channels if one != suffix]
    beside = tuple(
        Scan(path.with_name(f"{stem}_{one}.nii.gz"), path.parent, {}, one) for one in others
    )
    return Scan(path, path.parent, {}, suffix), beside


def both_ways(path: Path, scan: Volume, model: Model) -> tuple[list[np.ndarray], np.ndarray]:
    """Fine probabilities of a scan as it is and of its mirror image, brought back.

    A network with a sub-voxel answer averages the logits of both before it answers; its one answer
    to the power 1/T is what it says at the temperature T.

    Returns
    -------
    probabilities : list of 1 or 2 ndarray, shape (channels, I, J, K)
        Two where the probabilities of both are averaged.
    matrix : ndarray, shape (4, 4)
        From native voxels to those of the probabilities.
    """
    card = model.card
    alone = model.networks["segmenter"].coarse_only and card.strategy.get("mirror")
    kept = {k: v for k, v in card.strategy.items() if k != "mirror" or not alone}
    plain = replace(card, strategy=kept)
    once = replace(model, card=plain)
    known, beside = shown(path, model)
    prepared = find(scan, Job(known, plain, "", (), (), "", "cpu", 0.0, beside), once)
    straight = finely(prepared, once)
    found = [np.asarray(straight.probabilities)]
    if alone:
        found.append(in_the_mirror(once, prepared))
    return found, straight.grid.index_from(scan.grid)


def in_the_mirror(model: Model, prepared: Prepared) -> np.ndarray:
    """Fine probabilities of the mirror image alone, brought back."""
    swapped = {
        name: prior.flip(2)[:, torch.as_tensor(load_protocol(name).mirror)]
        for name, prior in model.priors.items()
    }
    turned = replace(prepared, image=prepared.image.flip(1))
    back = np.asarray(segment(replace(model, priors=swapped), turned, Ask()).probabilities)
    return back[:, ::-1][model.protocol.mirror]


def sample(scan: Path, labels: Path, reference: Reference, model: Model) -> dict[str, np.ndarray]:
    """Random voxels of a scan at which something else than background is possible.

    Returns
    -------
    dict
        probabilities (n, 8, passes, channels) float16 at the model voxels around each, weights
        (n, 8) of the interpolation, target (n,), voxels (n,) flat, fold (targets, channels).
    """
    volume, _ = load_scan(scan)
    truth = reference.targets(load_labels(labels).data, model.protocol).reshape(-1)
    found, matrix = both_ways(scan, volume, model)
    draw = np.random.default_rng(0).integers(0, truth.size, TRIED)
    draw = draw[truth[draw] != LEFT_OUT]
    index = np.stack(np.unravel_index(draw, volume.grid.shape), axis=-1)
    place = index @ matrix[:3, :3].T + matrix[:3, 3]
    size = np.array(found[0].shape[1:])
    inside = ((place > -0.5) & (place < size - 0.5)).all(axis=1)
    near = tuple(np.clip(np.rint(place), 0, size - 1).astype(int).T)
    keep = np.flatnonzero(inside & (np.mean([one[0][near] for one in found], axis=0) < CERTAIN))[
        :POINTS
    ]
    low = np.clip(np.floor(place[keep]), 0, size - 2).astype(int)
    share = np.clip(place[keep] - low, 0, 1)
    values, weights = [], []
    for corner in product((0, 1), repeat=3):
        at = (slice(None), *(low + corner).T)
        values.append(np.stack([one[at] for one in found]))
        weights.append(np.prod(np.where(corner, share, 1 - share), axis=1))
    return {
        "probabilities": np.stack(values).transpose(3, 0, 1, 2).astype(np.float16),
        "weights": np.stack(weights, axis=1).astype(np.float32),
        "target": truth[draw[keep]],
        "voxels": draw[keep],
        "fold": reference.fold(model.protocol),
    }

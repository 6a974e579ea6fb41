"""What the base model makes of a labelled scan, and the training sample that it becomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tlseg_bids.adapt.evidence import Evidence, measure
from tlseg_bids.adapt.labels import LabelledScan
from tlseg_bids.adapt.reading import IGNORE, Reading
from tlseg_bids.bids.atomic import atomic
from tlseg_bids.errors import DataError
from tlseg_bids.flow import Job, Prepared, Segmentation
from tlseg_bids.preprocess.prepare import prepare
from tlseg_bids.preprocess.register import displacement_mm
from tlseg_bids.segment.model import Model
from tlseg_bids.train.dataset import (
    Sample,
    align,
    default_protocol,
    load_classes,
    sample_centroids,
    usable_landmarks,
)
from tlseg_bids.train.finetune import SITE
from tlseg_bids.volume import load_volume

MANY_LANDMARKS = 12
"""Of the template's structures that labels have to show for their place to be taken from them."""
UNKNOWN_SHARE = 0.02
"""Of the labelled voxels that may be unknown: structures cut in slices tell no place."""
FAR_MM = 10.0
"""Labels that place a brain farther than that from where the base sees it are not followed: on
infants that the base labels badly (Dice 0.63) it was 3 to 6 mm."""
Answer = Callable[[Job, Model], tuple[Prepared, Segmentation]]
"""How the program labels a scan: the scan as the model saw it, and the labels on its own grid."""


@dataclass(frozen=True, eq=False)
class Inspected:
    """A labelled scan beside the base's answer.

    Parameters
    ----------
    labelled : LabelledScan
        Scan and labels.
    prepared : Prepared
        The scan in the template's frame, which the base found.
    base : ndarray of uint8, shape (I, J, K)
        The base's answer in channels of its protocol, on the scan's grid.
    expected_dice : float
        What the base expects of its answer (`predicted_dice`).
    evidence : Evidence
        Whether the labels belong to the scan.
    """

    labelled: LabelledScan
    prepared: Prepared
    base: np.ndarray
    expected_dice: float
    evidence: Evidence

    @property
    def name(self) -> str:
        """Stem and suffix of the scan."""
        return self.labelled.name


def inspect(
    labelled: LabelledScan, job: Job, model: Model, reading: Reading, answer: Answer, kept: Path
) -> Inspected:
    """Label a scan with the base model and compare; what the model said is kept in `kept`.

    Parameters
    ----------
    job : Job
        Scan and base card.
    kept : Path
        A file (npz) of an earlier run with the same inputs, or where to write one.

    Raises
    ------
    ScanError
        If the base model finds no brain.
    """
    stored = _stored(kept)
    if stored is None:
        prepared, segmentation = answer(job, model)
        base = channels_of(segmentation.labels.data, model.protocol.indices)
        expected = float(segmentation.qc["predicted_dice"])
        with atomic(kept) as stream:
            np.savez_compressed(
                stream, base=base, frame=prepared.template_from_native, expected=expected
            )
    else:
        base, frame, expected = stored
        volume = load_volume(labelled.scan.path)
        prepared = prepare(volume, job.card.preprocess, frame, (), model.crew, model.brain)
    evidence = measure(
        prepared.native, labelled.channels, base, reading, prepared.template_from_native
    )
    return Inspected(labelled, prepared, base, expected, evidence)


def sample_of(inspected: Inspected, reading: Reading, template: np.ndarray) -> Sample:
    """The training sample of a scan: channels as classes, the image, its place in the template.

    The place is the one that the labels give, where they show enough of the template's structures
    (`template`: centroids, mm): the adapted model, which will find those structures where the
    labels have them, sees scans there. Else it is where the base saw the scan.
    """
    protocol = reading.target
    classes = load_classes(protocol)
    number = {int(label): n for n, label in enumerate(classes.index)}
    table = np.full(256, IGNORE, np.uint8)
    missing = [int(label) for label in protocol.indices if int(label) not in number]
    if missing:
        raise DataError(
            f"labels {missing} have no training class", f"protocol '{protocol.name}'",
            "report this as a defect",
        )  # fmt: skip
    table[: len(protocol)] = [number[int(label)] for label in protocol.indices]
    labelled, native = inspected.labelled, inspected.prepared.native
    sample = Sample(
        labelled.name, SITE, torch.from_numpy(table[labelled.channels]),
        {labelled.scan.suffix: torch.from_numpy(np.ascontiguousarray(native.data))},
        native.grid.affine, labelled.group, labelled.sha256, protocol,
        inspected.prepared.template_from_native @ native.grid.affine,
    )  # fmt: skip
    unknown = float((labelled.channels == IGNORE).sum() / max((labelled.channels > 0).sum(), 1))
    known = protocol.name == default_protocol().name and not reading.new_head
    if known and unknown < UNKNOWN_SHARE:
        _place(sample, template)
    return sample


def _place(sample: Sample, template: np.ndarray) -> None:
    """Put a sample where its labels say, unless they are too few or say something else entirely."""
    before = sample.template_from_voxel
    _, mass = sample_centroids(sample)
    if usable_landmarks(sample.group, mass, template).sum() < MANY_LANDMARKS:
        return
    align([sample], template)
    voxel_from_world = np.linalg.inv(sample.world_from_voxel)
    here, there = (m @ voxel_from_world for m in (before, sample.template_from_voxel))
    moved = displacement_mm(here, there, template)
    if moved > FAR_MM:
        sample.template_from_voxel = before


def overlap(
    inspected: Sequence[Inspected], known: Sequence[np.ndarray], channels: int
) -> torch.Tensor:  # fmt: skip
    """Channel of the base that most of each labelled structure's voxels have, shape (channels,).

    Only voxels that are `known` count: bool, one array per scan.
    """
    table = np.zeros((256, 256), np.int64)
    for one, here in zip(inspected, known, strict=True):
        pairs = one.labelled.channels[here].astype(np.int64) * 256 + one.base[here]
        table += np.bincount(pairs.ravel(), minlength=256 * 256).reshape(256, 256)
    return torch.from_numpy(table[:channels].argmax(1))


def channels_of(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Channels uint8 of label indices, in a protocol whose channels have `indices`."""
    table = np.zeros(int(max(labels.max(), indices.max())) + 1, np.uint8)
    table[indices] = np.arange(len(indices))
    return table[labels]


def _stored(path: Path) -> tuple[np.ndarray, np.ndarray, float] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path) as stored:
            return stored["base"], stored["frame"], float(stored["expected"])
    except (OSError, ValueError, KeyError, EOFError):
        return None

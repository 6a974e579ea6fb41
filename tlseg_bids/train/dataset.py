"""What a labelled scan is to training: classes, images, and where it lies in the template."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from tlseg_bids.errors import DataError
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import DEFAULT_PROTOCOL, LabelProtocol, load_protocol
from tlseg_bids.preprocess.register import affine, landmark_weights

HERE = Path(__file__).parent
IGNORE = 255
TEMPLATE_ROUNDS = 5


@dataclass(frozen=True, eq=False)
class Classes:
    """What a training label map distinguishes; row order is the class number used below.

    `target` is the protocol channel of each class, `mirror` its left/right partner, `tissue` the
    row of the contrast table it takes its intensity from (-1: free), `kind` that row's name.
    """

    index: np.ndarray
    target: np.ndarray
    mirror: np.ndarray
    tissue: np.ndarray
    extra: np.ndarray
    kind: np.ndarray
    contrasts: pd.DataFrame


@lru_cache
def load_classes(protocol: LabelProtocol) -> Classes:
    """Classes of the label maps of a protocol.

    Those of the template's protocol are read from `classes.tsv`: they are finer, so that images can
    be synthesised. Any other protocol is its own list of classes, of free intensity.

    Raises
    ------
    DataError
        If there are more than 254 structures.
    """
    contrasts = pd.read_csv(HERE / "contrasts.tsv", sep="\t", index_col="tissue")
    if protocol.name != default_protocol().name:
        return _own_classes(protocol, contrasts)
    table = pd.read_csv(HERE / "classes.tsv", sep="\t")
    channel = {int(i): c for c, i in enumerate(protocol.indices)}
    row = {int(i): n for n, i in enumerate(table["index"])}
    return Classes(
        index=table["index"].to_numpy(),
        target=np.array([channel[t] for t in table["target"]]),
        mirror=np.array([row[m] for m in table["mirror"]]),
        tissue=np.array(
            [contrasts.index.get_loc(t) if t in contrasts.index else -1 for t in table["tissue"]]
        ),
        extra=table["tissue"].str.startswith("extra-").to_numpy(),
        kind=table["tissue"].to_numpy(str),
        contrasts=contrasts,
    )


def _own_classes(protocol: LabelProtocol, contrasts: pd.DataFrame) -> Classes:
    """One class a structure."""
    count = len(protocol)
    if count >= IGNORE:
        raise DataError(
            f"{count} structures are more than the {IGNORE - 1} that training can tell apart",
            f"label protocol '{protocol.name}'", "merge some",
        )  # fmt: skip
    return Classes(
        index=protocol.indices.astype(int),
        target=np.arange(count),
        mirror=protocol.mirror,
        tissue=np.full(count, -1),
        extra=np.zeros(count, bool),
        kind=protocol.table["group"].to_numpy(str),
        contrasts=contrasts,
    )


@dataclass(eq=False)
class Sample:
    """One labelled scan.

    `name` is ``sub-01``, with what else tells a visit's images apart; `classes` uint8 (I, J, K)
    class numbers, `IGNORE` where nothing is known; `images` float32
    (I, J, K) each, on the same voxels; `template_from_voxel` (4, 4); `group` (channels,): the
    merged channel that each channel of `protocol` belongs to in this scan's (partial) labels;
    `age_years` NaN where the dataset does not say it; `head`: protocol that it is learned in, where
    that is not its own; `channels`: images that are shown together, in this order, empty for one;
    `outside`: the class beyond the map.
    """

    name: str
    dataset: str
    classes: torch.Tensor
    images: dict[str, torch.Tensor]
    world_from_voxel: np.ndarray
    group: np.ndarray
    sha256: str
    protocol: LabelProtocol
    template_from_voxel: np.ndarray = field(default_factory=lambda: np.eye(4))
    age_years: float = math.nan
    head: str = ""
    channels: tuple[str, ...] = ()
    outside: int = 0

    @property
    def taught(self) -> str:
        """The protocol that it is learned in."""
        return self.head or self.protocol.name

    def folding(self) -> np.ndarray | None:
        """Matrix (channels of `taught`, channels of `protocol`); None where they are the same."""
        if self.taught == self.protocol.name:
            return None
        return load_mapping(f"{self.protocol.name}_to_{self.taught}").channel_matrix()


def folded(
    channels: torch.Tensor, group: np.ndarray, matrix: np.ndarray
) -> tuple[torch.Tensor, np.ndarray]:
    """Channels and group in another protocol.

    Parameters
    ----------
    channels : Tensor of int64
        Merged channels, `IGNORE` where nothing is known; what has no counterpart becomes that, too.
    group : ndarray, shape (channels,)
        Merged channel of each channel.
    matrix : ndarray, shape (new channels, channels)
        See `LabelMapping.channel_matrix`.

    Returns
    -------
    Tensor of int64, ndarray of shape (new channels,)
        Merged channels of the other protocol, and the merged channel of each of its channels. Where
        one of several sources of a channel is merged with another channel's, both channels are.
    """
    into = np.full(256, IGNORE)
    into[: matrix.shape[1]] = np.where(matrix.sum(0) > 0, matrix.argmax(0), IGNORE)
    new = np.arange(len(matrix))
    for source, merged in enumerate(into[group]):
        if into[source] != IGNORE and merged != IGNORE:
            kept, gone = sorted((new[into[source]], new[merged]))  # the background is always kept
            new[new == gone] = kept
    known = into != IGNORE
    into[known] = new[into[known]]
    return torch.as_tensor(into, device=channels.device)[channels], new


def sample_centroids(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (channels, 3) in mm and masses (channels,) of the template's channels.

    Labels of another protocol are folded by its mapping to the template's.
    """
    target = default_protocol()
    own = load_classes(sample.protocol)
    channel = np.append(own.target, np.zeros(256 - len(own.target), int))
    folded = sample.group[channel[sample.classes.numpy()]]
    folded[sample.classes.numpy() == IGNORE] = 0
    folded = template_channels(sample.protocol)[folded]
    return label_centroids(folded, len(target), sample.world_from_voxel)


def label_centroids(
    labels: np.ndarray, count: int, world_from_voxel: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centroids (count, 3) in mm and masses (count,) in mm³ of the labels 0 to `count` − 1.

    As `tlseg_bids.preprocess.register.centroids` of one map for each label, in four passes for all.
    """
    flat = labels.ravel()
    voxels = np.bincount(flat, minlength=count).astype(float)
    sums = [
        np.bincount(flat, np.broadcast_to(index, labels.shape).ravel(), count)
        for index in np.ogrid[tuple(slice(n) for n in labels.shape)]
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        place = np.stack(sums, 1) / voxels[:, None]
    points = place @ world_from_voxel[:3, :3].T + world_from_voxel[:3, 3]
    return points, voxels * abs(np.linalg.det(world_from_voxel[:3, :3]))


def template_channels(protocol: LabelProtocol) -> np.ndarray:
    """Channel of the template's protocol for each channel of one, (channels,); 0 if none."""
    if protocol.name == default_protocol().name:
        return np.arange(len(protocol))
    mapping = load_mapping(f"{protocol.name}_to_{default_protocol().name}")
    return mapping.channel_matrix().argmax(0)


def build_template(samples: list[Sample], protocol: LabelProtocol) -> np.ndarray:
    """Template centroids (channels, 3) mm: generalised Procrustes mean, left/right symmetric.

    Source: Gower 1975, doi:10.1007/BF02291478. The mean keeps the average size of the samples;
    x = 0 is the mid-sagittal plane and the origin the mean of all landmarks.
    """
    found = [sample_centroids(s) for s in samples]
    points = np.stack([p for p, _ in found])
    weights = landmark_weights(np.stack([m for _, m in found]))
    weights[:, 0] = 0
    mean = points[0] - np.nanmean(points[0][1:], 0)
    for _ in range(TEMPLATE_ROUNDS):
        moved, sizes = [], []
        for p, w in zip(points, weights, strict=True):
            ok = (w > 0) & np.isfinite(mean).all(1)
            m = affine(p[ok], mean[ok], w[ok], ridge=1e3)
            moved.append(p @ m[:3, :3].T + m[:3, 3])
            sizes.append(np.cbrt(np.linalg.det(m[:3, :3])))
        mean = np.ma.masked_invalid(moved).mean(0).filled(np.nan)
        mean = (mean + mean[protocol.mirror] * [-1, 1, 1]) / 2
        mean *= np.exp(-np.mean(np.log(sizes)))
    mean[0] = np.nan
    return mean - [0, *np.nanmean(mean, 0)[1:]]


def align(samples: list[Sample], template: np.ndarray) -> None:
    """Set `template_from_voxel` of every sample from its centroids."""
    for sample in samples:
        points, mass = sample_centroids(sample)
        own = sample.protocol.name == default_protocol().name
        group = sample.group if own else np.arange(len(mass))
        use = usable_landmarks(group, mass, template)
        matrix = affine(points[use], template[use], landmark_weights(mass)[use])
        sample.template_from_voxel = matrix @ sample.world_from_voxel


def usable_landmarks(group: np.ndarray, mass: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Channels that are present, have a template centroid and are not merged with another."""
    alone = np.bincount(group, minlength=len(group)) == 1
    return alone & (mass > 50) & np.isfinite(template).all(1)


def default_protocol() -> LabelProtocol:
    """The protocol of the template: of its centroids, and of what the locator finds."""
    return load_protocol(DEFAULT_PROTOCOL)

"""Do the labels belong to the scan? Asked of the scan itself and of the base model's answer.

Three things are measured. *Sides*: in the template's frame the left structure's centroid must lie
left of its partner's. *Agreement*: Dice between the base model's answer and the labels over large
structures, and the median distance between their centroids; for labels in a protocol that the base
does not know, how pure its answer is inside each structure. *Explained*: the share of the variance
of the scan's intensity ranks inside the brain that the labels explain (η², the correlation ratio;
Roche et al. 1998, doi:10.1007/BFb0056301), beside that of the base's answer and of the labels moved
by 8 to 24 mm. The last needs no model that knows the contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import ndimage

from tlseg_bids.adapt.reading import IGNORE, Reading
from tlseg_bids.postprocess.image_quality import explained as variance_between
from tlseg_bids.volume import Grid, Volume

LARGE_MM3 = 1000.0
LEAST_PAIR_MM3 = 50.0
POINTS = 60_000
RIM_VOXELS = 3
LEAST_SHARE = 0.7
LEAST_AGREEMENT = 0.8
FAR_FROM_OTHERS = 0.25
FAR_AGREEMENT = 0.3
MOVED_MM = 12.0
NEARLY_AS_GOOD = 1.0
MOVES_MM = (8.0, 16.0, 24.0)


@dataclass(frozen=True)
class Evidence:
    """What was measured of one labelled scan.

    Parameters
    ----------
    pairs, crossed : int
        Left/right pairs that could be judged, and those whose left lies to the right.
    agreement : float
        Mean Dice with the base's answer over structures above `LARGE_MM3`, or purity; NaN if
        nothing can be compared.
    shift_mm : float
        Length of the median difference of centroids, labels to base; NaN where the base knows no
        such structures.
    explained, explained_by_base, explained_moved : float
        η² of the labels, of the base's answer, and of the labels at the best of the places tried
        around.
    moved_mm : tuple of float
        That place, RAS+ mm from where the labels are.
    """

    pairs: int
    crossed: int
    agreement: float
    shift_mm: float
    explained: float
    explained_by_base: float
    explained_moved: float
    moved_mm: tuple[float, float, float]


def measure(
    image: Volume, channels: np.ndarray, base: np.ndarray, reading: Reading, frame: np.ndarray
) -> Evidence:
    """Compare labels with a scan and with the base's answer on the same grid.

    Parameters
    ----------
    image : Volume
        The scan.
    channels : ndarray of uint8, shape (I, J, K)
        Labels as channels of `reading.target`, `IGNORE` where unknown.
    base : ndarray of uint8, shape (I, J, K)
        Channels of the base's protocol.
    reading : Reading
        What `channels` mean.
    frame : ndarray, shape (4, 4)
        World mm to template mm.
    """
    box = _box((channels != 0) | (base != 0))
    image, channels, base = _part(image, box), channels[box], base[box]
    folded = _folded(channels, reading.group)
    known = folded != IGNORE
    answer = base if reading.new_head else _folded(base, reading.group)
    agreement, shift = (_purity if reading.new_head else _agreement)(folded, answer, known, image)
    pairs, crossed = _sides(folded, reading, frame @ image.grid.affine)
    points = _places(folded, answer)
    ranks = ranks_of(image.data[tuple(points.T)])
    moved, place = _best_moved(ranks, folded, points, image)
    return Evidence(
        pairs, crossed, agreement, shift,
        explained(ranks, _at(folded, points)),
        explained(ranks, np.where(_at(folded, points) == IGNORE, IGNORE, _at(answer, points))),
        moved, place,
    )  # fmt: skip


def explained(values: np.ndarray, classes: np.ndarray) -> float:
    """Share of the variance of `values` that their `classes` explain, `IGNORE` left out; 0 to 1."""
    keep = classes != IGNORE
    return variance_between(values[keep], classes[keep]) if keep.any() else 0.0


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Rank of each of the values (n,), from 1; equal ones share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place]


def _folded(channels: np.ndarray, group: np.ndarray) -> np.ndarray:
    table = np.full(256, IGNORE, np.uint8)
    table[: len(group)] = group
    return table[channels]


def _at(channels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Channels at voxel indices (n, 3); background outside the array."""
    inside = ((points >= 0) & (points < channels.shape)).all(1)
    out = np.zeros(len(points), np.uint8)
    out[inside] = channels[tuple(points[inside].T)]
    return out


def _box(wanted: np.ndarray) -> tuple[slice, ...]:
    """The smallest box of what is wanted, with room for the rim."""
    box = []
    for axis in range(3):
        hit = np.flatnonzero(wanted.any(axis=tuple(a for a in range(3) if a != axis)))
        ends = (hit[0], hit[-1] + 1) if hit.size else (0, wanted.shape[axis])
        box.append(slice(max(0, int(ends[0]) - RIM_VOXELS), int(ends[1]) + RIM_VOXELS))
    return tuple(box)


def _part(image: Volume, box: tuple[slice, ...]) -> Volume:
    data = image.data[box]
    affine = image.grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return Volume(data, Grid(data.shape, affine))


def _places(labels: np.ndarray, answer: np.ndarray) -> np.ndarray:
    """Voxels (n, 3) on which labels and answer are compared: the answer's structures and a rim.

    The place does not depend on the labels, so that labels in the air outside gain nothing.
    """
    structures = answer > 0
    if not structures.any():
        structures = (labels > 0) & (labels != IGNORE)
    points = np.argwhere(ndimage.binary_dilation(structures, iterations=RIM_VOXELS))
    return points[:: max(1, len(points) // POINTS)]


def _centroids(channels: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    """Centroid of every channel in mm, (256, 3); NaN where there is none."""
    where = np.nonzero((channels > 0) & (channels != IGNORE))
    values = channels[where]
    count = np.bincount(values, minlength=256)
    sums = [np.bincount(values, index.astype(np.float64), minlength=256) for index in where]
    with np.errstate(invalid="ignore"):
        index = np.stack(sums, 1) / count[:, None]
    return index @ to_mm[:3, :3].T + to_mm[:3, 3]


def _agreement(
    labels: np.ndarray, base: np.ndarray, known: np.ndarray, image: Volume
) -> tuple[float, float]:
    """Mean Dice over large structures, and the median distance of their centroids in mm."""
    count = 256
    one = np.bincount(labels[known], minlength=count)
    other = np.bincount(base[known], minlength=count)
    both = np.bincount(labels[known & (labels == base)], minlength=count)
    large = (one * image.grid.voxel_mm3 > LARGE_MM3) & (np.arange(count) < IGNORE)
    large[0] = False
    if not large.any():
        return float("nan"), float("nan")
    dice = 2 * both[large] / (one + other)[large]
    large &= other * image.grid.voxel_mm3 > LARGE_MM3
    places = [_centroids(np.where(known, m, 0), image.grid.affine) for m in (labels, base)]
    gaps = (places[0] - places[1])[large]
    shift = float(np.linalg.norm(np.median(gaps, axis=0))) if len(gaps) else float("nan")
    return float(dice.mean()), shift


def _purity(
    labels: np.ndarray, base: np.ndarray, known: np.ndarray, image: Volume
) -> tuple[float, float]:
    """Share of the labelled voxels whose base channel is the main one of their structure."""
    use = known & (labels > 0)
    if not use.any():
        return float("nan"), float("nan")
    pairs = labels[use].astype(np.int64) * 256 + base[use]
    table = np.bincount(pairs, minlength=256 * 256)
    table = table.reshape(256, 256)
    large = table.sum(1) * image.grid.voxel_mm3 > LARGE_MM3
    if not large.any():
        return float("nan"), float("nan")
    return float((table[large].max(1) / table[large].sum(1)).mean()), float("nan")


def _sides(labels: np.ndarray, reading: Reading, to_template: np.ndarray) -> tuple[int, int]:
    """Left/right pairs that are there, and how many of them are crossed in the template."""
    mirror, sides = reading.target.mirror, reading.target.table["hemisphere"].to_numpy()
    least = LEAST_PAIR_MM3 / abs(np.linalg.det(to_template[:3, :3]))
    counts = np.bincount(labels.ravel(), minlength=256)
    x = _centroids(labels, to_template)[:, 0]
    pairs = crossed = 0
    for left in np.flatnonzero(sides == "left"):
        both = (left, mirror[left])
        if any(reading.group[c] != c or counts[c] < least for c in both):
            continue
        pairs, crossed = pairs + 1, crossed + int(x[left] > x[mirror[left]])
    return pairs, crossed


def _best_moved(
    ranks: np.ndarray, labels: np.ndarray, points: np.ndarray, image: Volume
) -> tuple[float, tuple[float, float, float]]:
    """The highest η² of the labels moved along the world's axes, and where that is."""
    to_voxel = np.linalg.inv(image.grid.affine[:3, :3])
    best, place = 0.0, (0.0, 0.0, 0.0)
    for axis, length, sign in product(range(3), MOVES_MM, (-1, 1)):
        step = np.zeros(3)
        step[axis] = sign * length
        offset = np.rint(to_voxel @ step).astype(int)
        share = explained(ranks, _at(labels, points - offset))
        if share > best:
            best, place = share, tuple(float(s) for s in step)
    return best, place


def why_wrong(name: str, one: Evidence, others: Sequence[Evidence]) -> tuple[str, str] | None:
    """Why the labels of a scan cannot be its own, and what to do; None if they may be.

    The bounds are generous: labels are refused only where the scan's own intensities speak against
    them and for the base's answer, so that a base that is lost on a new contrast refuses nothing.
    See docs/adaptation.md for the rates of error measured with them.

    Parameters
    ----------
    name : str
        The label image, for the sentence.
    one : Evidence
        Of this scan.
    others : sequence of Evidence
        Of the other labelled scans, whose median agreement is what to expect.
    """
    if 2 * one.crossed > one.pairs:
        return (
            f"left and right are swapped: in {one.crossed} of {one.pairs} pairs of {name} the left "
            "structure lies to the right of its partner by the scan's header",
            "exchange left and right in the labels or the look-up table, or check that scan and "
            "labels were converted with one orientation",
        )
    share = one.explained / max(one.explained_by_base, 1e-6)
    expected = [other.agreement for other in others if np.isfinite(other.agreement)]
    usual = float(np.median(expected)) if len(expected) > 2 else 1.0
    apart = np.isnan(one.agreement) or one.agreement < min(LEAST_AGREEMENT, usual)
    odd = one.agreement < usual - FAR_FROM_OTHERS and share < (1 + LEAST_SHARE) / 2
    away = one.shift_mm > MOVED_MM and one.agreement < FAR_AGREEMENT and share < NEARLY_AS_GOOD
    if not (share < LEAST_SHARE and apart) and not away and not (len(expected) > 2 and odd):
        return None
    told = (
        f"the labels of {name} explain {one.explained:.0%} of the scan's contrast, the model's own "
        f"answer {one.explained_by_base:.0%}; the two agree by {one.agreement:.2f}"
    )
    if one.shift_mm > MOVED_MM or one.explained_moved > max(1.5 * one.explained, FAR_AGREEMENT):
        far = one.shift_mm if np.isfinite(one.shift_mm) else np.linalg.norm(one.moved_mm)
        return (
            f"the labels are shifted against the scan by about {far:.0f} mm: {told}",
            "check how the labels were exported; their header is not that of what was drawn",
        )
    return (
        f"the labels do not belong to this scan: {told}",
        "check that the label images are not exchanged between participants",
    )

"""How far do images lie beside their labels?

Usage: ``python benchmarks/beside.py OUT REFERENCE [MAPPING]``

OUT are the label maps that a model made of the images, REFERENCE the derivative with the labels,
on the same grid, MAPPING the name of the mapping between the protocols. A model draws the borders
where the image has them, so the translation that brings its labels onto the reference is how far
the image lies beside it: found by least squares on the smoothed masks of all structures that both
have (Lucas & Kanade 1981, IJCAI), in as many rounds as it takes. Prints for each image the
translation in mm to the right, the front and the top, and the mean Dice with the reference where it
is and where it is moved to. A model that was trained with the same pairs finds too little rather
than too much.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from tlseg_bids.cli.evaluate import match
from tlseg_bids.labels.mapping import load_mapping

SIGMA = 1.0
"""Of the Gaussian that smooths masks, in voxels."""
ROUNDS = 6
SETTLED = 0.01
MARGIN = 6
LEAST_VOXELS = 50


def masks(labels: np.ndarray, indices: list[int]) -> np.ndarray:
    """Smoothed masks of some labels, (structures, I, J, K) float32."""
    return np.stack([
        ndimage.gaussian_filter((labels == i).astype(np.float32), SIGMA) for i in indices
    ])  # fmt: skip


def translation(seen: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Voxels (3,) by which the labels `seen` lie beside those of a reference, (I, J, K) each."""
    indices = shared(seen, reference)
    there, here = masks(reference, indices), masks(seen, indices)
    found = np.zeros(3)
    for _ in range(ROUNDS):
        moved = ndimage.shift(here, [0, *-found], order=1)
        slopes = np.stack(np.gradient((moved + there) / 2, axis=(1, 2, 3))).reshape(3, -1)
        step = np.linalg.solve(slopes @ slopes.T, slopes @ (there - moved).ravel())
        found += step
        if np.abs(step).max() < SETTLED:
            break
    return found


def shared(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Labels of which both have enough voxels."""
    counts = [np.bincount(labels.ravel(), minlength=1) for labels in (one, other)]
    length = min(map(len, counts))
    enough = [count[:length] >= LEAST_VOXELS for count in counts]
    return [int(i) for i in np.flatnonzero(np.logical_and(*enough)) if i > 0]


def agreement(seen: np.ndarray, reference: np.ndarray) -> float:
    """Mean Dice of the structures that both have."""
    scores = []
    for label in shared(seen, reference):
        one, other = seen == label, reference == label
        scores.append(2 * (one & other).sum() / (one.sum() + other.sum()))
    return float(np.mean(scores))


def moved_labels(labels: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Labels moved back by that many voxels, each voxel to the structure it has most of."""
    indices = [0, *np.unique(labels[labels > 0])]
    shares = [ndimage.shift((labels == i).astype(np.float32), -by, order=1) for i in indices]
    return np.array(indices)[np.argmax(shares, axis=0)]


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels in the order of RAS+, and the voxel size in mm."""
    image = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj).astype(np.int32), np.array(image.header.get_zooms()[:3])


def main(words: list[str]) -> int:
    """Print a line for each image."""
    if len(words) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 64
    out, folder = Path(words[0]), Path(words[1])
    mapping = load_mapping(words[2]) if len(words) == 3 else None
    print("| labels | right, mm | front, mm | top, mm | Dice | Dice, moved |")
    print("|---|--:|--:|--:|--:|--:|")
    for path, reference in match(out, folder):
        seen, voxel_mm = read(path)
        labels = read(reference)[0]
        if mapping:
            seen = mapping.apply(seen)
        seen[seen < 0] = 0
        box = tuple(slice(max(int(hit.min()) - MARGIN, 0), int(hit.max()) + 1 + MARGIN)
                    for hit in np.nonzero(labels))  # fmt: skip
        seen, labels = seen[box], labels[box]
        by = translation(seen, labels)
        scores = agreement(seen, labels), agreement(moved_labels(seen, by), labels)
        cells = [f"{mm:+.2f}" for mm in by * voxel_mm] + [f"{score:.3f}" for score in scores]
        print(f"| {path.name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

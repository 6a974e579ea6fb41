"""Can left be told from right by the shape of a brain? The error rate of the best try.

Usage: ``python benchmarks/sides.py DATA``, DATA with `labelmaps`, `malc` and `infant`

Of every label map the asymmetry of paired structures ((L − R) ÷ (L + R)) and of the hemispheres
(front, back, centre and quarters along y: the torque of LeMay 1977) are taken. A linear rule
without intercept, so that a mirrored brain gets the opposite answer, is fitted on the other brains
(least squares with a ridge) and asked. Printed is how often it takes left for right, with one brain
left out, and with all brains of a dataset left out: the latter is what a new scan meets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import load_protocol

PROTOCOL = load_protocol("aseg")
LEAST_VOXELS = 100
RIDGES = (0.1, 1.0, 10.0)
HEMISPHERE = "cerebral"


def asymmetries(labels: np.ndarray) -> np.ndarray:
    """Features of a label map in RAS+ order; each changes its sign in the mirror."""
    counts = np.bincount(labels[labels > 0].ravel(), minlength=int(PROTOCOL.indices.max()) + 1)
    found = []
    for left, right in PROTOCOL.pairs():
        both = counts[left] + counts[right]
        found.append((counts[left] - counts[right]) / both if both > LEAST_VOXELS else 0.0)
    pairs = [(a, b) for a, b in PROTOCOL.pairs()
             if HEMISPHERE in PROTOCOL.table.set_index("index").loc[a, "name"]]  # fmt: skip
    left, right = (np.nonzero(np.isin(labels, side))[1] for side in zip(*pairs, strict=True))
    low, high = min(left.min(), right.min()), max(left.max(), right.max())
    edges = np.linspace(low, high + 1, 5)
    quarters = [np.histogram(side, edges)[0] for side in (left, right)]
    found += list((quarters[0] - quarters[1]) / np.maximum(quarters[0] + quarters[1], 1))
    for measure in (np.mean, lambda v: np.percentile(v, 99.9), lambda v: np.percentile(v, 0.1)):
        found.append((measure(left) - measure(right)) / (high - low))
    return np.array(found)


def brains(data: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Dataset and features of every label map."""
    fold = load_mapping("braincolor_to_aseg")
    for dataset, pattern in (
        ("labelmaps", "sub-*/anat/*_dseg.nii.gz"),
        ("malc", "derivatives/manual/sub-*/anat/*_dseg.nii.gz"),
        ("infant", "derivatives/jlf/sub-*/anat/*_dseg.nii.gz"),
    ):
        for path in sorted((data / dataset).glob(pattern)):
            image = nib.as_closest_canonical(nib.load(path))
            labels = np.asarray(image.dataobj).astype(np.int32)
            labels = fold.apply(labels) if dataset == "malc" else labels
            yield dataset, asymmetries(np.where(np.isin(labels, PROTOCOL.indices), labels, 0))


def rule(features: np.ndarray, ridge: float) -> np.ndarray:
    """The direction along which left brains differ most from mirrored ones."""
    spread = np.cov(features.T)
    spread += ridge * np.trace(spread) / len(spread) * np.eye(len(spread))
    return np.linalg.solve(spread, features.mean(0))


def main() -> None:
    """Print the error rates."""
    it = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    it.add_argument("data", type=Path)
    names, rows = zip(*brains(it.parse_args().data), strict=True)
    names, features = np.array(names), np.array(rows)
    features /= np.sqrt((features**2).mean(0)) + 1e-9
    print("| ridge | one brain left out | " + " | ".join(f"without {n}" for n in np.unique(names)))
    for ridge in RIDGES:
        alone = [features[n] @ rule(np.delete(features, n, 0), ridge) < 0
                 for n in range(len(features))]  # fmt: skip
        cells = [f"{np.mean(alone):.0%} of {len(alone)}"]
        for name in np.unique(names):
            out = names == name
            wrong = features[out] @ rule(features[~out], ridge) < 0
            cells.append(f"{wrong.mean():.0%} of {out.sum()}")
        print(f"| {ridge:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

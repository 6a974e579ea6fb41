"""How well labels of larger voxels can be read back: what no system on such voxels can exceed.

Usage: ``python benchmarks/ceiling.py DATA [--spacing MM …] [--limit N]``

The manual labels of the scans that `systems.py` tests first (fold 0) are averaged to shares of each
structure on voxels of 1, 2, 3, 4 … mm, interpolated back (trilinearly, as the program does it with
probabilities), and the largest share is the label. Prints the mean Dice ± sd over scans against the
labels as they were.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from setups import DATASETS
from systems import subjects
from torch.nn import functional

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import dice


def read_back(labels: np.ndarray, zooms_mm: np.ndarray, spacing_mm: float) -> np.ndarray:
    """A label map after it was averaged to voxels of `spacing_mm`.

    Parameters
    ----------
    labels : ndarray of int, shape (X, Y, Z)
    zooms_mm : ndarray, shape (3,)
        Size of its voxels, mm.
    spacing_mm : float
        Size of the voxels between, mm.

    Returns
    -------
    ndarray of int, shape (X, Y, Z)
    """
    small = [
        max(round(n * zoom / spacing_mm), 1) for n, zoom in zip(labels.shape, zooms_mm, strict=True)
    ]
    best = torch.full(labels.shape, -1.0)
    found = np.zeros(labels.shape, labels.dtype)
    for value in np.unique(labels):
        share = torch.from_numpy((labels == value).astype(np.float32))[None, None]
        share = functional.interpolate(share, size=small, mode="area")
        share = functional.interpolate(share, size=labels.shape, mode="trilinear")[0, 0]
        larger = share > best
        best[larger] = share[larger]
        found[larger.numpy()] = value
    return found


def ceilings(path: Path, spacing_mm: float) -> dict[str, float]:
    """Mean Dice of a label image with itself through larger voxels, of 14 and of all structures."""
    image = nib.load(path)
    labels = np.asarray(image.dataobj).astype(np.int32)
    back = read_back(labels, np.array(image.header.get_zooms()[:3]), spacing_mm)
    table = load_protocol(path.name.split("_seg-")[1].split("_")[0]).table
    deep = set(table.loc[table["subcortical14"].astype(int) == 1, "index"])
    every = {value: dice(back == value, labels == value) for value in np.unique(labels) if value}
    return {
        "14": float(np.mean([score for value, score in every.items() if value in deep])),
        "all": float(np.mean(list(every.values()))),
    }


def main(words: list[str]) -> int:
    """Print a table: a row for each dataset and spacing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--spacing", type=float, nargs="+", default=[1.0, 2.0, 4.0], metavar="MM")
    parser.add_argument("--limit", type=int, help="so many scans of a fold")
    options = parser.parse_args(words)
    print(
        "| dataset | voxels, mm | scans | 14 sub-cortical | all structures |\n|---|---|---|---|---|"
    )
    for dataset, spec in DATASETS.items():
        folder = options.data / dataset
        tested = subjects(folder, 0, spec["folds"])[: options.limit]
        paths = [
            next((folder / spec["labels"]).glob(f"sub-{name}/**/*_dseg.nii.gz")) for name in tested
        ]
        for spacing_mm in options.spacing:
            found = [ceilings(path, spacing_mm) for path in paths]
            cells = [
                f"{np.mean(scores):.3f} ± {np.std(scores, ddof=min(1, len(scores) - 1)):.3f}"
                for scores in ([one[kind] for one in found] for kind in ("14", "all"))
            ]
            print(
                f"| {dataset} | {spacing_mm:g} | {len(found)} | {' | '.join(cells)} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

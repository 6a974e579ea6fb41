"""Can age be told from the volumes of a dataset? Leave-one-out, against the mean of the others.

Usage: ``python benchmarks/age.py DATA DATASET LABELS PROTOCOL``

Labels by hand are the best case: nothing is lost to a network. The features are those that change
most with age (cortex, white matter, deep grey matter and ventricles, each as the logarithm of
its share of the brain), the regression is ridge with the strength fixed beforehand, as 15 scans
cannot choose one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from tlseg_bids.cli.evaluate import entities, label_files
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol

RIDGE = 1.0
GROUPS = ("cortex", "white-matter", "deep-grey", "csf")


def features(path: Path, protocol: LabelProtocol) -> np.ndarray:
    """Logarithms of the shares of each group in the labelled volume, (groups,)."""
    labels = np.asarray(nib.load(path).dataobj)
    groups = protocol.table.set_index("index")["group"]
    counts = pd.Series(*np.unique(labels, return_counts=True)[::-1])
    counts = counts.groupby(counts.index.map(groups)).sum().drop("background")
    return np.log([counts[group] / counts.sum() for group in GROUPS])


def left_out(x: np.ndarray, years: np.ndarray) -> np.ndarray:
    """Age of every scan as the others predict it, (n,)."""
    predicted = []
    for one in range(len(years)):
        rest = np.arange(len(years)) != one
        mean, spread = x[rest].mean(axis=0), x[rest].std(axis=0)
        z, new = (x[rest] - mean) / spread, (x[one] - mean) / spread
        middle = years[rest].mean()
        weight = np.linalg.solve(z.T @ z + RIDGE * np.eye(z.shape[1]), z.T @ (years[rest] - middle))
        predicted.append(middle + new @ weight)
    return np.array(predicted)


def main(data: Path, dataset: str, labels: str, protocol: str) -> int:
    """Measure and print."""
    people = pd.read_csv(data / dataset / "participants.tsv", sep="\t").set_index("participant_id")
    ages = pd.to_numeric(people["age"], errors="coerce").dropna()
    files = {f"sub-{entities(path)['sub']}": path for path in label_files(data / dataset / labels)}
    known = [name for name in ages.index if name in files]
    years = ages[known].to_numpy(float)
    x = np.array([features(files[name], load_protocol(protocol)) for name in known])
    errors = {
        "volumes": np.abs(left_out(x, years) - years),
        "mean of the others": np.abs(left_out(x[:, :0], years) - years),
    }
    print(f"{dataset}: {len(years)} ages of {years.min():g} to {years.max():g}, "
          f"median {np.median(years):g}")  # fmt: skip
    for name, error in errors.items():
        print(f"{name}: mean error {error.mean():.2f} ± {error.std(ddof=1):.2f}")
    print(f"Wilcoxon signed-rank: p = {wilcoxon(*errors.values()).pvalue:.2f}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))

"""Write the volumes that are usual at an age: `tlseg_bids/postprocess/references.tsv`.

``python benchmarks/references.py DATA`` or ``… DATA/malc OUT``, ``… DATA/infant OUT``

DATA is the folder of the datasets: `malc` (15 adults of 19 to 34 years, manual labels) and `infant`
(12 infants under one year, label fusion). Per structure of the protocol ``aseg`` that the labels
hold one to one: mean and standard deviation of the logarithm of its share of the brain, and of left
against right. With OUT, an output of tlseg over one of
these datasets, nothing is written: for every structure the mean and the largest of |z| over its
scans are printed, as the program's labels have them, and how many are called unusual. Ages count
as those of the datasets, known or not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.postprocess import references
from tlseg_bids.postprocess.quality import OUTER_FLUID

PROTOCOL = load_protocol("aseg")
GROUPS = (
    ("adults of 19 to 34 years", 18.0, 40.0, "malc/derivatives/manual", "braincolor_to_aseg"),
    ("infants under one year", 0.0, 1.0, "infant/derivatives/jlf", None),
)


def volumes(file: Path, mapping: str | None) -> pd.Series:
    """Volume of every structure in mm³, by index; NaN where the labels do not hold it alone."""
    image = nib.load(file)
    labels = np.asanyarray(image.dataobj).astype(int)
    if mapping:
        labels = load_mapping(mapping).apply(labels)
        alone = set(map(int, PROTOCOL.indices))
    else:
        targets = pd.Series(load_mapping("aseg_to_infant").pairs)
        alone = set(targets[~targets.duplicated(keep=False)].index)
    voxel = abs(np.linalg.det(image.affine[:3, :3]))
    counts = np.bincount(labels[labels > 0], minlength=int(PROTOCOL.indices.max()) + 1) * voxel
    return pd.Series({i: counts[i] if i in alone else np.nan for i in map(int, PROTOCOL.indices)})


def brain(file: Path, mapping: str | None) -> float:
    """Volume of everything labelled but the fluid around the brain, mm³."""
    image = nib.load(file)
    labels = np.asanyarray(image.dataobj).astype(int)
    if mapping:
        labels = load_mapping(mapping).apply(labels)
    inside = (labels > 0) & ~np.isin(labels, list(outer()))
    return float(inside.sum() * abs(np.linalg.det(image.affine[:3, :3])))


def rows(data: Path) -> pd.DataFrame:
    """The table."""
    found = []
    for name, youngest, oldest, folder, mapping in GROUPS:
        files = sorted((data / folder).rglob("*_dseg.nii.gz"))
        every = pd.DataFrame([volumes(file, mapping) for file in files])
        shares = np.log(every.div([brain(file, mapping) for file in files], axis=0))
        sides = references.sides(every.T, PROTOCOL).T
        for index in shares.columns[1:]:
            share = shares[index].replace(-np.inf, np.nan).dropna()
            if len(share) < len(files) or index in outer():
                continue
            side = sides[index] if index in sides else pd.Series([np.nan])
            found.append({
                "group": name, "youngest": youngest, "oldest": oldest, "index": index,
                "n": len(share), "log_share": share.mean(), "sd": share.std(),
                "side": side.mean(), "side_sd": side.std(),
                "widest_side": side.abs().max(),
            })  # fmt: skip
    return pd.DataFrame(found)


def outer() -> set[int]:
    """Indices of the fluid around the brain."""
    return set(map(int, PROTOCOL.indices[PROTOCOL.channels(group=OUTER_FLUID)]))


def judge(out: Path, age_years: float) -> None:
    """Compare every scan of an output with the references."""
    every, unusual, scans = [], 0, 0
    for file in sorted(out.rglob("*_desc-volumes_dseg.tsv")):
        table = pd.read_csv(file, sep="\t")
        fluid = table.loc[table["index"].isin(outer()), "hard_mm3"].sum()
        scores, said = references.compare(
            table, table["hard_mm3"].sum() - fluid, age_years, PROTOCOL
        )
        every.append(scores)
        scans, unusual = scans + 1, unusual + len(said)
        print(file.name, *said, sep="\n    ")
    grouped = pd.concat(every).groupby(level=0)
    print(grouped["volume_z"].agg(["mean", "min", "max"]).round(1).to_string())
    print(grouped["side_z"].agg(["mean", "min", "max"]).round(1).dropna().to_string())
    print(f"{unusual} unusual structures in {scans} scans")


def main(words: list[str]) -> int:
    """Write the table, or judge an output by it."""
    if len(words) not in (1, 2) or not Path(words[0]).is_dir():
        print(__doc__, file=sys.stderr)
        return 64
    data = Path(words[0])
    if len(words) == 2:
        judge(Path(words[1]), 0.5 if data.name == "infant" else 25.0)
        return 0
    target = Path(references.__file__).with_name("references.tsv")
    rows(data).to_csv(target, sep="\t", index=False, float_format="%.4f", na_rep="n/a")
    print(target.read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

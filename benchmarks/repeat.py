"""How far apart the volumes of one person are: two visits, two contrasts, with and without agent.

Usage: ``python benchmarks/repeat.py OUT [LEAST_ML]``

OUT holds the derivatives of the program. Every two label maps of one subject are compared: visits
with the same suffix, T1w with T2w of one visit, and a scan with its ``ce-`` twin. Of each structure
of at least LEAST_ML (5) ml, left and right added, the difference of the soft volumes is given as a
percentage of their mean. Prints a line per pair with the mean and the largest absolute difference,
and one per structure; where the two lie on one grid, also the mean Dice between them, over all
structures and over the 14 sub-cortical ones. A structure is cut in a scan if it reaches an outer
face of it, or if the program says (`cut_share`) that more than 1 % of it lies beyond: it is marked,
and the mean without such structures is given, too.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import dice

ENDING = "_desc-volumes_dseg.tsv"
CUT_SHARE = 0.01


def volumes(table: Path) -> pd.Series:
    """Soft volume in ml of every structure, both sides together."""
    rows = pd.read_csv(table, sep="\t")
    return rows.groupby(rows["index"].map(names_of(table)))["soft_mm3"].sum() / 1000


def kind(one: dict[str, str], other: dict[str, str]) -> str | None:
    """What tells two scans of a subject apart, if it is one of the things compared here."""
    differing = {key for key in {*one, *other} if one.get(key) != other.get(key)}
    return {
        frozenset({"ses"}): "two visits",
        frozenset({"space"}): "two contrasts",
        frozenset({"ce"}): "contrast agent",
    }.get(frozenset(differing))


def label_map(table: Path) -> nib.Nifti1Image:
    """The label map beside a table of volumes."""
    return nib.load(table.with_name(table.name.replace(ENDING, "_dseg.nii.gz")))


def names_of(table: Path) -> pd.Series:
    """Name of each label, the same for left and right."""
    protocol = load_protocol(table.name.split("_seg-")[1].split("_")[0]).table.set_index("index")
    return protocol["name"].str.replace(r"^(Left|Right) ", "", regex=True).str.lower()


def cut(table: Path) -> set[str]:
    """Structures that the scan cuts, by name."""
    labels = np.asarray(label_map(table).dataobj)
    faces = [labels.take((0, -1), axis).ravel() for axis in range(3)]
    names = names_of(table)
    ended = {names[label] for label in np.unique(np.concatenate(faces)) if label in names.index}
    rows = pd.read_csv(table, sep="\t")
    beyond = rows.loc[rows["cut_share"] > CUT_SHARE, "index"] if "cut_share" in rows else ()
    return ended | {names[label] for label in beyond}


def overlap(first: Path, second: Path) -> str:
    """Mean Dice of two label maps, in words; nothing where they lie on different grids."""
    one, other = label_map(first), label_map(second)
    if one.shape != other.shape or not np.allclose(one.affine, other.affine, atol=1e-3):
        return ""
    a, b = (np.asarray(image.dataobj) for image in (one, other))
    protocol = load_protocol(first.name.split("_seg-")[1].split("_")[0]).table.set_index("index")
    scores = pd.Series({i: dice(a == i, b == i) for i in np.union1d(a, b) if i != 0})
    deep = scores[protocol["subcortical14"].reindex(scores.index) == 1]
    return f", Dice {scores.mean():.3f}, of the sub-cortical {deep.mean():.3f}"


def main(words: list[str]) -> int:
    """Compare and print."""
    least_ml = float(words[1]) if len(words) > 1 else 5.0
    tables = sorted(Path(words[0]).glob(f"sub-*/**/*{ENDING}"))
    for first, second in combinations(tables, 2):
        a, b = (dict(p.split("-", 1) for p in t.name.split("_") if "-" in p)
                for t in (first, second))  # fmt: skip
        if a["sub"] != b["sub"] or (what := kind(a, b)) is None:
            continue
        pair = pd.concat([volumes(first), volumes(second)], axis=1, keys=["first", "second"])
        pair = pair[pair.mean(axis=1) >= least_ml]
        percent = 100 * (pair["second"] - pair["first"]) / pair.mean(axis=1)
        names = f"{first.name.removesuffix(ENDING)} and {second.name.removesuffix(ENDING)}"
        worst, ended = percent.abs().idxmax(), cut(first) | cut(second)
        whole = percent[~percent.index.isin(ended)].abs()
        print(f"{what}, {names}: mean {percent.abs().mean():.1f} %, largest "
              f"{percent[worst]:+.1f} % ({worst}){overlap(first, second)}")  # fmt: skip
        if len(whole) < len(percent):
            print(f"  without the cut ones: mean {whole.mean():.1f} %, largest {whole.max():.1f} %")
        for name, value in percent.items():
            mark = ", cut" if name in ended else ""
            print(f"  {name}: {pair.loc[name, 'first']:.1f} ml, {value:+.1f} %{mark}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))

"""Thick slices: labelled scans made as a scanner would have taken them, and what they cost.

Usage: ``python benchmarks/slices.py scans DATASET LABELS OUT [SLICES …]``
       ``python benchmarks/slices.py table LABELLED DICE.tsv [LEAST_ML]``

``scans`` takes the scans of a BIDS dataset that its derivative LABELS has a label map for and
writes the dataset OUT: each scan as it is, and once for every SLICES, which is a direction and a
thickness in mm, ``axial-5`` or, begun 2 mm later, ``axial-5-2`` (entity ``acq``). A slice is the
mean of the voxels that it replaces, a whole number of them, and its labels, in
``derivatives/labels``, are the most frequent ones. Nothing is interpolated; voxels at the far end
that fill no whole slice are dropped.

``table`` reads what ``tlseg OUT LABELLED participant`` wrote and the table of ``tlseg-evaluate
LABELLED OUT/derivatives/labels``. A line for every SLICES, T1w and T2w apart: Dice of all
structures and of the 14 sub-cortical ones, mean ± standard deviation over scans; then by how many
per cent the soft volumes of its structures of LEAST_ML (5) ml or more, both sides added, are above
those of the same scan as it is, mean ± standard deviation over scans. Where slices of one kind were
begun in several places, the standard deviation over these within a scan follows, mean of the scans.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from repeat import ENDING, volumes

DIRECTIONS = {"sagittal": "RL", "coronal": "AP", "axial": "SI"}
WHOLE = "as it is"
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
COMMON = ("axial-3", "axial-3-1", "axial-3-2", "axial-5", "coronal-5", "sagittal-5", "axial-7")


@dataclass(frozen=True)
class Slices:
    """Direction of the slices, their thickness and where the first begins, in mm."""

    direction: str
    thick_mm: float
    begin_mm: float = 0.0

    @classmethod
    def read(cls, word: str) -> Slices:
        """What ``axial-5`` or ``axial-5-2`` says."""
        found = re.fullmatch(rf"([a-z]+)-({NUMBER})(?:-({NUMBER}))?", word)
        if found is None or found[1] not in DIRECTIONS:
            sys.exit(f"{word}: slices are {', '.join(DIRECTIONS)}, then -MM or -MM-BEGIN, axial-5")
        return cls(found[1], float(found[2]), float(found[3] or 0))

    @property
    def name(self) -> str:
        """As an entity."""
        begin = f"b{self.begin_mm:g}" if self.begin_mm else ""
        return f"{self.direction}{self.thick_mm:g}{begin}".replace(".", "p")


def cut(image: nib.Nifti1Image, slices: Slices, labels: bool) -> nib.Nifti1Image:
    """An image of (I, J, K) voxels in slices: means of its voxels, or the most frequent labels."""
    codes = nib.aff2axcodes(image.affine)
    axis = next(i for i, code in enumerate(codes) if code in DIRECTIONS[slices.direction])
    voxel_mm = image.header.get_zooms()[axis]
    begin, each = (round(mm / voxel_mm) for mm in (slices.begin_mm, slices.thick_mm))
    if not 1 <= each <= image.shape[axis] - begin:
        sys.exit(f"{slices.name}: no such slice in {image.shape[axis]} voxels of {voxel_mm:g} mm, "
                 "ask for a thickness from one voxel to all of them")  # fmt: skip
    return thicker(image, axis, each, begin, labels)


def thicker(
    image: nib.Nifti1Image, axis: int, each: int, begin: int = 0, labels: bool = False
) -> nib.Nifti1Image:
    """`each` voxels along an axis made one, from voxel `begin` on."""
    voxels = np.moveaxis(np.asanyarray(image.dataobj), axis, 0)[begin:]
    voxels = voxels[: len(voxels) // each * each].reshape(-1, each, *voxels.shape[1:])
    thick = most_frequent(voxels) if labels else voxels.mean(1, dtype=np.float32)
    into = np.eye(4)
    into[axis, axis], into[axis, 3] = each, begin + (each - 1) / 2
    return nib.Nifti1Image(np.moveaxis(thick, 0, axis), image.affine @ into)


def most_frequent(labels: np.ndarray) -> np.ndarray:
    """Most frequent label over axis 1 of (slices, voxels, …); the lower number of two alike."""
    found, most = labels[:, 0].copy(), np.zeros(labels[:, 0].shape, int)
    for label in np.unique(labels):
        count = (labels == label).sum(1)
        found = np.where(count > most, label, found)
        most = np.maximum(count, most)
    return found.astype(np.int16)


def scans(data: Path, folder: str, out: Path, asked: list[Slices]) -> int:
    """Write the dataset; how many scans went into it."""
    below = data / "derivatives" / folder
    maps = {visit(path): path for path in sorted(below.glob("sub-*/**/*_dseg.nii.gz"))}
    found = [path for path in sorted(data.glob("sub-*/**/anat/*_T[12]w.nii.gz"))
             if visit(path) in maps]  # fmt: skip
    if not found:
        sys.exit(
            f"{below}: no label map of a T1w or T2w in {data}; name a derivative that has them"
        )
    for path in found:
        start, folder_of = visit(path), path.parent.relative_to(data)
        for source, there in ((path, out), (maps[start], out / "derivatives" / "labels")):
            (there / folder_of).mkdir(parents=True, exist_ok=True)
            image, ending = nib.load(source), source.name.removeprefix(start)
            nib.save(image, there / folder_of / f"{start}{ending}")
            for slices in asked:
                thick = cut(image, slices, labels=source != path)
                nib.save(thick, there / folder_of / f"{start}_acq-{slices.name}{ending}")
    about = {"Name": f"{data.name} in slices", "BIDSVersion": "1.10.0"}
    (out / "dataset_description.json").write_text(json.dumps(about))
    for sidecar in data.glob("T[12]w.json"):
        (out / sidecar.name).write_bytes(sidecar.read_bytes())
    return len(found)


def visit(path: Path) -> str:
    """Subject and session of a file's name."""
    return re.match(r"sub-[a-zA-Z0-9]+(_ses-[a-zA-Z0-9]+)?", path.name).group()


def acquisition(name: str) -> str:
    """What a file's name says of its slices and its contrast."""
    found, suffix = re.search(r"_acq-([a-zA-Z0-9]+)", name), re.search(r"_space-(T[12]w)_", name)
    return f"{found.group(1) if found else WHOLE}, {suffix.group(1)}"


def agreement(table: Path) -> dict[str, str]:
    """Of each acquisition, Dice of all structures and of the sub-cortical ones, in words."""
    rows = pd.read_csv(table, sep="\t")
    rows["acquisition"] = rows["predicted"].map(acquisition)
    lines = {}
    for name, scored in rows.groupby("acquisition"):
        deep = scored[scored["subcortical14"] == 1]
        means = [part.groupby("predicted")["dice"].mean() for part in (scored, deep)]
        told = [f"{m.mean():.3f} ± {m.std():.3f}" for m in means]
        lines[name] = f"{len(means[0])} scans, Dice {told[0]}, of the sub-cortical {told[1]}"
    return lines


def differences(out: Path, least_ml: float) -> pd.DataFrame:
    """Per cent by which soft volumes are above those of the scan as it is; rows by acquisition and
    scan, a column for each structure."""
    found = {}
    for path in sorted(out.glob(f"sub-*/**/*{ENDING}")):
        scan = re.sub(r"_acq-[a-zA-Z0-9]+", "", path.name)
        found[acquisition(path.name), scan] = volumes(path)
    every = pd.DataFrame(found).T
    as_it_is = every.index.get_level_values(0).str.startswith(WHOLE)
    whole = every[as_it_is].droplevel(0)
    kept = whole.columns[whole.mean() >= least_ml]
    rows = {
        key: 100 * (values[kept] / whole.loc[key[1], kept] - 1)
        for key, values in every[~as_it_is].iterrows() if key[1] in whole.index
    }  # fmt: skip
    return pd.DataFrame(rows).T.rename_axis(["acquisition", "scan"])


def laid_elsewhere(percent: pd.DataFrame) -> list[str]:
    """A line for each kind of slices that was begun in several places."""
    kind = percent.index.get_level_values("acquisition").str.replace(r"b[0-9p]+,", ",", regex=True)
    told = []
    for name, rows in percent.groupby(kind):
        places = rows.index.get_level_values("acquisition").nunique()
        if places > 1:
            spread = rows.groupby(level="scan").std().mean().sort_values()
            most = ", ".join(f"{what} {sd:.1f}" for what, sd in spread.items())
            told.append(f"{name} begun in {places} places, sd within a scan: {most} %")
    return told


def describe(lines: dict[str, str], percent: pd.DataFrame) -> list[str]:
    """What ``table`` prints."""
    told = []
    for name in sorted(lines, key=lambda name: (not name.startswith(WHOLE), name)):
        told.append(f"{name}: {lines[name]}")
        if name.startswith(WHOLE):
            continue
        rows = percent.loc[name]
        told.append(f"  volumes differ by {rows.abs().mean().mean():.1f} % in the mean")
        told += [f"  {structure}: {values.mean():+.1f} ± {values.std():.1f} %"
                 for structure, values in rows.items()]  # fmt: skip
    return told + laid_elsewhere(percent)


def main(words: list[str]) -> int:
    """Do what the first word says."""
    if words[0] == "scans":
        asked = [Slices.read(word) for word in words[4:] or COMMON]
        count = scans(Path(words[1]), words[2], Path(words[3]), asked)
        print(f"{count} scans, as they are and in {len(asked)} kinds of slices, in {words[3]}")
        return 0
    least_ml = float(words[3]) if len(words) > 3 else 5.0
    percent = differences(Path(words[1]), least_ml)
    print(*describe(agreement(Path(words[2])), percent), sep="\n")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 4 or sys.argv[1] not in ("scans", "table"):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))

"""Label maps painted as T1w scans: heads whose anatomy is real, and whose labels are known.

Usage: ``python benchmarks/painted.py LABELMAPS OUT [SEED]``
       ``python benchmarks/painted.py compare BEFORE.tsv AFTER.tsv``

The first writes the BIDS dataset OUT: every whole-head label map of LABELMAPS as a skull-stripped
T1w scan of an adult on its own voxels, undeformed, painted by the synthesis of the trainings
(`tlseg_bids.train.synth`) without its rarer effects, and its labels in ``derivatives/labels``.

``compare`` reads two tables of ``tlseg-evaluate`` for the same scans, of two models. The scans are
ranked by how much of the brain is lateral ventricle: prints the mean Dice of the 14 sub-cortical
and of all structures in both tables for the third with the widest ventricles and for the others,
and the mean difference with its standard deviation over scans.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from ageing import aligned, own_positions, write

from tlseg_bids.train.dataset import default_protocol, load_classes
from tlseg_bids.train.synth.compose import example
from tlseg_bids.train.synth.draws import Random
from tlseg_bids.train.synth.mix import KNOWN, Mix

PLAIN = Mix(
    **{**dict.fromkeys(KNOWN, 0.0), "t1w": 1.0}, skull_stripped=1.0, defaced=0.0, gadolinium=0.0,
    thick_slices=0.0, low_resolution=0.0, motion=0.0, noise=0.3, gamma=0.5,
)  # fmt: skip
WIDE = 1 / 3


def painted(data: Path, out: Path, seed: int) -> int:
    """Write the dataset; how many scans it has."""
    samples = aligned(data, {})
    protocol = default_protocol()
    index = protocol.table["index"].to_numpy()
    for number, sample in enumerate(samples):
        spacing_mm = float(np.linalg.norm(sample.template_from_voxel[:3, 0]))
        image, channels = example(
            Random(seed + number), sample, load_classes(protocol), own_positions(sample),
            spacing_mm, PLAIN,
        )  # fmt: skip
        labels = np.where(channels < len(index), index[channels.clamp(max=len(index) - 1)], 0)
        name = sample.name
        write(out / name / "anat" / f"{name}_T1w.nii.gz", image.numpy(), sample)
        there = out / "derivatives" / "labels" / name / "anat"
        write(there / f"{name}_seg-{protocol.name}_dseg.nii.gz", labels.astype(np.int16), sample)
    about = {"Name": f"{data.name}, painted", "BIDSVersion": "1.10.0"}
    (out / "dataset_description.json").write_text(json.dumps(about))
    (out / "T1w.json").write_text(json.dumps({"SkullStripped": True}))
    return len(samples)


def means(table: Path) -> pd.DataFrame:
    """Of each scan: Dice ``of 14`` and ``of all``, and the share of lateral ``ventricle``."""
    rows = pd.read_csv(table, sep="\t")
    scan = rows["predicted"].str.extract(r"(sub-[a-zA-Z0-9]+)", expand=False)
    deep = rows["subcortical14"] == 1
    ventricle = rows["name"].isin(["Left lateral ventricle", "Right lateral ventricle"])
    volume = rows["reference_mm3"].astype(float)
    return pd.DataFrame(
        {
            "of 14": rows[deep].groupby(scan)["dice"].mean(),
            "of all": rows.groupby(scan)["dice"].mean(),
            "ventricle": volume[ventricle].groupby(scan).sum() / volume.groupby(scan).sum(),
        }
    )


def compare(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    """The lines of ``compare``."""
    if set(before.index) != set(after.index):
        odd = ", ".join(sorted(set(before.index) ^ set(after.index)))
        sys.exit(f"{odd}: in one of the two tables only; label and score the same scans with both")
    order = before["ventricle"].sort_values(ascending=False).index
    count = round(len(order) * WIDE)
    lines = []
    for title, scans in (("widest ventricles", order[:count]), ("others", order[count:])):
        for what in ("of 14", "of all"):
            one, other = before.loc[scans, what], after.loc[scans, what]
            change = other - one
            lines.append(
                f"{title}, {len(scans)} scans, Dice {what}: {one.mean():.3f} ± {one.std():.3f}, "
                f"{other.mean():.3f} ± {other.std():.3f}, {change.mean():+.4f} ± {change.std():.4f}"
            )
    return lines


def main(words: list[str]) -> int:
    """Do what the words say."""
    if words[0] == "compare":
        print(*compare(means(Path(words[1])), means(Path(words[2]))), sep="\n")
        return 0
    count = painted(Path(words[0]), Path(words[1]), int(words[2]) if len(words) > 2 else 0)
    print(f"{count} scans in {words[1]}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))

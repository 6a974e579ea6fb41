"""The golden set: what the default model makes of the demo scan, kept so that no change is silent.

Usage: ``python benchmarks/golden.py``, after a change of numbers that is meant; commit what it
writes with the change, and say in CHANGELOG.md, under *Numbers*, what moved.

``tests/golden/any.tsv`` has a row per label: index, name, hard and soft volume in mm³, and the
SHA-256 of its voxels; ``any.npz`` the label map of MNI152 at 2 mm and the weights' SHA-256.
`tests/test_app.py` compares: the same bytes on the machine that wrote it, and elsewhere at least
`SAME` of the labelled voxels alike and every volume within `SHARE` and `FEW_MM3`. The tolerance is
for processors that multiply in bfloat16 or float32 and add in another order; a model that was
trained again, a shift by half a voxel or an exchange of sides is beyond it.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "golden"
SAME, SHARE, FEW_MM3 = 0.98, 0.05, 200.0


def read_run(out: Path) -> tuple[np.ndarray, pd.DataFrame, str]:
    """Label map, volumes by index and the weights' hash of the one scan of an output folder."""
    (dseg,) = out.glob("sub-*/anat/*_seg-aseg_dseg.nii.gz")
    table = dseg.with_name(dseg.name.replace("_dseg.nii.gz", "_desc-volumes_dseg.tsv"))
    sidecar = json.loads(dseg.with_name(dseg.name.replace(".nii.gz", ".json")).read_text())
    labels = np.asarray(nib.load(dseg).dataobj).astype(np.uint8)
    return labels, pd.read_csv(table, sep="\t", index_col="index"), sidecar["Model"]["Sha256"]


def read_golden(folder: Path = FOLDER) -> tuple[np.ndarray, pd.DataFrame, str]:
    """The same of the golden set."""
    with np.load(folder / "any.npz") as kept:
        labels, sha256 = kept["labels"], str(kept["sha256"])
    return labels, pd.read_csv(folder / "any.tsv", sep="\t", index_col="index"), sha256


def differences(
    found: tuple[np.ndarray, pd.DataFrame, str], golden: tuple[np.ndarray, pd.DataFrame, str]
) -> list[str]:
    """What is further from the golden set than the tolerance, a sentence each."""
    labels, volumes, sha256 = found
    old, old_volumes, old_sha256 = golden
    if sha256 != old_sha256:
        return [f"the weights are {sha256[:12]}, those of the golden set {old_sha256[:12]}"]
    said = []
    alike = np.mean((labels == old)[(labels > 0) | (old > 0)])
    if alike < SAME:
        said.append(f"{alike:.2%} of the labelled voxels are alike, {SAME:.0%} are needed")
    for index, row in old_volumes.iterrows():
        for column in ("hard_mm3", "soft_mm3"):
            now, was = float(volumes.loc[index, column]), float(row[column])
            if abs(now - was) > SHARE * was + FEW_MM3:
                said.append(f"{row['name']}: {column} was {was:.0f}, is {now:.0f}")
    return said


def main(words: list[str]) -> int:
    """Label the demo scan and write the golden set."""
    if words:
        print(__doc__, file=sys.stderr)
        return 64
    from tests.test_app import add_scan, mni152, run

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        add_scan(place / "bids", "01", mni152())
        if run(place / "bids", place / "out", "participant", "--skip-bids-validation"):
            return 1
        labels, volumes, sha256 = read_run(place / "out")
    FOLDER.mkdir(exist_ok=True)
    np.savez_compressed(FOLDER / "any.npz", labels=labels, sha256=sha256)
    volumes["sha256"] = [
        hashlib.sha256(np.packbits(labels == index).tobytes()).hexdigest()[:16]
        for index in volumes.index
    ]
    kept = volumes[["name", "hard_mm3", "soft_mm3", "sha256"]]
    kept.to_csv(FOLDER / "any.tsv", sep="\t", float_format="%.1f")
    print(f"{FOLDER / 'any.tsv'}: {len(kept)} labels, {(labels > 0).sum()} voxels")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))

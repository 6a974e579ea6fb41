"""Write a one-participant BIDS dataset from the MNI152 T1w that ships inside nilearn.

Usage: ``python docs/demo.py FOLDER``. Nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_template

DESCRIPTION = {
    "Name": "MNI ICBM152 2009a nonlinear symmetric T1w, as distributed with nilearn",
    "BIDSVersion": "1.10.0",
    "DatasetType": "raw",
    "HowToAcknowledge": "Cite Fonov et al. (2011), doi:10.1016/j.neuroimage.2010.07.033",
    "ReferencesAndLinks": ["https://doi.org/10.1016/j.neuroimage.2010.07.033"],
}
README = """# MNI152 as a BIDS dataset

The average T1w of 152 young adults, skull-stripped, 1 mm. It is an average and smoother than
any person's scan: enough to see the program at work, nothing to judge its accuracy by.
"""


def write_dataset(folder: Path) -> Path:
    """Write the dataset into `folder` and return the path of its T1w.

    The image keeps nilearn's grid (1 mm, RAS+); its intensities are scaled to 0–1000 int16.
    """
    template = load_mni152_template(resolution=1)
    voxels = np.rint(np.asarray(template.dataobj, np.float32) * 1000).astype(np.int16)
    scan = nib.Nifti1Image(voxels, template.affine)
    scan.header.set_xyzt_units("mm", "sec")
    for code in (scan.set_sform, scan.set_qform):
        code(template.affine, "mni")
    anat = folder / "sub-MNI152" / "anat"
    anat.mkdir(parents=True, exist_ok=True)
    path = anat / "sub-MNI152_T1w.nii.gz"
    nib.save(scan, path)
    sidecar = {"SkullStripped": True, "MagneticFieldStrength": 1.5}
    path.with_name("sub-MNI152_T1w.json").write_text(json.dumps(sidecar, indent=2) + "\n")
    (folder / "dataset_description.json").write_text(json.dumps(DESCRIPTION, indent=2) + "\n")
    (folder / "README.md").write_text(README)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/demo.py FOLDER")
    target = Path(sys.argv[1])
    if not (target / "dataset_description.json").is_file():
        write_dataset(target)
    print(f"demo dataset: {target.resolve()}")

"""Registration of scans to a template: the model's own, and four maintained libraries.

``python benchmarks/registration.py DATA [--methods model ants simpleitk torchreg dipy] [--malc 6]
[--infant 4]``

Every scan is led to nilearn's MNI152 brain (1 mm) by an affine: by the default model, which finds
its structures and the template's in one frame, as the program does for `--output-spaces`; by
antspyx (``Affine``: rigid, then affine, mutual information); by SimpleITK (centres of mass, rigid,
affine; Mattes' mutual information, three levels); by torchreg (affine; squared correlation,
two levels); by dipy (SimpleITK's steps). Libraries that are not installed are left out and named.

A good transform brings the same structures of all persons to one place. So the reference labels of
every person are carried to the template's grid (2 mm), and their Dice with the majority of the
others of the dataset is taken: the mean over the 14 sub-cortical structures. Printed are its mean,
standard deviation and least value over persons, and the median of the seconds.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template
from scipy import ndimage

from tlseg_bids import placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.xfm import RAS_LPS
from tlseg_bids.flow import Job
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.metrics import dice
from tlseg_bids.preprocess.geometry import resample
from tlseg_bids.preprocess.intensity import robust_scale
from tlseg_bids.preprocess.prepare import foreground_centre
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.volume import Grid, Volume, load_scan
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights

DEEP = load_protocol("aseg").table.query("subcortical14 == 1")["index"].tolist()
DATASETS = {
    "malc": ("derivatives/manual", "T1w", "braincolor_to_aseg"),
    "infant": ("derivatives/jlf", "T2w", None),
}
Register = Callable[[Path, Path], np.ndarray]
"""Scan and template to a matrix from the scan's world to the template's, RAS mm."""


class Engine:
    """The default model; it sees the template once."""

    def __init__(self) -> None:
        card = find_card(load_cards(()), "any", "--model")
        self.card, self.model = card, load_model(card, load_weights(card, True))
        self.there: np.ndarray | None = None

    def _frame(self, file: Path) -> np.ndarray:
        model: Model = self.model
        scan = Scan(file, file.parent, {"sub": "x"}, "T2w" if "T2w" in file.name else "T1w")
        job = Job(scan, self.card, "", (), (), "", "cpu", 0.0)
        return placing.find(load_scan(file)[0], job, model).template_from_native

    def __call__(self, scan: Path, template: Path) -> np.ndarray:
        """Both are found in the model's frame."""
        if self.there is None:
            self.there = self._frame(template)
        return np.linalg.inv(self.there) @ self._frame(scan)


def itk_matrix(matrix: np.ndarray, shift: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Scan to template in RAS, of an ITK affine y = A (x − c) + t + c from template to scan."""
    out = np.eye(4)
    out[:3, :3] = matrix
    out[:3, 3] = shift + centre - matrix @ centre
    return np.linalg.inv(RAS_LPS @ out @ RAS_LPS)


def by_ants(scan: Path, template: Path) -> np.ndarray:
    """antspyx, https://github.com/ANTsX/ANTsPy."""
    ants = importlib.import_module("ants")
    fixed, moving = ants.image_read(str(template)), ants.image_read(str(scan))
    found = ants.registration(fixed, moving, "Affine", random_seed=1)
    read = ants.read_transform(found["fwdtransforms"][0])
    numbers = np.asarray(read.parameters)
    return itk_matrix(numbers[:9].reshape(3, 3), numbers[9:], np.asarray(read.fixed_parameters))


def by_simpleitk(scan: Path, template: Path) -> np.ndarray:
    """SimpleITK, https://simpleitk.readthedocs.io."""
    sitk = importlib.import_module("SimpleITK")
    fixed, moving = (sitk.ReadImage(str(file), sitk.sitkFloat32) for file in (template, scan))
    known = sitk.CenteredTransformInitializer(
        fixed, moving, sitk.Euler3DTransform(), sitk.CenteredTransformInitializerFilter.MOMENTS
    )
    for kind in ("rigid", "affine"):
        if kind == "affine":
            rigid, known = sitk.Euler3DTransform(known), sitk.AffineTransform(3)
            known.SetMatrix(rigid.GetMatrix())
            known.SetTranslation(rigid.GetTranslation())
            known.SetCenter(rigid.GetCenter())
        method = sitk.ImageRegistrationMethod()
        method.SetMetricAsMattesMutualInformation(32)
        method.SetMetricSamplingStrategy(method.RANDOM)
        method.SetMetricSamplingPercentage(0.1, 1)
        method.SetInterpolator(sitk.sitkLinear)
        method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 200)
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetShrinkFactorsPerLevel([8, 4, 2])
        method.SetSmoothingSigmasPerLevel([4, 2, 1])
        method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
        method.SetInitialTransform(known, inPlace=True)
        method.Execute(fixed, moving)
    found = sitk.AffineTransform(known)
    numbers = (found.GetMatrix(), found.GetTranslation(), found.GetCenter())
    matrix, shift, centre = map(np.asarray, numbers)
    return itk_matrix(matrix.reshape(3, 3), shift, centre)


def by_dipy(scan: Path, template: Path) -> np.ndarray:
    """dipy, https://dipy.org."""
    align = importlib.import_module("dipy.align")
    moving, fixed = nib.load(scan), nib.load(template)
    _, matrix = align.affine_registration(
        moving.get_fdata(dtype=np.float32), fixed.get_fdata(dtype=np.float32),
        moving_affine=moving.affine, static_affine=fixed.affine,
        pipeline=["center_of_mass", "rigid", "affine"],
        level_iters=[200, 200, 200], sigmas=[4.0, 2.0, 1.0], factors=[8, 4, 2],
        sampling_proportion=10,
    )  # fmt: skip
    return np.linalg.inv(matrix)


def by_torchreg(scan: Path, template: Path) -> np.ndarray:
    """torchreg, https://pypi.org/project/torchreg, from the heads' centres on the template's grid.

    It has no mutual information, and with its local correlation (9³ voxels) four scans took over
    six minutes. The loss is the share of the template's variance that the scan leaves unexplained.
    """
    torchreg = importlib.import_module("torchreg")

    def loss(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return 1 - torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1] ** 2

    fixed, moving = load_scan(template)[0], load_scan(scan)[0]
    shift = np.eye(4)
    shift[:3, 3] = foreground_centre(fixed) - foreground_centre(moving)
    there = resample(Volume(moving.data, Grid(moving.data.shape, shift @ moving.grid.affine)),
                     fixed.grid)  # fmt: skip
    pair = [torch.from_numpy(robust_scale(data))[None, None] for data in (there, fixed.data)]
    register = torchreg.AffineRegistration(
        scales=(8, 4), iterations=(300, 100), with_shear=True, verbose=False,
        dissimilarity_function=loss,
    )  # fmt: skip
    register(*pair, return_moved=False)
    theta = np.eye(4)
    theta[:3] = register.get_affine()[0].numpy()
    unit = np.diag([*(2 / (np.array(fixed.data.shape[::-1]) - 1)), 1.0])
    unit[:3, 3] = -1
    unit = unit @ np.eye(4)[[2, 1, 0, 3]]  # voxels to -1 … 1, the last axis first
    step = np.linalg.inv(unit) @ theta @ unit
    world = fixed.grid.affine
    return np.linalg.inv(world @ step @ np.linalg.inv(world)) @ shift


METHODS: dict[str, tuple[str, Callable[[], Register]]] = {
    "model": ("torch", Engine),
    "ants": ("ants", lambda: by_ants),
    "simpleitk": ("SimpleITK", lambda: by_simpleitk),
    "torchreg": ("torchreg", lambda: by_torchreg),
    "dipy": ("dipy", lambda: by_dipy),
}


def carried(
    labels: nib.Nifti1Image, matrix: np.ndarray, grid: nib.Nifti1Image, mapping
) -> np.ndarray:
    """Labels on the template's grid, nearest neighbour."""
    values = np.asanyarray(labels.dataobj).astype(np.int16)
    values = load_mapping(mapping).apply(values) if mapping else values
    step = np.linalg.inv(labels.affine) @ np.linalg.inv(matrix) @ grid.affine
    return ndimage.affine_transform(
        values, step[:3, :3], step[:3, 3], grid.shape, order=0, mode="constant"
    )


def agreement(maps: list[np.ndarray]) -> list[float]:
    """Of every person: mean Dice of the deep structures with the majority of the others."""
    counts = {index: sum((one == index).astype(np.uint8) for one in maps) for index in DEEP}
    return [
        float(np.mean([
            dice(one == i, 2 * (counts[i] - (one == i)) > len(maps) - 1) for i in DEEP
        ]))
        for one in maps
    ]  # fmt: skip


def people(data: Path, dataset: str, count: int) -> list[tuple[Path, Path]]:
    """Scan and labels of the first persons."""
    labels, suffix, _ = DATASETS[dataset]
    found = []
    for folder in sorted((data / dataset).glob("sub-*"))[:count]:
        scan = next(folder.rglob(f"*_{suffix}.nii.gz"))
        found.append((scan, next((data / dataset / labels / folder.name).rglob("*_dseg.nii.gz"))))
    return found


def main() -> None:
    """Register, carry the labels, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--malc", type=int, default=6)
    parser.add_argument("--infant", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "template_T1w.nii.gz"
        brain, mask = load_mni152_template(1), load_mni152_brain_mask(1)
        inside = np.asanyarray(mask.dataobj) > 0
        nib.save(
            nib.Nifti1Image(brain.get_fdata(dtype=np.float32) * inside, brain.affine), template
        )
        grid = load_mni152_brain_mask(2)
        for name in asked.methods:
            needs, make = METHODS[name]
            try:
                importlib.import_module(needs)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            register = make()
            for dataset in DATASETS:
                maps, seconds = [], []
                for scan, labels in people(asked.data, dataset, getattr(asked, dataset)):
                    begun = time.perf_counter()
                    matrix = register(scan, template)
                    seconds.append(time.perf_counter() - begun)
                    carry = partial(carried, nib.load(labels), matrix, grid)
                    maps.append(carry(DATASETS[dataset][2]))
                found = agreement(maps)
                rows.append({
                    "method": name, "dataset": dataset, "persons": len(found),
                    "dice": np.mean(found), "sd": np.std(found, ddof=1), "least": min(found),
                    "seconds": statistics.median(seconds),
                })  # fmt: skip
                print(" ".join(f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()

"""Old heads: how they differ from young ones, and labelled scans of the young made to look old.

Usage: ``python benchmarks/ageing.py table LABELMAPS``
       ``python benchmarks/ageing.py scans DATASET LABELS PROTOCOL OUT [WAY …]``

``table`` writes `tlseg_bids/train/ageing.tsv` from a dataset of whole-head label maps: of the
logarithms of each structure's share of the head (mean of both sides) the first principal component,
as far as it leads from the mean of the five heads at its one end to that of the five at the other,
the lateral ventricle growing (``way``), and the standard deviation of what it leaves (``rest``).

``scans`` takes the T1w of a BIDS dataset and the label maps of PROTOCOL in its derivative LABELS.
For every WAY (1.6) it writes a dataset ``OUT/way-WAY`` of the scans and, in ``derivatives/labels``,
their label maps, both deformed alike (`tlseg_bids.train.synth.ageing`): ventricles grow,
hippocampus, cortex and deep grey matter shrink. WAY 0 leaves them as they are. Prints the volumes
of some structures ÷ those of the original, mean of the scans.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from tlseg_bids.train.dataset import (
    HERE,
    Sample,
    align,
    default_protocol,
    load_classes,
    template_channels,
)
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.train.synth.ageing import class_growth, growing, read_shift, shift, ways
from tlseg_bids.train.synth.shape import read_classes, read_image
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights

TOLD = ("L-LV", "3V", "L-HIP", "L-THA", "L-CTX", "L-CWM")
ENDS = 5
"""Heads whose mean is an end of the way."""


def logs_of(samples: list[Sample]) -> pd.DataFrame:
    """Logarithm of each structure's share of the head, a row for each label map."""
    protocol = default_protocol()
    target = load_classes(protocol).target
    count = np.array([
        np.bincount(target[s.classes.numpy().ravel()], minlength=len(protocol)) for s in samples
    ]).astype(float)  # fmt: skip
    both = (count + count[:, protocol.mirror])[:, 1:]
    names = protocol.table["abbreviation"].str.replace(r"^[LR]-", "", regex=True)[1:]
    shares = pd.DataFrame(np.log(both / both.sum(1, keepdims=True)), columns=names)
    return shares.loc[:, ~shares.columns.duplicated()]


def table_of(logs: pd.DataFrame) -> pd.DataFrame:
    """Columns ``way`` and ``rest`` for each structure, and in `attrs` the share of variance."""
    centred = (logs - logs.mean()).to_numpy()
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axis = axes[0] * np.sign(axes[0][logs.columns.get_loc("LV")])
    along = centred @ axis
    ends = np.sort(along)
    far = ends[-ENDS:].mean() - ends[:ENDS].mean()
    rest = (centred - np.outer(along, axis)).std(0)
    found = pd.DataFrame({"way": axis * far, "rest": rest}, index=logs.columns.rename("structure"))
    found.attrs["explained"] = float(sizes[0] ** 2 / (sizes**2).sum())
    return found


def aligned(data: Path, rules: dict[str, object]) -> list[Sample]:
    """The samples of a dataset, brought to the template of the default model."""
    samples = load_dataset(data, data.name, rules)
    template = load_weights(find_card(load_cards(), "any"))["template"]
    align(samples, template.double().numpy())
    return samples


def own_positions(sample: Sample) -> torch.Tensor:
    """Template positions (3, I, J, K) in mm of a sample's own voxels."""
    size = sample.classes.shape
    index = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in size), indexing="ij"))
    matrix = torch.from_numpy(sample.template_from_voxel).float()
    return (matrix[:3, :3] @ index.reshape(3, -1) + matrix[:3, 3:]).reshape(3, *size)


def older(sample: Sample, way: float) -> tuple[np.ndarray, np.ndarray]:
    """A sample's T1w and class numbers, (I, J, K) each, on its own voxels, that far on the way."""
    here = own_positions(sample)
    if way:
        table = class_growth(sample.protocol, ways()[0] * way)
        here += read_shift(shift(table, growing(sample)), here)
    image = read_image(sample, "T1w", here, sample.template_from_voxel)
    return image.numpy(), read_classes(sample, here, sample.template_from_voxel).numpy()


def volumes(sample: Sample, numbers: np.ndarray) -> np.ndarray:
    """Voxels of the template's structures that are told, (structures,)."""
    into = np.zeros(256, int)
    target = load_classes(sample.protocol).target
    into[: len(target)] = template_channels(sample.protocol)[target]
    names = default_protocol().table["abbreviation"].tolist()
    count = np.bincount(into[numbers.ravel()], minlength=len(names))
    told = count[[names.index(name) for name in TOLD]].astype(float)
    return np.where(told > 0, told, np.nan)


def write(path: Path, voxels: np.ndarray, sample: Sample) -> None:
    """An image on the sample's voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(voxels, sample.world_from_voxel).to_filename(path)


def write_dataset(samples: list[Sample], way: float, there: Path) -> np.ndarray:
    """Write the samples, that far on the way; the told volumes ÷ the originals', a row for each."""
    ratios = []
    for sample in samples:
        name, protocol = sample.name, sample.protocol
        index = load_classes(protocol).index
        label_of = np.zeros(256, np.int16)  # 0 for what is unknown, too
        label_of[: len(index)] = index
        image, numbers = older(sample, way)
        ratios.append(volumes(sample, numbers) / volumes(sample, sample.classes.numpy()))
        write(there / name / "anat" / f"{name}_T1w.nii.gz", image, sample)
        labels = there / "derivatives" / "labels" / name / "anat"
        found = label_of[numbers]
        write(labels / f"{name}_seg-{protocol.name}_dseg.nii.gz", found, sample)
    about = {"Name": f"{there.parent.name}, {there.name}", "BIDSVersion": "1.10.0"}
    (there / "dataset_description.json").write_text(json.dumps(about))
    people = "\n".join(["participant_id", *(sample.name for sample in samples)])
    (there / "participants.tsv").write_text(people + "\n")
    return np.array(ratios)


def scans(data: Path, folder: str, protocol: str, out: Path, asked: list[float]) -> None:
    """The datasets of ``scans``, and a line for each."""
    rules = {"protocol": protocol, "labels": folder, "images": ["T1w"]}
    samples = aligned(data, rules)
    for way in asked:
        ratios = write_dataset(samples, way, there := out / f"way-{way:g}")
        for sidecar in data.glob("T1w.json"):
            (there / sidecar.name).write_bytes(sidecar.read_bytes())
        means = pd.DataFrame(ratios, columns=TOLD).mean()
        told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in means.items())
        print(f"way {way:g}: {len(samples)} scans in {there}; volume ÷ original: {told}")


def main(words: list[str]) -> int:
    """Do what the first word says."""
    if words[0] == "scans":
        ways_asked = [float(word) for word in words[5:] or ["1.6"]]
        scans(Path(words[1]), words[2], words[3], Path(words[4]), ways_asked)
        return 0
    data = Path(words[1])
    found = table_of(logs_of(load_dataset(data, data.name, {})))
    found.round(2).to_csv(HERE / "ageing.tsv", sep="\t")
    print(f"{found.attrs['explained']:.2f} of the variance lies on the way")
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3 or (sys.argv[1], len(sys.argv) < 6) not in (
        ("table", True), ("scans", False),
    ):  # fmt: skip
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))

"""How far off the place is where models see the brain, against that of the reference labels.

Usage: ``python benchmarks/placing.py DATA CARD…`` prints for the scans that `systems.py` tests
first (fold 0 of `malc` and `infant`) and each model the distance in mm, first where its locator
sees the brain, then where its own labels settle: root mean square over the template's structures
between the affine found and the one that the labels' centroids give, which is what training takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from setups import DATASETS, SYSTEMS
from systems import rules, scan_of, subjects

from tlseg_bids import placing
from tlseg_bids.flow import Job
from tlseg_bids.preprocess.prepare import looks
from tlseg_bids.preprocess.register import displacement_mm
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.segment.place import locate
from tlseg_bids.train.dataset import Sample, align
from tlseg_bids.train.scans import load_dataset
from tlseg_bids.volume import load_scan
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights


def from_labels(samples: list[Sample], template: np.ndarray) -> list[np.ndarray]:
    """World mm to template mm (4, 4) of labelled scans, as training aligns them."""
    align(samples, template)
    return [one.template_from_voxel @ np.linalg.inv(one.world_from_voxel) for one in samples]


def distances(folder: Path, subject: str, suffix: str, model: Model, there: np.ndarray) -> list:
    """Distance in mm of the locator's place and of the settled one."""
    scan = scan_of(folder, subject, suffix)
    volume, _ = load_scan(scan.path)
    job = Job(scan, model.card, "", (), (), "", "cpu", 0.0, ())
    *_, seen = looks(volume, model.card.preprocess, locate(model), model.landmarks)
    settled, _ = placing.settle(volume, job, model, [seen])
    frames = (seen, settled.template_from_native)
    return [displacement_mm(there, frame, model.template) for frame in frames]


def main(words: list[str]) -> int:
    """Print a line per scan and model."""
    if len(words) < 2:
        print(__doc__, file=sys.stderr)
        return 64
    data, cards = Path(words[0]), [read_card(Path(word)) for word in words[1:]]
    torch.set_num_threads(1)
    print("| dataset | scan | model | locator, mm | settled, mm |\n|---|---|---|---|---|")
    for card in cards:
        model = load_model(card, load_weights(card))
        for dataset, spec in DATASETS.items():
            samples = load_dataset(data / dataset, dataset, rules(dataset, SYSTEMS["slant8"]))
            places = from_labels(samples, model.template)
            names = subjects(data / dataset, 0, 1)
            for subject in subjects(data / dataset, 0, spec["folds"]):
                there = places[names.index(subject)]
                found = distances(data / dataset, subject, spec["suffix"], model, there)
                cells = " | ".join(f"{one:.1f}" for one in found)
                print(f"| {dataset} | {subject} | {card.name} {card.version} | {cells} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Labels of one scan in several ways of computing them: precision, threads, device.

``python benchmarks/agreement.py SCAN … [--model any] [--pretend] [--out TABLE.tsv]``

Every scan is labelled as the program does by default with two threads, then with one thread, in
float32, in float32 in the frame that the first way found, and on the GPU where there is one.
With ``--pretend`` also on a device that is not there (`tests/pretended.py`), on which a GPU's mixed
precision is made: factors of every product rounded, summed in float32, what is found rounded again.
Printed is the Dice of each structure with the labels of the first way, for every scan: least and
mean over structures, and which structure is the least, and how far from the first way's the brain
is seen. The table has every structure.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import pretended
from tlseg_bids import app, placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.crew import Crew
from tlseg_bids.flow import Job
from tlseg_bids.metrics import dice
from tlseg_bids.postprocess import to_native
from tlseg_bids.preprocess.register import displacement_mm
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.volume import load_scan
from tlseg_bids.zoo.registry import find_card, load_cards
from tlseg_bids.zoo.weights import load_weights

Found = tuple[np.ndarray, np.ndarray]


def ways(name: str) -> dict[str, tuple[Model, Model]]:
    """By what is said of how they compute: the model that finds the brain, and that labels it."""
    card = find_card(load_cards(()), name, "--model")
    tensors = load_weights(card, True)
    model = load_model(card, tensors, crew=Crew(2))
    fast = str(model.precision).removeprefix("torch.")
    alone = replace(model, crew=Crew(1))
    found = {f"{fast}, 2 threads": (model, model), f"{fast}, 1 thread": (alone, alone)}
    if model.precision != torch.float32:
        full = replace(model, precision=torch.float32)
        found |= {"float32": (full, full), "float32, same frame": (model, full)}
    if torch.cuda.is_available():
        there = load_model(card, tensors, "cuda", Crew(2))
        found["GPU"] = (there, there)
    return found


def pretended_ways(name: str, path: Path) -> dict[str, Found]:
    """Labels and frames by precision, found on a device that is not there."""
    found = {}
    for precision in (torch.float16, torch.bfloat16, torch.float32):
        with pytest.MonkeyPatch.context() as patch, pretended.device(patch):
            card = find_card(load_cards(()), name, "--model")
            model = load_model(card, load_weights(card, True), pretended.DEVICE.type)
            model = replace(model, precision=precision)
            said = str(precision).removeprefix("torch.")
            found[f"a GPU's {said}, pretended"] = labels(path, model, model)
    return found


def labels(path: Path, finder: Model, model: Model) -> Found:
    """As the program labels the scan, on its own grid, and where it sees the brain."""
    suffix = "T2w" if "T2w" in path.name else "T1w"
    scan = Scan(path, path.parent, {"sub": "x"}, suffix)
    job = Job(scan, model.card, "", (), (), "", model.device.type, 0.0)
    volume, _ = load_scan(path)
    prepared = placing.find(volume, job, finder)
    segmentation = to_native(app.finely(prepared, model), volume, model.protocol, crew=model.crew)
    return segmentation.labels.data, prepared.template_from_native


def main() -> None:
    """Label, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scans", type=Path, nargs="+")
    parser.add_argument("--model", default="any")
    parser.add_argument("--pretend", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as the program does
    rows = []
    for path in asked.scans:
        known = ways(asked.model)
        ((_, model), *_) = known.values()
        all_labels = {way: labels(path, *pair) for way, pair in known.items()}
        if asked.pretend:
            all_labels |= pretended_ways(asked.model, path)
        (_, (first, frame)), *others = all_labels.items()
        for way, (found, seen) in others:
            apart_mm = displacement_mm(frame, seen, model.template)
            table = model.protocol.table.iloc[1:]
            for index, name in zip(table["index"], table["name"], strict=True):
                if (first == index).any() or (found == index).any():
                    overlap = dice(found == index, first == index)
                    rows.append({"scan": path.name, "way": way, "name": name, "dice": overlap})
            some = pd.DataFrame([row for row in rows if row["way"] == way])
            some = some[some["scan"] == path.name].set_index("name")["dice"]
            print(f"{path.name}, {way}: mean {some.mean():.4f}, least {some.min():.4f} "
                  f"({some.idxmin()}), {(some < 0.998).sum()} of {len(some)} below 0.998, "
                  f"frame {apart_mm:.4f} mm away", flush=True)  # fmt: skip
    every = pd.DataFrame(rows)
    print(every.groupby(["way", "name"])["dice"].agg(["mean", "min"]).round(4).to_string())
    if asked.out:
        every.to_csv(asked.out, sep="\t", index=False, float_format="%.5f")


if __name__ == "__main__":
    main()

"""How far the frame of a scan moves when the scan ends inside the brain.

Usage: ``python benchmarks/cuts.py CARD SCAN…`` takes slices off the lower or the upper end of every
scan, counted from the first slice that shows a head, and prints a line per cut: root mean square
distance in mm, over the template's structures, between the frame of the cut scan and that of the
whole one; first with landmarks as whole structures have them, then as the scan shows them
(mean ± sd over scans, largest). A cut in which no brain is found counts as missing and is told.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from tlseg_bids import placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import ScanError
from tlseg_bids.flow import Job
from tlseg_bids.labels.landmarks import Landmarks
from tlseg_bids.preprocess.prepare import looks
from tlseg_bids.preprocess.register import displacement_mm
from tlseg_bids.segment.model import Model, load_model
from tlseg_bids.segment.place import locate
from tlseg_bids.volume import Grid, Volume, load_scan
from tlseg_bids.zoo.card_file import read_card
from tlseg_bids.zoo.weights import load_weights

CUTS = (("bottom", 10), ("bottom", 20), ("bottom", 35), ("top", 15), ("top", 30))


def cut(scan: Volume, end: str, length_mm: float) -> Volume:
    """A scan without the slices of its lower or upper end, from the first that shows a head on."""
    codes = nib.aff2axcodes(scan.grid.affine)
    axis = next(number for number, code in enumerate(codes) if code in "SI")
    slices = round(length_mm / np.linalg.norm(scan.grid.affine[:3, axis]))
    others = tuple(number for number in range(3) if number != axis)
    head = np.flatnonzero((scan.data > scan.data.mean()).any(others))
    first, last = 0, scan.data.shape[axis]
    if (end == "bottom") == (codes[axis] == "S"):
        first = head[0] + slices
    else:
        last = head[-1] + 1 - slices
    if first >= last:
        raise ScanError(f"{length_mm} mm are more than the head has", "", "take fewer")
    affine = scan.grid.affine.copy()
    affine[:3, 3] += first * affine[:3, axis]
    data = np.ascontiguousarray(scan.data.take(range(first, last), axis))
    return Volume(data, Grid(data.shape, affine))


def frame(scan: Volume, job: Job, model: Model) -> np.ndarray:
    """World mm to template mm, (4, 4), as the program finds it without turning the head."""
    *_, seen = looks(scan, model.card.preprocess, locate(model), model.landmarks)
    return placing.settle(scan, job, model, [seen])[0].template_from_native


def blinded(model: Model) -> Model:
    """The model with whole structures as landmarks."""
    other = replace(model)
    other.__dict__["landmarks"] = Landmarks(model.template)
    return other


def main(words: list[str]) -> int:
    """Print the table."""
    if len(words) < 2:
        print(__doc__, file=sys.stderr)
        return 64
    card = read_card(Path(words[0]))
    model = load_model(card, load_weights(card))
    blind = blinded(model)
    torch.set_num_threads(1)
    moved: dict[tuple[str, int], list[list[float]]] = {one: [] for one in CUTS}
    for word in words[1:]:
        whole, _ = load_scan(Path(word))
        path = Path(word)
        asked = Scan(path, path.parent, {"sub": "x"}, "T2w" if "T2w" in path.name else "T1w")
        job = Job(asked, card, "", (), (), "", "cpu", 0.0, ())
        there = frame(whole, job, model)
        for one in CUTS:
            try:
                part = cut(whole, *one)
                found = [frame(part, job, seen) for seen in (blind, model)]
            except ScanError as error:
                print(f"{path.name}, {one}: {error.what}", file=sys.stderr)
                continue
            moved[one].append([displacement_mm(there, at, model.template) for at in found])
    print("| cut | scans | whole structures, mm | what the scan shows, mm |\n|---|--:|--:|--:|")
    for (end, length), rows in moved.items():
        table = np.array(rows).reshape(-1, 2)
        cells = [f"{c.mean():.1f} ± {c.std():.1f} ({c.max():.1f})" for c in table.T if len(c)]
        print(f"| {length} mm at the {end} | {len(rows)} | {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

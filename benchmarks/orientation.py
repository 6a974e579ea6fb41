"""What becomes of a scan whose header turns or mirrors the head: found, told, or refused.

Usage: ``python benchmarks/orientation.py SCAN … [--model any] [--headers NAME …]``

Every scan is labelled as it is, and with headers changed on purpose: half turns, mirrors along one
axis, turns by 45° and 90°. For each: whether the program labels it; whether it warns of the
direction, or that none shows a brain; the expected Dice of the segmenter's coarse answer in each
direction in which it was asked (none where the settler was sure); Dice with the labels of the
unchanged scan (mean over structures; where the header mirrors, with the sides exchanged, which is
what an image without a mark of its side must give).
Prints a table; exit code 1 if a wrong direction was labelled below `SAME` without a warning.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tlseg_bids import placing
from tlseg_bids.bids.scan import Scan
from tlseg_bids.errors import ScanError
from tlseg_bids.flow import Job
from tlseg_bids.labels.protocol import LabelProtocol
from tlseg_bids.postprocess import to_native
from tlseg_bids.postprocess.quality import implausible
from tlseg_bids.segment.answer import Ask, segment
from tlseg_bids.segment.model import Models
from tlseg_bids.volume import Grid, Volume, load_scan
from tlseg_bids.zoo.registry import find_card, load_cards

SAME = 0.85


def turn(axis: int, degrees: float) -> np.ndarray:
    """Rotation about a world axis, (4, 4)."""
    matrix, angle = np.eye(4), np.deg2rad(degrees)
    a, b = (n for n in range(3) if n != axis)
    matrix[a, a] = matrix[b, b] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


def headers() -> dict[str, np.ndarray]:
    """Changes of the affine by name; as it is comes first."""
    found = {"as it is": np.eye(4)}
    for axis, name in enumerate("xyz"):
        mirror = np.eye(4)
        mirror[axis, axis] = -1
        found[f"half turn about {name}"] = turn(axis, 180)
        found[f"mirrored along {name}"] = mirror
        found[f"45° about {name}"] = turn(axis, 45)
        found[f"90° about {name}"] = turn(axis, 90)
    return found


def label(scan: Volume, job: Job, models: Models) -> tuple[np.ndarray | None, str]:
    """Labels, or None where the scan is refused; and what is said."""
    model = models.get(job.card, job.device)
    try:
        prepared = placing.find(scan, job, model)
        answer = segment(model, prepared, Ask(fine=False))
        found = to_native(answer, scan, model.protocol)
    except ScanError as error:
        return None, error.what
    if reason := implausible(found.qc):
        return None, reason
    return found.labels.data, "; ".join(prepared.warnings)


def agreement(one: np.ndarray, other: np.ndarray, protocol: LabelProtocol, mirrored: bool) -> float:
    """Mean Dice over the structures of `one`; with `mirrored` the sides of `other` exchanged."""
    if mirrored:
        table = np.arange(int(protocol.indices.max()) + 1)
        table[protocol.indices] = protocol.indices[protocol.mirror]
        other = table[other]
    scores = [
        2 * np.sum((one == i) & (other == i)) / (np.sum(one == i) + np.sum(other == i))
        for i in np.unique(one)[1:]
    ]
    return float(np.mean(scores))


def main() -> int:
    """Print the table."""
    it = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    it.add_argument("scans", nargs="+", type=Path)
    it.add_argument("--model", default="any")
    it.add_argument("--headers", nargs="+", choices=list(headers()), help="these alone")
    given = it.parse_args()
    torch.set_num_threads(1)
    card, models = find_card(load_cards(), given.model), Models(offline=True)
    protocol = card.protocol_of(card.protocol)
    print("| scan | header | labelled | told | coarse Dice tried | Dice | seconds |")
    print("|---|---|---|---|---|--:|--:|")
    silent, coarse, coarsely = 0, [], placing.coarsely

    def noted(*given, **named):
        coarse.append(coarsely(*given, **named))
        return coarse[-1]

    placing.coarsely = noted
    for path in given.scans:
        volume, _ = load_scan(path)
        scan = Scan(path, path.parent, {"sub": "x"}, "T1w")
        job = Job(scan, card, "", (), (), "", "cpu", 0.0)
        first = None
        for name, change in headers().items():
            begun = time.monotonic()
            coarse.clear()
            if name != "as it is" and given.headers and name not in given.headers:
                continue
            changed = Volume(volume.data, Grid(volume.grid.shape, change @ volume.grid.affine))
            found, said = label(changed, job, models)
            first = found if first is None else first
            mirrored = np.linalg.det(change[:3, :3]) < 0
            dice = np.nan if found is None else agreement(first, found, protocol, mirrored)
            told = "upright" in said or "no direction" in said
            silent += found is not None and not told and dice < SAME
            yes = "no" if found is None else "yes"
            tried = " ".join(f"{one:.2f}" for _, one in coarse)
            print(f"| {path.name} | {name} | {yes} | {'yes' if told else said[:60] or 'no'} | "
                  f"{tried} | {dice:.3f} | {time.monotonic() - begun:.0f} |",
                  flush=True)  # fmt: skip
    print(f"\nlabelled otherwise, and nothing said: {silent}")
    return int(silent > 0)


if __name__ == "__main__":
    sys.exit(main())

"""How often wrong labels are taken for right ones, and right ones for wrong.

``python benchmarks/wrong_labels.py DATASET DERIVATIVE OUT``, where OUT is what
``tlseg DATASET OUT participant`` wrote. The labels of every scan are damaged on purpose: left and
right exchanged, the image turned over, shifted by 20 mm along each axis, and taken from two other
scans (placed voxel on voxel).
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np

from tlseg_bids.adapt.evidence import measure, why_wrong
from tlseg_bids.adapt.labels import collect
from tlseg_bids.adapt.matching import match
from tlseg_bids.bids.discover import discover
from tlseg_bids.config import Config
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.volume import load_volume

PROTOCOL = load_protocol("aseg")
SHIFT_MM = 20.0


def damaged(one, others, reading):
    """Kinds of labels of a scan: as they are, and damaged."""
    channels = one.channels
    yield "right", channels
    mirror = np.append(reading.target.mirror, np.arange(len(reading.target), 256)).astype(np.uint8)
    yield "exchanged sides", mirror[channels]
    yield "turned over", np.flip(channels, int(np.abs(one.grid.affine[0, :3]).argmax()))
    for axis in range(3):
        step = round(SHIFT_MM / one.grid.spacing_mm[axis])
        yield "shifted by 20 mm", np.roll(channels, step, axis)
    for other in others:
        found = np.zeros_like(channels)
        part = tuple(slice(0, min(a, b)) for a, b in zip(other.shape, found.shape, strict=True))
        found[part] = other[part]
        yield "of another scan", found


def main() -> None:
    """Print a table: kind of damage, how many, refused, and with which word."""
    root, derivative, out = map(Path, sys.argv[1:4])
    scans, _ = discover(Config(root, out, "participant"))
    outputs = [
        (scan, next(out.glob(f"**/{scan.stem}_space-{scan.suffix}_seg-aseg_dseg.json"), None))
        for scan in scans
    ]
    there = {scan.path: file for scan, file in outputs if file is not None}
    collected = collect(match(derivative, [s for s in scans if s.path in there]), PROTOCOL)
    table = np.zeros(int(PROTOCOL.indices.max()) + 1, np.uint8)
    table[PROTOCOL.indices] = np.arange(len(PROTOCOL))
    counts: Counter[tuple[str, str]] = Counter()
    for number, one in enumerate(collected.usable):
        sidecar = there[one.scan.path]
        frame = np.array(json.loads(sidecar.read_text())["TemplateFromScan"])
        labels = nib.load(str(sidecar).replace(".json", ".nii.gz"))
        base = table[np.asarray(labels.dataobj).astype(int)]
        image = load_volume(one.scan.path)
        alike = [o for o in collected.usable if o.scan.suffix == one.scan.suffix]
        place = [o.name for o in alike].index(one.name)
        others = [alike[(place + k) % len(alike)].channels for k in (1, 2)]
        for kind, channels in damaged(one, others, collected.reading):
            found = measure(image, channels, base, collected.reading, frame)
            why = why_wrong(one.file.name, found, [])
            counts[kind, "kept" if why is None else why[0].split(":")[0].split(" of sub")[0]] += 1
        print(f"{number + 1}/{len(collected.usable)}", file=sys.stderr, flush=True)
    for (kind, verdict), count in sorted(counts.items()):
        print(f"{kind}\t{verdict}\t{count}")


if __name__ == "__main__":
    main()

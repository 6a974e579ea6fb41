"""Heads to rehearse on: label maps that travel with the program, so that no one's scans are needed.

Six whole-head label maps at 2 mm (`rehearsal/NOTICE`), refined to 1 mm when they are read: every
class is interpolated, and the largest share wins, so that borders are smooth.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from tlseg_bids.train.dataset import Sample, align, default_protocol, load_classes

FILE = Path(__file__).parent / "rehearsal" / "labelmaps.npz"
NAME = "rehearsal"
FACTOR = 2


def rehearsal_samples(template: np.ndarray) -> list[Sample]:
    """The label maps, aligned with `template` (channels, 3) mm; uint8 classes at 1 mm."""
    protocol = default_protocol()
    number = {int(index): n for n, index in enumerate(load_classes(protocol).index)}
    content = FILE.read_bytes()
    samples = []
    with np.load(FILE) as stored:
        lut = np.array([number.get(int(index), 0) for index in stored["index"]], np.uint8)
        for name in sorted(key for key in stored.files if f"{key}_affine" in stored.files):
            fine = refined(lut[stored[name]])
            step = np.diag([1 / FACTOR] * 3 + [1.0])
            step[:3, 3] = (1 / FACTOR - 1) / 2
            samples.append(Sample(
                name, NAME, torch.from_numpy(fine), {}, stored[f"{name}_affine"] @ step,
                np.arange(len(protocol)), hashlib.sha256(content).hexdigest(), protocol,
            ))  # fmt: skip
    align(samples, template)
    return samples


def refined(coarse: np.ndarray) -> np.ndarray:
    """Class numbers uint8 (I, J, K) at twice the resolution: the class with the largest share."""
    shape = [FACTOR * n for n in coarse.shape]
    out, share = torch.zeros(shape, dtype=torch.uint8), torch.zeros(shape)
    for number, found in enumerate(ndimage.find_objects(coarse + 1)):
        if found is None:
            continue
        box = [slice(max(b.start - 1, 0), b.stop + 1) for b in found]
        mask = torch.from_numpy((coarse[tuple(box)] == number).astype(np.float32))
        fine = F.interpolate(mask[None, None], scale_factor=FACTOR, mode="trilinear")[0, 0]
        where = tuple(slice(FACTOR * b.start, FACTOR * b.start + n)
                      for b, n in zip(box, fine.shape, strict=True))  # fmt: skip
        larger = fine > share[where]
        out[where][larger], share[where][larger] = int(number), fine[larger]
    return out.numpy()

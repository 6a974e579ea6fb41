"""What of a dataset a recipe learns from: which scans, which slices, in which protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tlseg_bids.errors import UsageError
from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.train.dataset import IGNORE, Sample

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
RANDOM = "random"
MARGIN = 0.05


def subset(
    samples: list[Sample], rules: Mapping[str, Any], channels: Sequence[str] = ()
) -> list[Sample]:
    """The scans of a dataset as its rules in the recipe ask for them.

    Parameters
    ----------
    rules : mapping
        ``first``: only so many scans; ``head``: protocol to learn in, its labels are folded to it;
        ``budget``: {axis = "axial", share = 0.33}, see `within_budget`.
    channels : sequence of str
        Suffixes of the images that are shown together.

    Raises
    ------
    UsageError
        If a rule makes no sense, or a scan lacks an image.
    """
    chosen = samples[: rules.get("first", len(samples))]
    if "head" in rules:
        for name in {sample.protocol.name for sample in chosen}:
            load_mapping(f"{name}_to_{rules['head']}")
        chosen = [replace(sample, head=rules["head"]) for sample in chosen]
    if channels:
        chosen = [_together(sample, tuple(channels), rules) for sample in chosen]
    if "budget" in rules:
        chosen = [within_budget(sample, **rules["budget"]) for sample in chosen]
    return chosen


def _together(sample: Sample, channels: tuple[str, ...], rules: Mapping[str, Any]) -> Sample:
    missing = [suffix for suffix in channels if suffix not in sample.images]
    if missing and rules.get("real", 0.0) > 0:
        raise UsageError(
            f"the image {' and '.join(missing)} is missing",
            f"dataset '{sample.dataset}', {sample.name}",
            "name the dataset's images in the recipe, or other channels, or set real = 0",
        )  # fmt: skip
    return replace(sample, channels=channels)


def within_budget(sample: Sample, axis: str = RANDOM, share: float = 0.33) -> Sample:
    """The scan with the labels of some slices only; of the others nothing is known.

    The slices are drawn once for each scan, before any transform, evenly from those between 5 and
    95 % of the labelled extent: `share` of all that the extent has. What is not labelled is marked
    in the label map itself, so that the mark goes through every deformation, mirror and crop with
    the labels (Richter & Fetit 2022, doi:10.3389/fninf.2022.1006532).

    Parameters
    ----------
    axis : str
        ``sagittal``, ``coronal``, ``axial``, or ``random``: one of them for each scan.
    share : float
        Of the slices, above 0 and up to 1.

    Raises
    ------
    UsageError
        If the axis is unknown or the share none.
    """
    where = f"budget of dataset '{sample.dataset}'"
    if axis not in (*AXES, RANDOM):
        raise UsageError(f"unknown axis '{axis}'", where, f"use {', '.join((*AXES, RANDOM))}")
    if not 0 < share <= 1:
        raise UsageError(f"the share {share:g} is not above 0 and up to 1", where, "write 0.33")
    seed = hashlib.sha256(f"{sample.dataset}/{sample.name}".encode()).digest()
    rng = np.random.default_rng(list(seed))
    number = int(rng.integers(3)) if axis == RANDOM else AXES[axis]
    extent = np.flatnonzero((sample.classes > 0).any(dim=_others(number)).numpy())
    low, size = int(extent[0]), int(extent[-1]) + 1 - int(extent[0])
    inner = np.arange(low + int(MARGIN * size), low + size - int(MARGIN * size))
    count = min(max(round(share * size), 1), len(inner))
    kept = torch.as_tensor(np.sort(rng.choice(inner, count, replace=False)))
    classes = torch.full_like(sample.classes, IGNORE)
    classes.index_copy_(number, kept, sample.classes.index_select(number, kept))
    return replace(sample, classes=classes, outside=IGNORE)


def _others(axis: int) -> tuple[int, ...]:
    return tuple(a for a in range(3) if a != axis)

"""Tiny datasets named as the recipes of the published systems expect, and tiny recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from heads import blob_head, describe

from tlseg_bids.labels.mapping import load_mapping
from tlseg_bids.train.recipe import Recipe

SPACING_MM = 8.0
BOX_MM = [[-96.0, 96.0]] * 3
TILE = [12, 12, 12]
HALVES = [[0, 12]] * 3


def write_datasets(root: Path) -> Path:
    """`labelmaps`, `infant` and `malc`, three scans each, as balls inside a ball."""
    back = {t: s for s, t in reversed(load_mapping("braincolor_to_aseg").pairs.items())}
    (root / "malc").mkdir(parents=True)
    ages = "".join(f"sub-0{n}\t{20 + 7 * n}\n" for n in range(3))
    (root / "malc" / "participants.tsv").write_text("participant_id\tage\n" + ages)
    for number in range(3):
        name, scale = f"sub-0{number}", 1 - 0.04 * number
        path = root / "labelmaps" / name / "anat" / f"{name}_seg-head_dseg.nii.gz"
        blob_head(path, scale)
        source = nib.load(path)
        labels = np.asarray(source.dataobj)
        parcels = np.vectorize(lambda i: max(back.get(i, 0), 0))(labels)
        for dataset, folder, found in (("infant", "jlf", labels), ("malc", "manual", parcels)):
            inside = (labels > 0).astype(np.float32)
            save(root / dataset / "derivatives" / folder, name, "dseg", found.astype(np.int16))
            save(root / dataset, name, "T1w", inside + labels / 200)
            save(root / dataset, name, "T2w", 2 * inside - labels / 200)
    for name in ("labelmaps", "infant", "malc"):
        describe(root, name, "CC0-1.0")
    return root


def save(root: Path, subject: str, suffix: str, data: np.ndarray) -> None:
    """A file of a dataset on the balls' grid."""
    path = root / subject / "anat" / f"{subject}_{suffix}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data.astype(np.int16 if suffix == "dseg" else np.float32), FRAME)
    nib.save(image, path)


FRAME = np.diag([2.0, 2, 2, 1])


def small_network(network: dict[str, Any]) -> dict[str, Any]:
    """The same network with a few channels and at most four levels."""
    if "of" in network:
        return {**network, "of": small_network(network["of"])}
    if network["network"] == "patches":
        return {**network, "widths": [2, 2, 3], "dense": [4, 5, 6], "reach": 1}
    features = [2, 3, 4, 4][: len(network["features"])]
    design = network.get("design")
    few = {**network, "features": features}
    if design:
        few["design"] = {**design, **({"age": 3} if design.get("age") else {})}
    return few


def shrunk(recipe: Recipe) -> Recipe:
    """A recipe on 24³ voxels of 8 mm, for two steps; no image of its scans is moved."""
    datasets = {
        name: {key: value for key, value in rules.items() if key != "moved"}
        for name, rules in recipe.datasets.items()
    }
    places, network, patch = recipe.places, small_network(recipe.network), 16
    if places.kind == "tiles":
        places, patch = replace(places, begins=HALVES), TILE
        network["each"] = network["each"][:8]
    if places.kind == "voxels":
        places, patch = replace(places, voxels=16, rim=1), 24
    if places.kind == "views":
        places, patch = replace(places, slices=2), [24, 24, 24]
    return replace(
        recipe, network=network, places=places, patch=patch, spacing_mm=SPACING_MM, box_mm=BOX_MM,
        steps=1, accumulate=1, batch=1, warmup=0, datasets=datasets,
        prior_mm=dict.fromkeys(recipe.prior_mm, 2 * SPACING_MM),
    )  # fmt: skip


def small_strategy(strategy: dict[str, Any]) -> dict[str, Any]:
    """A card's strategy on the shrunk recipe's box."""
    if strategy["name"] == "tiles":
        return {**strategy, "window": TILE, "begins": HALVES}
    if strategy["name"] == "whole":
        return strategy
    return {**strategy, "window": 16}

"""All labelled scans of some recipes in one file, for a machine that has no datasets.

The file is a compressed ``.npz`` without pickled objects: class maps (uint8), images quantised to
8 bits, and an index in JSON with affines, hashes of the source files, rules and the datasets'
descriptions, licences among them.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlseg_bids.bids.atomic import atomic
from tlseg_bids.errors import DataError, UsageError
from tlseg_bids.labels.protocol import load_protocol
from tlseg_bids.train.dataset import IGNORE, Sample, default_protocol, load_classes

FORMAT = 1
INDEX = "index"
LEVELS = 255
BRIGHTEST = 99.9  # percentile of the voxels that are not background
UNREADABLE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)
RULES = ("protocol", "labels", "merge", "ignore", "fill", "images", "moved")


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed file and its index; arrays are read when they are asked for."""

    path: Path
    index: dict[str, Any]

    def samples(self, name: str, rules: dict[str, Any]) -> list[Sample]:
        """The scans of a dataset, as `load_dataset` would give them, images to 8 bits.

        Raises
        ------
        DataError
            If the dataset is missing, damaged or was packed by other rules, or a label has gone.
        """
        known = self.index["datasets"]
        if name not in known:
            raise DataError(
                f"no dataset '{name}'", self.path, f"it holds {', '.join(known)}; pack it again"
            )
        if known[name]["rules"] != loading_rules(rules):
            before, now = known[name]["rules"], loading_rules(rules)
            differing = [key for key in RULES if before.get(key) != now.get(key)]
            raise DataError(
                f"dataset '{name}' was packed with another {' and '.join(differing)}",
                self.path, "pack it again with this recipe",
            )  # fmt: skip
        rows = [row for row in self.index["samples"] if row["dataset"] == name]
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return [self._sample(row, arrays) for row in rows]
        except (*UNREADABLE, KeyError) as error:
            raise DataError(
                f"a scan of dataset '{name}' cannot be read ({error})", self.path,
                "the file is damaged: copy it or pack it again",
            ) from error  # fmt: skip

    def description(self, name: str) -> dict[str, Any]:
        """The dataset's ``dataset_description.json``; empty if it is not in the file."""
        return self.index["datasets"].get(name, {}).get("description", {})

    def _sample(self, row: dict[str, Any], arrays: np.lib.npyio.NpzFile) -> Sample:
        protocol = load_protocol(row["protocol"])
        numbers = self._lut(row["protocol"])[arrays[f"classes/{row['key']}"]]
        images = {
            suffix: torch.from_numpy(arrays[f"{suffix}/{row['key']}"]).float() * step + low
            for suffix, (low, step) in row["images"].items()
        }
        return Sample(
            row["name"], row["dataset"], torch.from_numpy(numbers), images,
            np.array(row["affine"]), np.array(row["group"]), row["sha256"], protocol,
            age_years=row.get("age_years", math.nan),
        )  # fmt: skip

    def _lut(self, protocol: str) -> np.ndarray:
        """Class numbers of this program for those of the one that packed."""
        now = {int(i): n for n, i in enumerate(load_classes(load_protocol(protocol)).index)}
        lut = np.full(256, IGNORE, np.uint8)
        for number, index in enumerate(self.index["classes"][protocol]):
            if index not in now:
                raise DataError(
                    f"label {index} of protocol '{protocol}' is not known any more",
                    self.path, "pack the datasets again",
                )  # fmt: skip
            lut[number] = now[index]
        return lut


def loading_rules(rules: dict[str, Any]) -> dict[str, Any]:
    """The rules that decide what is read from a dataset, as JSON gives them back."""
    return json.loads(json.dumps({key: rules[key] for key in RULES if key in rules}))


def write_pack(
    samples: dict[str, list[Sample]], rules: dict[str, dict[str, Any]],
    descriptions: dict[str, dict[str, Any]], path: Path, limit_bytes: int,
) -> int:  # fmt: skip
    """Write samples into one file; returns its size in bytes.

    Parameters
    ----------
    samples, rules, descriptions : dict
        By dataset: its scans, the recipe's rules, and its ``dataset_description.json``.
    limit_bytes : int
        The file may be so large.

    Raises
    ------
    UsageError
        If it would be larger; no file is left then.
    CannotCreateError, OutputError
        If it cannot be written.
    """
    arrays, rows = {}, []
    for sample in (s for found in samples.values() for s in found):
        key = f"{sample.dataset}/{len(rows):04d}_{sample.name}"
        arrays[f"classes/{key}"] = sample.classes.numpy()
        levels = {}
        for suffix, image in sample.images.items():
            arrays[f"{suffix}/{key}"], *levels[suffix] = quantise(image.numpy())
        rows.append({
            "key": key, "name": sample.name, "dataset": sample.dataset,
            "protocol": sample.protocol.name, "sha256": sample.sha256, "images": levels,
            "affine": np.asarray(sample.world_from_voxel).tolist(),
            "group": np.asarray(sample.group).tolist(),
            **({} if math.isnan(sample.age_years) else {"age_years": sample.age_years}),
        })  # fmt: skip
    protocols = sorted({row["protocol"] for row in rows} | {default_protocol().name})
    index = {
        "format": FORMAT,
        "datasets": {
            name: {"rules": loading_rules(rules[name]), "description": descriptions[name]}
            for name in samples
        },
        "classes": {p: load_classes(load_protocol(p)).index.tolist() for p in protocols},
        "samples": rows,
    }
    arrays[INDEX] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    with atomic(path) as stream:
        np.savez_compressed(stream, **arrays)
        size = stream.tell()
        if size > limit_bytes:
            raise UsageError(
                f"the packed data take {size / 2**20:.3g} MiB, more than the "
                f"{limit_bytes / 2**20:.3g} allowed", path,
                "allow more with --limit, or name fewer datasets",
            )  # fmt: skip
    return size


def quantise(image: np.ndarray) -> tuple[np.ndarray, float, float]:
    """An image in 256 levels: (uint8, lowest value, width of a level).

    Half a level is the largest error below the 99.9th percentile of the voxels that are not
    background; brighter ones are clipped to it, as the synthesis of training examples does. Where
    there are values below 0, 0 is a level: what lies above it is what a scan shows.
    """
    low = float(image.min())
    inside = image[image > low]
    top = float(np.percentile(inside, BRIGHTEST)) if inside.size else low + 1
    step = (top - low) / LEVELS
    if low < 0 < top:
        below = min(math.ceil(-low / step), LEVELS - 1)
        # in float32, so that so many levels above the lowest value are exactly 0
        step = float(np.float32(max(-low / below, top / (LEVELS - below))))
        low = -below * step
    return np.clip(np.rint((image - low) / step), 0, LEVELS).astype(np.uint8), low, step


def read_pack(path: Path) -> Packed:
    """Open a packed file.

    Raises
    ------
    DataError
        If it is not one, or of another format.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(arrays[INDEX].tobytes())
    except (*UNREADABLE, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"this is no packed training data ({error})", path, "make it with tlseg-train pack"
        ) from error
    if index.get("format") != FORMAT:
        raise DataError(
            f"packed in format {index.get('format')} instead of {FORMAT}", path, "pack it again"
        )
    return Packed(path, index)

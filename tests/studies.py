"""Simulated studies: derivatives as the level ``participant`` leaves them, with known effects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tlseg_bids.labels.protocol import load_protocol

ASEG = load_protocol("aseg")
LABELS = [int(index) for index in ASEG.indices]
STRUCTURES = len(LABELS) - 1
PAIRS = zip(ASEG.table["index"], ASEG.table["mirror"], strict=True)
SIDES = [min(int(index), int(mirror)) for index, mirror in PAIRS]
TYPICAL = 1000.0 + 400.0 * np.array(SIDES[1:])  # the same on both sides
TYPICAL_ICV = 1.5e6


@dataclass(frozen=True)
class Person:
    """A scan to be made up: who, when, and its volumes without the background, mm³."""

    label: str
    volumes: np.ndarray
    icv: float | None = TYPICAL_ICV
    session: str = ""
    run: str = ""
    echo: str = ""
    days: float | None = None
    suffix: str = "T1w"
    sidecar: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """Name of the label map without ``_dseg.nii.gz``."""
        visit = f"_ses-{self.session}" if self.session else ""
        run = f"_run-{self.run}" if self.run else ""
        echo = f"_echo-{self.echo}" if self.echo else ""
        return f"sub-{self.label}{visit}{run}{echo}_space-{self.suffix}_seg-aseg"

    @property
    def folder(self) -> str:
        """Where it lies."""
        visit = f"ses-{self.session}/" if self.session else ""
        return f"sub-{self.label}/{visit}anat"


def write_derivatives(out: Path, people: Iterable[Person]) -> Path:
    """Write an output folder with one label map (empty) and its tables for every person."""
    out.mkdir(parents=True, exist_ok=True)
    description = {
        "Name": "made up", "BIDSVersion": "1.10.0", "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "tlseg", "Version": "0"}], "DatasetLinks": {"raw": "../raw"},
    }  # fmt: skip
    (out / "dataset_description.json").write_text(json.dumps(description))
    for person in people:
        write_person(out, person)
    return out


def write_person(out: Path, person: Person) -> Path:
    """Write one scan; returns the label map."""
    folder = out / person.folder
    folder.mkdir(parents=True, exist_ok=True)
    dseg = folder / f"{person.stem}_dseg.nii.gz"
    dseg.touch()
    name = person.stem.split("_space-")[0]
    age = {"Days": person.days, "PostMenstrualWeeks": None, "Source": "participants.tsv"}
    sidecar = {
        "Sources": [f"bids:raw:{person.folder}/{name}_{person.suffix}.nii.gz"],
        "Model": {"Name": "any", "Version": "1", "Sha256": "ab", "Licence": "Apache-2.0"},
        "Age": age, "Flags": [], "Warnings": [], "ContentKey": f"key-{person.stem}",
        "QualityControl": {"mean_confidence": 0.9, "predicted_dice": 0.85},
        "Scanner": {"Manufacturer": "Siemens", "MagneticFieldStrength": 3},
        **person.sidecar,
    }  # fmt: skip
    (folder / f"{person.stem}_dseg.json").write_text(json.dumps(sidecar))
    lines = ["index\tname\thard_mm3\tsoft_mm3\tvoxels\tmean_confidence"]
    full = [TYPICAL_ICV, *map(float, person.volumes)]
    for label, title, volume in zip(LABELS, ASEG.table["name"], full, strict=True):
        lines.append(f"{label}\t{title}\t{volume!r}\t{volume * 1.01!r}\t{int(volume)}\t0.9")
    table = folder / f"{person.stem}_desc-volumes_dseg.tsv"
    table.write_text("\n".join(lines) + "\n")
    brain = float(np.sum(person.volumes))
    icv = None if person.icv is None else float(person.icv)
    totals = {"BrainVolume": {"Value": brain}, "IntracranialVolume": {"Value": icv}}
    table.with_suffix(".json").write_text(json.dumps(totals))
    return dseg


def write_raw(raw: Path, tables: Mapping[str, str] | None = None) -> Path:
    """Write a BIDS folder of tables alone; cells of a table are separated by ``|``."""
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    for name, text in (tables or {}).items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(text.replace("|", "\t"), encoding="utf-8")
    return raw


@dataclass(frozen=True)
class Effects:
    """Truth of a simulation, as shares of a structure's typical volume."""

    site_shift: Mapping[str, float]
    site_scale: Mapping[str, float]
    per_year: float = -0.004
    male: float = 0.05
    noise: float = 0.05
    icv_power: float = 0.7


def simulate(count: int, effects: Effects, seed: int = 0) -> tuple[list[Person], list[str]]:
    """People of several sites, and the rows of their participants.tsv (with a header)."""
    rng = np.random.default_rng(seed)
    sites = sorted(effects.site_shift)
    people, rows = [], ["participant_id|age|sex|site|group"]
    for n in range(count):
        site = sites[n % len(sites)]
        age = float(np.round(rng.uniform(20, 80), 1)) + (5 if site == sites[0] else 0)
        male, control = bool(rng.integers(2)), bool(rng.integers(2))
        icv = float(TYPICAL_ICV * (1 + 0.1 * male) * np.exp(rng.normal(0, 0.08)))
        growth = 1 + effects.per_year * (age - 50) + effects.male * male
        noise = effects.noise * effects.site_scale[site] * rng.normal(size=STRUCTURES)
        level = (icv / TYPICAL_ICV) ** effects.icv_power * growth
        volumes = np.maximum(TYPICAL * (level + noise + effects.site_shift[site]), 1.0)
        label = f"{n:05d}"
        people.append(Person(label, volumes, icv, days=age * 365.25))
        group = "control" if control else "patient"
        rows.append(f"sub-{label}|{age}|{'M' if male else 'F'}|{site}|{group}")
    return people, rows

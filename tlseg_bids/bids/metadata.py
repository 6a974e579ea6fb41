"""What the JSON files beside the derivatives of a scan say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from tlseg_bids import __version__
from tlseg_bids.bids.names import without_extension
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.spaces import Space

KEY = "ContentKey"
SCANNER = (
    "Manufacturer", "ManufacturersModelName", "MagneticFieldStrength", "InstitutionName",
    "StationName", "DeviceSerialNumber", "SoftwareVersions", "ReceiveCoilName",
)  # fmt: skip
"""What of a scan's own sidecar tells one scanner from another; kept for the group level."""
COLUMNS = {
    "index": ("Number of the label in the label image", None),
    "name": ("Name of the structure in the label protocol", None),
    "hard_mm3": ("Volume of the voxels that carry the label", "mm^3"),
    "soft_mm3": ("Sum of the label's probability over all voxels, times the voxel volume", "mm^3"),
    "soft_low_mm3": ("Lower end of the interval for the volume in a reference", "mm^3"),
    "soft_high_mm3": ("Upper end of the interval for the volume in a reference", "mm^3"),
    "voxels": ("Number of voxels that carry the label", None),
    "mean_confidence": (
        "Mean probability of the label over its own voxels, 0 to 1; n/a where it has none",
        None,
    ),
    "predicted_dice": ("Dice overlap to expect with a reference, 0 to 1", None),
    "volume_z": (
        "Share of the brain against persons of this age: distance from their mean over "
        "the spread of a further one",
        None,
    ),
    "side_z": ("The same of (right − left) ÷ mean of both, at the left structure", None),
    "cut_share": (
        "Share of the structure that is expected beyond the outer faces of the scan, 0 to 1, by "
        "the model's atlas",
        None,
    ),
}


class JobLike(Protocol):
    """What is needed of `tlseg_bids.flow.Job` (which this layer does not import)."""

    scan: Scan
    card: Any
    reason: str
    refused: tuple[Any, ...]
    warnings: tuple[str, ...]
    key: str
    device: str
    companions: tuple[Scan, ...]
    precomputed: bool
    spaces: tuple[Space, ...]


class SegmentationLike(Protocol):
    """What is needed of `tlseg_bids.flow.Segmentation`."""

    labels: Any
    brain_mask: np.ndarray
    volumes: pd.DataFrame
    qc: dict[str, float]
    flags: tuple[str, ...]
    unmeasured: dict[str, str]
    verdict: str
    reasons: tuple[str, ...]


def sidecar_of(path: Path) -> Path:
    """The JSON beside a NIfTI, TSV or text file."""
    name = without_extension(path.name).removesuffix(".tsv").removesuffix(".txt")
    return path.with_name(f"{name}.json")


def model_of(job: JobLike) -> dict[str, Any]:
    """Which model it was; of every derivative."""
    weights, finder = job.card.weights, job.card.placed_by
    placed = {"PlacedBy": finder} if finder else {}
    return {
        "Model": {
            "Name": job.card.name, "Version": job.card.version, "Status": job.card.status,
            "Sha256": weights.sha256, "Licence": weights.licence, **placed,
        }
    }  # fmt: skip


def provenance_of(
    job: JobLike, segmentation: SegmentationLike, provenance: Mapping[str, Any]
) -> dict:
    """Everything about how the label map came to be; the content key stands last."""
    age = job.scan.age
    return {
        "Description": f"Structures of the brain in the protocol '{job.card.protocol}'",
        "Manual": False,
        "ProgramVersion": __version__,
        **model_of(job),
        "ModelReason": job.reason,
        "ModelsRefused": [{"Model": no.model, "Reason": no.reason} for no in job.refused],
        "Age": {"Days": age.days, "PostMenstrualWeeks": age.pma_weeks, "Source": age.source},
        "ContrastAgent": job.scan.contrast_agent,
        "Scanner": {key: job.scan.sidecar[key] for key in SCANNER if key in job.scan.sidecar},
        "Warnings": list(job.warnings),
        "Verdict": {"Decision": segmentation.verdict, "Reasons": list(segmentation.reasons)},
        "Flags": list(segmentation.flags),
        "QualityControl": segmentation.qc,
        "Device": job.device,
        **{_camel(name): value for name, value in provenance.items()},
        KEY: job.key,
    }


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def column_texts(table: pd.DataFrame) -> dict[str, Any]:
    """What the columns of the volumes table mean, and their units."""
    texts = {}
    for name in table.columns:
        if name in COLUMNS:
            description, units = COLUMNS[name]
            texts[name] = {"Description": description, **({"Units": units} if units else {})}
    if "index" in texts:
        texts["index"]["Format"] = "integer"  # as the standard has it; else it counts as text
    return texts


def totals(segmentation: SegmentationLike) -> dict[str, Any]:
    """Brain volume, and the intracranial volume or why there is none."""
    voxel_mm3, qc = segmentation.labels.grid.voxel_mm3, segmentation.qc
    mask = float(np.count_nonzero(segmentation.brain_mask)) * voxel_mm3
    icv = {
        "Value": qc.get("icv_mm3"), "Units": "mm^3",
        "Description": "Volume inside the skull: brain, ventricles and the fluid around the brain",
    }  # fmt: skip
    if why := segmentation.unmeasured.get("icv_mm3"):
        icv["Reason"] = why
    return {
        "BrainVolume": {
            "Value": qc.get("brain_mm3", mask), "Units": "mm^3",
            "Description": "Volume of the brain mask without the fluid around the brain",
        },
        "IntracranialVolume": icv,
    }  # fmt: skip


def calibrated(job: JobLike) -> dict[str, Any]:
    """What predicted Dice and the intervals of volumes rest on."""
    given = getattr(job.card, "calibration", None)
    if not given:
        return {"Calibration": None}
    return {"Calibration": {"How": given.how, "IntervalLevel": given.level}}

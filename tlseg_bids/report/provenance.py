"""The sidecar of a dseg, laid out for people: model and refusals, provenance, quality scores."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tlseg_bids.errors import amount
from tlseg_bids.report.derivatives import LabelledScan, as_list

Identity = tuple[str, str, str]
QC_DIGITS = 3
WEIGHT_DIGITS = 8
NOT_RECORDED = "not recorded"
DAYS_PER_YEAR = 365.25
MODEL_FIELDS = ("Name", "Version", "Status", "Sha256", "Licence")
# What has its own place on the page; whatever else the sidecar holds is listed under its own name.
SHOWN = {
    "Age", "Command", "ContentKey", "ContrastAgent", "Description", "Device", "Flags", "Manual",
    "Model", "ModelReason", "ModelsRefused", "PeakMemoryGib", "ProgramVersion", "QualityControl",
    "ScanWarnings", "Seconds", "Sources", "SpatialReference", "Verdict",
}  # fmt: skip


def model_of(scan: LabelledScan) -> dict[str, Any]:
    """What is told of the model (empty where it is not), why it was chosen and who was refused."""
    model = scan.sidecar.get("Model")
    model = model if isinstance(model, dict) else {}
    refused = scan.sidecar.get("ModelsRefused")
    return {
        **{key.lower(): str(model.get(key) or "") for key in MODEL_FIELDS},
        "reason": str(scan.sidecar.get("ModelReason") or ""),
        "refused": [
            {"model": str(entry.get("Model", "")), "reason": str(entry.get("Reason", ""))}
            for entry in (refused if isinstance(refused, list) else ())
            if isinstance(entry, dict)
        ],
    }


def model_identity(scan: LabelledScan) -> Identity:
    """Name, version and checksum of the model: where one differs, volumes are not comparable."""
    model = model_of(scan)
    return model["name"], model["version"], model["sha256"]


def model_names(models: Iterable[Identity]) -> dict[Identity, str]:
    """Each model for people (``any 0.6.3``), with its weights where these alone differ; sorted."""
    every = sorted(set(models))
    short = {one: " ".join(filter(None, one[:2])) or f"a model {NOT_RECORDED}" for one in every}
    count = Counter(short.values())
    return {
        one: f"{name} (weights {one[2][:WEIGHT_DIGITS] or NOT_RECORDED})" if count[name] > 1
        else name
        for one, name in short.items()
    }  # fmt: skip


def facts_of(scan: LabelledScan) -> list[tuple[str, str]]:
    """Where the labels come from and what they cost: name and value, those that are known."""
    sidecar = scan.sidecar
    memory = sidecar.get("PeakMemoryGib")
    facts = [
        ("Scan", scan.source),
        ("Seen together with", ", ".join(map(str, as_list(sidecar.get("Sources"))[1:]))),
        ("Age", _age(sidecar.get("Age"))),
        ("Contrast agent", _text(sidecar.get("ContrastAgent"))),
        ("Label protocol", scan.protocol.name),
        ("Program", f"tlseg {version_of(scan)}"),
        ("Device", _text(sidecar.get("Device"))),
        ("Peak memory", f"{memory:.2f} GiB" if isinstance(memory, (int, float)) else ""),
        ("Time", _times(sidecar.get("Seconds"))),
        *((_spaced(key), _text(value)) for key, value in sidecar.items() if key not in SHOWN),
        ("Content key", _text(sidecar.get("ContentKey"))),
    ]
    return [(name, value) for name, value in facts if value]


def version_of(scan: LabelledScan) -> str:
    """Version of the program that labelled the scan."""
    return _text(scan.sidecar.get("ProgramVersion")) or f"(version {NOT_RECORDED})"


def command_of(scan: LabelledScan) -> str:
    """Command line of the run that labelled the scan."""
    return _text(scan.sidecar.get("Command")) or NOT_RECORDED


def calibration_of(scan: LabelledScan) -> str:
    """What predicted Dice and the intervals rest on; empty where the model was not calibrated."""
    told = scan.totals.get("Calibration")
    if not isinstance(told, dict):
        return ""
    level = told.get("IntervalLevel")
    share = f"{level:.0%} intervals; " if isinstance(level, (int, float)) else ""
    return f"{share}{_text(told.get('How'))}"


def qc_rows(scan: LabelledScan) -> list[tuple[str, str]]:
    """Quality scores by name."""
    scores = scan.sidecar.get("QualityControl")
    if not isinstance(scores, dict):
        return []
    return [
        (str(name).replace("_", " "), _score(value) if isinstance(value, float) else _text(value))
        for name, value in scores.items()
    ]


def warnings_of(scan: LabelledScan) -> list[str]:
    """What the run noted of the scan, whether it is a reason to look at it or not."""
    told = scan.sidecar.get("Warnings")
    return [str(one) for one in told] if isinstance(told, list) else []


def _score(value: float) -> str:
    """To `QC_DIGITS` digits; large ones as whole numbers, never as a power of ten."""
    if math.isfinite(value) and round(abs(value)) >= 10**QC_DIGITS:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.{QC_DIGITS}g}"


def _times(seconds: object) -> str:
    if isinstance(seconds, (int, float)):
        return f"{seconds:.1f} s"
    known = {
        str(step): float(value)
        for step, value in (seconds.items() if isinstance(seconds, dict) else ())
        if isinstance(value, (int, float))
    }
    if not known:
        return ""
    total = known.pop("total", None)
    steps = ", ".join(f"{step.replace('_', ' ')} {value:.1f}" for step, value in known.items())
    total = sum(known.values()) if total is None else total
    return f"{total:.1f} s" + (f" ({steps})" if steps else "")


def _age(age: object) -> str:
    if not isinstance(age, dict):
        return ""
    days, weeks = age.get("Days"), age.get("PostMenstrualWeeks")
    parts = []
    if isinstance(days, (int, float)):
        parts.append(
            amount(round(days), "day") if days < 730 else f"{days / DAYS_PER_YEAR:.1f} years"
        )
    if isinstance(weeks, (int, float)):
        parts.append(f"{weeks:.1f} post-menstrual weeks")
    source = _text(age.get("Source"))
    if not parts:
        return source or "not given"
    return ", ".join(parts) + (f" (from {source})" if source else "")


def _spaced(key: str) -> str:
    """``PeakMemoryGib`` → ``Peak memory gib``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key).lower()
    return words[:1].upper() + words[1:]


def _text(value: object) -> str:
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

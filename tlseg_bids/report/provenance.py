"""The sidecar of a dseg, laid out for people: model and refusals, provenance, quality scores."""

from __future__ import annotations

import json
from typing import Any

from tlseg_bids.report.derivatives import LabelledScan

QC_DIGITS = 3


def model_of(scan: LabelledScan) -> dict[str, Any]:
    """Name, version, sha256 and licence of the model, why it was chosen, and who was refused."""
    model = scan.sidecar.get("Model")
    model = model if isinstance(model, dict) else {"name": model or ""}
    refused = [
        {"model": str(entry.get("model", "")), "reason": str(entry.get("reason", ""))}
        for entry in scan.sidecar.get("Refused") or []
        if isinstance(entry, dict)
    ]
    return {
        **{key: str(model.get(key) or "") for key in ("name", "version", "sha256", "licence")},
        "reason": str(scan.sidecar.get("Reason") or ""),
        "refused": refused,
    }


def facts_of(scan: LabelledScan) -> list[tuple[str, str]]:
    """Where the labels come from and what they cost: name and value, those that are known."""
    sidecar = scan.sidecar
    seconds = sidecar.get("Seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    memory = sidecar.get("PeakMemoryGiB")
    facts = [
        ("Scan", scan.source),
        ("Spatial reference", _text(sidecar.get("SpatialReference"))),
        ("Label protocol", scan.protocol.name),
        ("Device", _text(sidecar.get("Device"))),
        ("Peak memory", f"{memory:.2f} GiB" if isinstance(memory, (int, float)) else ""),
        ("Time", _times(seconds)),
        ("Content key", _text(sidecar.get("ContentKey"))),
        ("Labels", str(scan.dseg.name)),
    ]
    return [(name, value) for name, value in facts if value]


def qc_rows(scan: LabelledScan) -> list[tuple[str, str]]:
    """Quality scores by name."""
    scores = scan.sidecar.get("QC")
    if not isinstance(scores, dict):
        return []
    return [
        (
            str(name).replace("_", " "),
            f"{value:.{QC_DIGITS}g}" if isinstance(value, float) else _text(value),
        )
        for name, value in scores.items()
    ]


def _times(seconds: dict[str, Any]) -> str:
    known = {k: float(v) for k, v in seconds.items() if isinstance(v, (int, float))}
    if not known:
        return ""
    total = known.pop("total", None)
    steps = ", ".join(f"{step.replace('_', ' ')} {value:.1f}" for step, value in known.items())
    total = sum(known.values()) if total is None else total
    return f"{total:.1f} s" + (f" ({steps})" if steps else "")


def _text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Read the derivatives, one participant after another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tlseg_bids.config import Config
from tlseg_bids.errors import NoInputError, NothingSelectedError, listed
from tlseg_bids.group.covariates import Covariates
from tlseg_bids.group.study import MEASURES, Key, Row, Study, number, snake
from tlseg_bids.report.derivatives import FailedScan, LabelledScan, labelled_scans
from tlseg_bids.report.provenance import model_identity
from tlseg_bids.report.verdict import verdict, volume_rows

LONG = {
    "acq": "acquisition", "ce": "contrast_agent", "rec": "reconstruction", "run": "run",
    "echo": "echo", "part": "part", "chunk": "chunk",
}  # fmt: skip
YEAR_DIGITS = 6  # half a minute
SESSION = re.compile(r"_ses-(?P<label>[^_]+)_")
AGAIN = "label the scan again (level participant)"


def collect(config: Config) -> Study:
    """Every labelled scan of the selected participants and sessions.

    Returns
    -------
    Study
        Label maps of these without a usable volumes table are in `failures`.

    Raises
    ------
    NoInputError
        If there are no derivatives.
    NothingSelectedError
        If the filters match none of them.
    """
    study, covariates = Study(), Covariates(config.bids_dir)
    subjects = _selected(config)
    for subject in subjects:
        scans, failed = labelled_scans(config.out_dir, subject)
        study.failures += [one for one in failed if _wanted(config, _session(one.name))]
        for scan in scans:
            if not _wanted(config, scan.entities.get("ses")):
                continue
            row = _row(scan, covariates)
            if isinstance(row, FailedScan):
                study.failures.append(row)
            else:
                study.rows.append(row)
                study.protocols.setdefault(row.protocol, scan.protocol)
    if not study.rows:
        raise _nothing(config, study)
    study.rows.sort(key=lambda row: (row.participant, row.session, row.stem))
    study.notes += covariates.notes()
    study.descriptions = covariates.descriptions
    if len(study.protocols) > 1:
        study.notes.append(
            f"the scans were labelled in {len(study.protocols)} protocols "
            f"({listed(study.protocols)}); a structure of one is not that of another, so analyse "
            "the rows of one value of the column 'protocol' at a time"
        )
    return study


def subjects_in(out_dir: Path) -> Iterator[str]:
    """Participant labels that have a folder in the derivatives, unsorted."""
    with os.scandir(out_dir) as entries:
        for entry in entries:
            if entry.name.startswith("sub-") and entry.is_dir():
                yield entry.name.removeprefix("sub-")


def _selected(config: Config) -> list[str]:
    where = config.out_dir
    hint = "run the level participant first, or correct the path"
    if not where.is_dir():
        raise NoInputError("there is no folder of derivatives", where, hint)
    there = sorted(subjects_in(where))
    if not there:
        raise NoInputError("the folder holds no labelled participant (sub-…)", where, hint)
    missing = sorted(set(config.participants) - set(there))
    if missing:
        raise NothingSelectedError(
            f"there is no labelled participant {listed(missing)}", where,
            f"check --participant-label; there are {listed(there)}",
        )  # fmt: skip
    return [
        subject for subject in there if not config.participants or subject in config.participants
    ]


def _wanted(config: Config, session: str | None) -> bool:
    return not config.sessions or session in config.sessions


def _session(name: str) -> str | None:
    """Session that a file name tells."""
    match = SESSION.search(name)
    return match["label"] if match else None


def _nothing(config: Config, study: Study) -> NoInputError | NothingSelectedError:
    if config.sessions and not study.failures:
        return NothingSelectedError(
            f"there is no labelled scan of session {listed(config.sessions)}", config.out_dir,
            "check --session-label",
        )  # fmt: skip
    first = "".join(f" (the first: {one.name}: {one.error})" for one in study.failures[:1])
    return NoInputError(
        f"there is no readable label map with its volumes table{first}", config.out_dir,
        "run the level participant first",
    )  # fmt: skip


def _row(scan: LabelledScan, covariates: Covariates) -> Row | FailedScan:
    """The scan as a row, or why it cannot be one."""
    if scan.volumes is None:
        return FailedScan(scan.dseg.name, "it has no volumes table beside it", AGAIN)
    measures = _measures(scan)
    if isinstance(measures, str):
        return FailedScan(scan.dseg.name, measures, AGAIN)
    facts, age, date, visit = covariates.of(scan)
    judgement = verdict(scan, volume_rows(scan))
    years, weeks = round(_known(age.years), YEAR_DIGITS), _known(age.pma_weeks)
    totals = [_total(scan, name) for name in ("BrainVolume", "IntracranialVolume")]
    own = {
        **_identity(scan),
        "age_years": cell(years), "postmenstrual_weeks": cell(weeks), "age_source": age.source,
        **_model(scan), "verdict": judgement.level, "reasons": "; ".join(judgement.reasons),
    }  # fmt: skip
    every: dict[Key, str] = {("", name): value for name, value in own.items()}
    warned = scan.sidecar.get("Warnings")
    chosen_by = set(map(str, warned if isinstance(warned, list) else ()))  # no fault of the scan
    findings = tuple(reason for reason in judgement.reasons if reason not in chosen_by)
    return Row(
        scan.entities["sub"], scan.entities.get("ses", ""), scan.entities, scan.suffix,
        scan.protocol.name, scan.stem, {**every, **facts, **_quality(scan)}, years, weeks, date,
        _known(visit.days), measures, np.array(totals), findings, _known(visit.pma_weeks),
        model_identity(scan),
    )  # fmt: skip


def _known(value: float | None) -> float:
    return np.nan if value is None else value


def cell(value: float) -> str:
    """A number as text that reads back as the same number; ``n/a`` for NaN."""
    return "n/a" if not np.isfinite(value) else repr(float(value))


def _measures(scan: LabelledScan) -> np.ndarray | str:
    """`MEASURES` of every label, shape (6, labels), or what is wrong with the table."""
    by_index: dict[int, dict[str, str]] = {}
    for row in scan.volumes or ():
        index = number(row.get("index"))
        if not index.is_integer():
            return f"its volumes table has the index '{row.get('index')}'"
        if int(index) in by_index:
            return f"its volumes table has the index {int(index)} twice"
        by_index[int(index)] = row
    wanted = [int(index) for index in scan.protocol.indices[1:]]
    missing = [str(index) for index in wanted if index not in by_index]
    if missing:
        return f"its volumes table lacks the labels {listed(missing)} of '{scan.protocol.name}'"
    table = np.array([[number(by_index[index].get(name)) for index in wanted] for name in MEASURES])
    volumes = table[: MEASURES.index("voxels")]
    if np.isnan(volumes).any() or (volumes < 0).any():
        bad = wanted[int(np.argmax((np.isnan(volumes) | (volumes < 0)).any(axis=0)))]
        return f"its volumes table has no volume for the label {bad}"
    return table


def _total(scan: LabelledScan, name: str) -> float:
    entry = scan.totals.get(name)
    value = number(entry.get("Value")) if isinstance(entry, dict) else np.nan
    return value if value > 0 else np.nan


def _identity(scan: LabelledScan) -> dict[str, str]:
    session = scan.entities.get("ses")
    named = {LONG[key]: scan.entities[key] for key in LONG if key in scan.entities}
    return {
        "participant_id": f"sub-{scan.entities['sub']}",
        "session_id": f"ses-{session}" if session else "n/a",
        "scan": scan.stem, "protocol": scan.protocol.name, "suffix": scan.suffix, **named,
    }  # fmt: skip


def _model(scan: LabelledScan) -> dict[str, str]:
    name, version, _ = model_identity(scan)
    return {
        "model": name or "n/a", "model_version": version or "n/a",
        "content_key": str(scan.sidecar.get("ContentKey") or "n/a"),
    }  # fmt: skip


def _quality(scan: LabelledScan) -> dict[Key, str]:
    """Quality scores that are numbers, from the sidecar."""
    scores = scan.sidecar.get("QualityControl")
    scores = scores if isinstance(scores, dict) else {}
    numbers = {key: number(value) for key, value in scores.items()}
    return {("qc", f"qc_{snake(str(key))}"): cell(value) for key, value in numbers.items()}

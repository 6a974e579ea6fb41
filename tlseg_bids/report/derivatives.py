"""What a finished run left on disk for one subject: the only source a report is made from.

Nothing is passed along in memory from the run, so `--reports-only` makes the same page again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tlseg_bids.bids.names import in_standard_space
from tlseg_bids.bids.source import dataset_links, is_gone, place_of, source_dataset
from tlseg_bids.bids.tables import read_json, read_table
from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol

DSEG_NAME = re.compile(r"^(?P<stem>sub-.+)_seg-(?P<protocol>[^_]+)_dseg\.nii\.gz$")
INDEX = re.compile(r"[0-9]{1,9}")
MOST_INDEX = 32767
FINISH = "label the scan again (level participant)"
AGAIN = "delete it and label the scan again"
SAME = ("acq", "ce", "rec", "echo", "part", "chunk")
"""Scans that differ in one of these entities are neither repeated scans nor visits to compare."""
ENTITY_WORDS = {"ses": "session", "acq": "acquisition", "ce": "contrast agent", "run": "run"}


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """One dseg file with all that lies beside it.

    Parameters
    ----------
    dseg : Path
        The label image.
    protocol : LabelProtocol
        What its integers mean.
    entities : dict
        BIDS entities of its name in file order, without `seg`.
    suffix : str
        Suffix of the scan it labels (``T1w``, ``T2w``).
    sidecar : dict
        Its JSON, which is written last.
    volumes : tuple of dict or None
        Rows of the volumes table, cells as text; None if there is no table.
    totals : dict
        Its JSON, which holds brain and intracranial volume.
    image : Path or None
        The scan itself; None if it is not where the sidecar says.
    source : str
        BIDS URI or path of the scan as the sidecar gives it.
    """

    dseg: Path
    protocol: LabelProtocol
    entities: dict[str, str]
    suffix: str
    sidecar: dict[str, Any] = field(default_factory=dict)
    volumes: tuple[dict[str, str], ...] | None = None
    totals: dict[str, Any] = field(default_factory=dict)
    image: Path | None = None
    source: str = ""

    @property
    def stem(self) -> str:
        """File name without ``_dseg.nii.gz``: the key of figures and of ratings."""
        return self.dseg.name.removesuffix("_dseg.nii.gz")

    @property
    def title(self) -> str:
        """For people: ``session 1, run 2, T1w``."""
        words = [
            f"{ENTITY_WORDS.get(key, key)} {value}"
            for key, value in self.entities.items()
            if key not in ("sub", "space")
        ]
        return ", ".join([*words, self.suffix])


@dataclass(frozen=True)
class FailedScan:
    """A scan without a usable result: its name, what went wrong and what to do about it."""

    name: str
    error: str
    hint: str = ""


def labelled_scans(out_dir: Path, subject: str) -> tuple[list[LabelledScan], list[FailedScan]]:
    """Every dseg of `subject` under `out_dir`, sorted by name.

    Parameters
    ----------
    out_dir : Path
        Root of the derivative dataset.
    subject : str
        Participant label without ``sub-``.

    Returns
    -------
    scans : list of LabelledScan
        The readable ones.
    failed : list of FailedScan
        Those whose sidecar, volumes table or label protocol is damaged or missing; without a
        sidecar, the scan is not finished.
    """
    links = dataset_links(out_dir)
    scans, failed = [], []
    for path in sorted((out_dir / f"sub-{subject}").rglob("*_dseg.nii.gz")):
        match = DSEG_NAME.match(path.name)
        if match is None or "_desc-" in path.name or in_standard_space(path):
            continue
        try:
            scans.append(_labelled_scan(path, match, out_dir, links))
        except DataError as error:
            failed.append(FailedScan(path.name, f"{error.what} ({error.where})", error.hint))
    return scans, failed


def resolve(uri: str, out_dir: Path, links: dict[str, Path]) -> Path | None:
    """The file that a BIDS URI or a relative path means; None if it is not there.

    `bids::…` is this derivative dataset, `bids:NAME:…` the dataset `NAME` of `DatasetLinks`.
    """
    if uri.startswith("bids:"):
        _, name, relative = (*uri.split(":", 2), "", "")[:3]
        root = out_dir if not name else links.get(name)
        path = None if root is None else root / relative
    else:
        path = place_of(uri, out_dir)
    try:
        return path if path is not None and path.is_file() else None
    except (OSError, ValueError):  # a name that no file system accepts
        return None


def _labelled_scan(
    path: Path, match: re.Match[str], out_dir: Path, links: dict[str, Path]
) -> LabelledScan:
    entities = dict(part.split("-", 1) for part in match["stem"].split("_") if "-" in part)
    base = path.name.removesuffix("_dseg.nii.gz")
    protocol = protocol_of(match["protocol"], out_dir)
    file = path.with_name(f"{base}_dseg.json")
    if not file.is_file():
        raise DataError(f"it is not finished: there is no {file.name}", file.parent, FINISH)
    sidecar = _object(file)
    source = str(next(iter(as_list(sidecar.get("Sources"))), ""))
    table_file = path.with_name(f"{base}_desc-volumes_dseg.tsv")
    return LabelledScan(
        dseg=path,
        protocol=protocol,
        entities=entities,
        suffix=entities.get("space", "scan"),
        sidecar=sidecar,
        volumes=_rows(table_file) if table_file.is_file() else None,
        totals=_object(table_file.with_suffix(".json")),
        image=resolve(source, out_dir, links) if source else None,
        source=source,
    )


def protocol_of(name: str, out_dir: Path) -> LabelProtocol:
    """The protocol shipped with the program, or else the one that the dataset's table describes.

    Raises
    ------
    DataError
        If neither exists.
    """
    try:
        return load_protocol(name)
    except DataError:
        table_file = out_dir / f"seg-{name}_dseg.tsv"
        if not table_file.is_file():
            raise
    table = pd.DataFrame(_rows(table_file))
    if "index" not in table or "name" not in table:
        raise DataError("columns 'index' and 'name' are missing", table_file, "write it again")
    odd = [text for text in table["index"] if not INDEX.fullmatch(text) or int(text) > MOST_INDEX]
    if odd:
        raise DataError(
            f"the index '{odd[0][:40]}' is not a whole number from 0 to {MOST_INDEX}", table_file,
            "correct the table",
        )  # fmt: skip
    table["index"] = table["index"].astype(int)
    for column, default in (("abbreviation", table["name"]), ("color", "#ffffff")):
        if column not in table:
            table[column] = default
    return LabelProtocol(
        name,
        table.assign(hemisphere="none", mirror=table["index"], group="", subcortical14=0),
    )


def recorded_failures(
    out_dir: Path, subject: str, known: dict[str, FailedScan] | None = None
) -> list[FailedScan]:
    """Scans of `subject` whose latest record in ``logs/`` is a failure or a skip.

    `known` is what `all_failures` gave, where many subjects are asked for.
    """
    failures = all_failures(out_dir) if known is None else known
    return [failures[scan] for scan in failures if f"{scan}/".startswith(f"sub-{subject}/")]


def all_failures(out_dir: Path) -> dict[str, FailedScan]:
    """Every scan whose latest record in ``logs/`` is a failure or a skip, by its path, sorted.

    Those that are no longer in the dataset are left out, where the dataset is found.
    """
    return failures_and_gone(out_dir)[0]


def failures_and_gone(out_dir: Path) -> tuple[dict[str, FailedScan], dict[str, FailedScan]]:
    """`all_failures`, and those that it leaves out."""
    failures, dataset = _latest_failures(out_dir), source_dataset(out_dir)
    there, gone = {}, {}
    for scan, failure in failures.items():
        over = dataset is not None and is_gone(dataset, scan)
        (gone if over else there)[scan] = failure
    return there, gone


def _latest_failures(out_dir: Path) -> dict[str, FailedScan]:
    """Of all scans of which ``logs/`` tell, whether they are in the dataset or not.

    Status tables and plans of all runs are read, so that a later run of other sessions does not
    hide what is still to be mended. Runs come in the order of their ids, which no clock that was
    set back can change.
    """
    records: list[tuple[str, int, str, FailedScan | None]] = []
    for file in (out_dir / "logs").glob("status_*.tsv"):
        run = file.stem.removeprefix("status_")
        for number, row in enumerate(read_table(file).rows):
            failure = FailedScan(_name(row), _said(row, "error"), _said(row, "hint"))
            failed = row.get("status") == "failed"
            records.append((run, number, row.get("scan", ""), failure if failed else None))
    for file in (out_dir / "logs").glob("plan_*.json"):
        skipped = as_list(read_json(file)[0].get("Skipped"))
        for entry in (one for one in skipped if isinstance(one, dict)):
            row = {str(key).lower(): str(value) for key, value in entry.items()}
            failure = FailedScan(_name(row), _said(row, "reason"), _said(row, "hint"))
            records.append((file.stem.removeprefix("plan_"), -1, row.get("scan", ""), failure))
    records.sort(key=lambda record: record[:3])
    latest = {scan: failure for _, _, scan, failure in records}
    return {scan: failure for scan, failure in sorted(latest.items()) if failure is not None}


def _name(row: dict[str, str]) -> str:
    return row.get("scan", "").rpartition("/")[2]


def _said(row: dict[str, str], column: str) -> str:
    value = row.get(column, "")
    return "" if value == "n/a" else value


def as_list(value: object) -> list[Any]:
    """A value of a JSON file that may be a list, one thing alone, or nothing."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _object(path: Path) -> dict[str, Any]:
    """The JSON at `path`; empty if there is no file."""
    if not path.is_file():
        return {}
    content, problem = read_json(path)
    if problem:
        raise DataError(f"{path.name} {problem}", path.parent, AGAIN)
    return content


def _rows(path: Path) -> tuple[dict[str, str], ...]:
    table = read_table(path)
    if table.problem:
        raise DataError(f"{path.name} {table.problem}", path.parent, AGAIN)
    return table.rows

"""What a finished run left on disk for one subject: the only source a report is made from.

Nothing is passed along in memory from the run, so `--reports-only` makes the same page again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import pandas as pd

from tlseg_bids.errors import DataError
from tlseg_bids.labels.protocol import LabelProtocol, load_protocol

DSEG_NAME = re.compile(r"^(?P<stem>sub-.+)_seg-(?P<protocol>[^_]+)_dseg\.nii\.gz$")
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
        Its JSON; empty if there is none.
    volumes : DataFrame or None
        The volumes table; None if there is none.
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
    volumes: pd.DataFrame | None = None
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
        Those whose sidecar, volumes table or label protocol is damaged or missing.
    """
    links = dataset_links(out_dir)
    scans, failed = [], []
    for path in sorted((out_dir / f"sub-{subject}").rglob("*_dseg.nii.gz")):
        match = DSEG_NAME.match(path.name)
        if match is None or "_desc-" in path.name:
            continue
        try:
            scans.append(_labelled_scan(path, match, out_dir, links))
        except DataError as error:
            failed.append(FailedScan(path.name, f"{error.what} ({error.where})", error.hint))
    return scans, failed


def dataset_links(out_dir: Path) -> dict[str, Path]:
    """Name of each linked dataset → its folder, from `DatasetLinks` of the derivatives."""
    description = out_dir / "dataset_description.json"
    links = _read_json(description).get("DatasetLinks", {}) if description.is_file() else {}
    return {name: _folder(str(uri), out_dir) for name, uri in links.items()}


def resolve(uri: str, out_dir: Path, links: dict[str, Path]) -> Path | None:
    """The file that a BIDS URI or a relative path means; None if it is not there.

    `bids::…` is this derivative dataset, `bids:NAME:…` the dataset `NAME` of `DatasetLinks`.
    """
    if uri.startswith("bids:"):
        _, name, relative = (*uri.split(":", 2), "")[:3]
        root = out_dir if not name else links.get(name)
        path = None if root is None else root / relative
    else:
        path = _folder(uri, out_dir)
    return path if path is not None and path.is_file() else None


def _folder(uri: str, base: Path) -> Path:
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return (base / uri).resolve()


def _labelled_scan(
    path: Path, match: re.Match[str], out_dir: Path, links: dict[str, Path]
) -> LabelledScan:
    entities = dict(part.split("-", 1) for part in match["stem"].split("_") if "-" in part)
    base = path.name.removesuffix("_dseg.nii.gz")
    sidecar_file = path.with_name(f"{base}_dseg.json")
    table_file = path.with_name(f"{base}_desc-volumes_dseg.tsv")
    sidecar = _read_json(sidecar_file) if sidecar_file.is_file() else {}
    source = next(iter(_as_list(sidecar.get("Sources"))), "")
    return LabelledScan(
        dseg=path,
        protocol=protocol_of(match["protocol"], out_dir),
        entities=entities,
        suffix=entities.get("space", "scan"),
        sidecar=sidecar,
        volumes=_read_table(table_file) if table_file.is_file() else None,
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
    table = _read_table(table_file)
    for column, default in (("abbreviation", table["name"]), ("color", "#ffffff")):
        if column not in table:
            table[column] = default
    return LabelProtocol(
        name,
        table.assign(hemisphere="none", mirror=table["index"], group="", subcortical14=0),
    )


def _as_list(value: object) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"not readable as JSON: {error}", path, "run the scan again") from error
    if not isinstance(content, dict):
        raise DataError(
            f"holds a {type(content).__name__}, not an object", path, "run the scan again"
        )
    return content


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep="\t", na_values=["n/a"], keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"not readable as a table: {error}", path, "run the scan again") from error

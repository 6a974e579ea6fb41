"""The dataset that the labels of an output folder were made of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tlseg_bids.bids.atomic import clean_cell
from tlseg_bids.bids.files import is_closed, not_installed
from tlseg_bids.bids.names import EXTENSIONS, in_standard_space
from tlseg_bids.bids.tables import read_json
from tlseg_bids.errors import TlsegError
from tlseg_bids.grid import difference
from tlseg_bids.volume import load_grid

DESCRIPTION = "dataset_description.json"
MOST_LOOKED_AT = 20
TITLE = "Structures of the brain in '{}'"
TITLED = re.compile(re.escape(TITLE).replace(r"\{\}", "(?P<name>.*)"), re.DOTALL)
AROUND_DOI = re.compile(r"^(https?://(dx\.)?doi\.org/|doi:)|\.v\d+(\.\d+)*$", re.IGNORECASE)
"""What is no part of the identity: the resolver, and the version as OpenNeuro writes it."""


@dataclass(frozen=True)
class Identity:
    """Which dataset it is; empty where nothing is said."""

    name: str
    doi: str

    def may_be(self, other: Identity) -> bool:
        """Whether both may be the same dataset: by the DOI if both have one, else by the name."""
        if self.doi and other.doi:
            return self.doi == other.doi
        return not (self.name and other.name) or self.name == other.name


def identity_of(dataset: Path) -> Identity:
    """Which dataset lies in a folder, as its dataset_description.json says."""
    content, _ = read_json(dataset / DESCRIPTION)
    return _identity(content.get("Name"), content.get("DatasetDOI"))


def source_dataset(out_dir: Path) -> Path | None:
    """The dataset that `DatasetLinks` of the derivatives leads to; None if it is not there.

    Another dataset in its place, such as at a path that holds in a container alone, is not it.
    """
    dataset = dataset_links(out_dir).get("raw")
    if dataset is None or read_json(dataset / DESCRIPTION)[1]:
        return None
    return dataset if recorded_identity(out_dir).may_be(identity_of(dataset)) else None


def recorded_identity(out_dir: Path) -> Identity:
    """Which dataset the labels were made of, as dataset_description.json of the output says."""
    told, _ = read_json(out_dir / DESCRIPTION)
    title = TITLED.fullmatch(str(told.get("Name", "")))
    sources = told.get("SourceDatasets")
    first = sources[0] if isinstance(sources, list) and sources else None
    doi = first.get("DOI") if isinstance(first, dict) else None
    return _identity(title["name"] if title else None, doi)


def holds_none_of(dataset: Path, out_dir: Path) -> bool:
    """Whether none of the labelled scans that are looked at is the one of its name in a dataset.

    Labels lie on the grid of their scan, so that headers tell; a scan that is not there is another,
    one whose header cannot be read, such as a link without content, says nothing. A label image of
    each of the first `MOST_LOOKED_AT` participants is looked at. False where nothing is said.
    """
    folders = sorted(out_dir.glob("sub-*/"))[:MOST_LOOKED_AT]
    said = [_is_its_scan(next(_own_labels(folder), None), dataset) for folder in folders]
    return False in said and True not in said


def _own_labels(folder: Path) -> Iterator[Path]:
    """Sidecars of the label images of a participant on the scans' own grids."""
    for sidecar in folder.rglob("*_dseg.json"):
        if "_desc-" not in sidecar.name and not in_standard_space(sidecar):
            yield sidecar


def _is_its_scan(sidecar: Path | None, dataset: Path) -> bool | None:
    """Whether a scan of a dataset has the grid of the labels; None if that cannot be told."""
    sources = None if sidecar is None else read_json(sidecar)[0].get("Sources")
    if not isinstance(sources, list) or not str(sources[:1]).startswith("['bids:raw:"):
        return None
    scan = dataset / unquote(sources[0].removeprefix("bids:raw:"))
    if not scan.is_file():
        return None if scan.is_symlink() else False
    try:
        labels = sidecar.with_name(f"{sidecar.name.removesuffix('.json')}.nii.gz")
        return difference(load_grid(labels)[0], load_grid(scan)[0]) is None
    except (TlsegError, OSError):
        return None


def is_gone(dataset: Path, scan: str) -> bool:
    """Whether a failure that the logs tell of is over because its scan was renamed or removed.

    A link without content, as in a DataLad dataset, is there; so is what cannot be reached. The
    record of a folder that could not be looked into is over once it can.

    Parameters
    ----------
    dataset : Path
        What `source_dataset` gave.
    scan : str
        Path below it, as the logs have it.
    """
    places = [dataset]
    for part in scan.split("/"):
        places = [found for place in places for found in _named(place, part)]
    if scan.lower().endswith(EXTENSIONS):
        return not places
    absent = not_installed(dataset)
    return not any(is_closed(place) or place in absent for place in places)


def _named(folder: Path, name: str) -> list[Path]:
    """What has this name in a folder; the logs hold " " or "?" for what they cannot."""
    exact = folder / name
    try:
        exact.lstat()
        return [exact]
    except FileNotFoundError:
        if not set(" ?") & set(name):
            return []
    except NotADirectoryError:
        return []
    except (OSError, ValueError):
        return [exact]
    try:
        return [entry for entry in folder.iterdir() if _logged(entry.name) == _logged(name)]
    except OSError:
        return [exact]


def _logged(name: str) -> str:
    return clean_cell(name.replace("?", " "))


def dataset_links(out_dir: Path) -> dict[str, Path]:
    """Name of each linked dataset → its folder, from `DatasetLinks` of the derivatives."""
    links = read_json(out_dir / DESCRIPTION)[0].get("DatasetLinks")
    if not isinstance(links, dict):
        return {}
    return {str(name): place_of(str(uri), out_dir) for name, uri in links.items()}


def place_of(uri: str, base: Path) -> Path:
    """The path that a ``file://`` URI, or a relative reference with %-escapes, stands for."""
    try:
        parsed = urlparse(uri)
    except ValueError:  # brackets that hold no address
        return base / uri
    return Path(unquote(parsed.path)) if parsed.scheme == "file" else base / unquote(uri)


def _identity(name: Any, doi: Any) -> Identity:
    name, doi = (text.strip() if isinstance(text, str) else "" for text in (name, doi))
    return Identity(name, AROUND_DOI.sub("", doi).lower())

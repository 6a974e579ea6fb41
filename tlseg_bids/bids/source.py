"""The dataset that the labels of an output folder were made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tlseg_bids.bids.atomic import clean_cell
from tlseg_bids.bids.files import is_closed
from tlseg_bids.bids.names import EXTENSIONS
from tlseg_bids.bids.tables import read_json

DESCRIPTION = "dataset_description.json"
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
    told, _ = read_json(out_dir / DESCRIPTION)
    dataset = dataset_links(out_dir).get("raw")
    if dataset is None or read_json(dataset / DESCRIPTION)[1]:
        return None
    title = TITLED.fullmatch(str(told.get("Name", "")))
    sources = told.get("SourceDatasets")
    first = sources[0] if isinstance(sources, list) and sources else None
    doi = first.get("DOI") if isinstance(first, dict) else None
    recorded = _identity(title["name"] if title else None, doi)
    return dataset if recorded.may_be(identity_of(dataset)) else None


def is_gone(dataset: Path, scan: str) -> bool:
    """Whether a failure that the logs tell of is over because its scan was renamed or removed.

    A link without content, as in a DataLad dataset, is there; so is what cannot be reached. The
    record of a folder that there was no permission to read is over once it can be read.

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
    return not any(is_closed(place) for place in places)


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

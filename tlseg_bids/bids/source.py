"""The dataset that the labels of an output folder were made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

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

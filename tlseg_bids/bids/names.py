"""File names of BIDS: which entities there are, in which order, with which characters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

LABEL = re.compile(r"[0-9a-zA-Z+]+")
INDEX = re.compile(r"[0-9]+")
RAW_ENTITIES = ("sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "chunk")
INDEX_ENTITIES = ("run", "echo", "chunk")
DERIVATIVE_ENTITIES = ("space", "seg", "res", "label", "desc")
# The order of the specification (https://bids-specification.readthedocs.io, "Entity table").
ORDER = (
    "sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "space", "from", "to",
    "mode", "chunk", "seg",
    "res", "label", "desc",
)  # fmt: skip
EXTENSIONS = (".nii.gz", ".nii")
SUFFIX_SPACE = re.compile(r"\w+w|FLAIR")
"""Values of ``space`` that are the suffix of the scan on whose grid a derivative lies."""
NATIVE_SPACES = ("scan", "orig", "individual")


class BrokenName(ValueError):
    """A file name that is not one of BIDS; the message says why."""


def parse_name(name: str) -> tuple[dict[str, str], str]:
    """Entities, in the order of the file name, and suffix of a NIfTI file's name.

    Raises
    ------
    BrokenName
        If an entity is unknown, doubled or belongs to derivatives, or a label has characters
        other than letters, digits and ``+``.
    """
    stem = without_extension(name)
    *pairs, suffix = stem.split("_")
    entities: dict[str, str] = {}
    for pair in pairs:
        key, dash, label = pair.partition("-")
        if not dash:
            raise BrokenName(f"the part '{pair}' of its name is no key-label pair")
        if key in DERIVATIVE_ENTITIES:
            raise BrokenName(f"'{key}-' in its name belongs to derivatives, not to raw scans")
        if key not in RAW_ENTITIES:
            raise BrokenName(f"'{key}-' in its name is no entity of a T1w or T2w scan")
        if key in entities:
            raise BrokenName(f"'{key}-' occurs twice in its name")
        if not LABEL.fullmatch(label):
            raise BrokenName(
                f"the label {label!r} of '{key}-' has characters other than letters and digits"
            )
        if key in INDEX_ENTITIES and not INDEX.fullmatch(label):
            raise BrokenName(f"the label '{label}' of '{key}-' is not a number")
        entities[key] = label
    if not entities or next(iter(entities)) != "sub":
        raise BrokenName("its name does not begin with 'sub-'")
    return entities, suffix


def build_name(entities: Mapping[str, str], suffix: str, extension: str) -> str:
    """A file name with the entities in the order of the specification.

    Raises
    ------
    BrokenName
        If a label could leave the folder or is not one of BIDS.
    """
    for key, label in entities.items():
        if key not in ORDER or not LABEL.fullmatch(label):
            raise BrokenName(f"'{key}-{label}' cannot stand in a file name")
    pairs = [f"{key}-{entities[key]}" for key in ORDER if key in entities]
    return "_".join([*pairs, suffix]) + extension


def without_extension(name: str) -> str:
    """The name without ``.nii.gz`` or ``.nii``."""
    for extension in EXTENSIONS:
        if name.endswith(extension):
            return name.removesuffix(extension)
    return name


def entities_of(file: Path) -> dict[str, str]:
    """Entities in a file's name, derivative ones included; parts without a dash are dropped."""
    parts = without_extension(file.name).split("_")[:-1]
    return dict(part.split("-", 1) for part in parts if "-" in part)


def in_standard_space(path: Path) -> bool:
    """Whether a derivative lies in a template's space; that of a scan is named by its suffix."""
    space = re.search(r"_space-([0-9a-zA-Z+]+)_", path.name)
    if space is None or space[1] in NATIVE_SPACES:
        return False
    return SUFFIX_SPACE.fullmatch(space[1]) is None

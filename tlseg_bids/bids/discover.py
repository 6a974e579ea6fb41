"""Finds the T1w and T2w scans of a BIDS dataset and what the dataset says about each.

The index is pybids', the filter grammar niworkflows'. Participants are listed from the folder
names and not by `niworkflows.utils.bids.collect_participants`, because that needs the index of the
whole dataset first: with 1,000 participants it took 17 s where one named participant takes 0.1 s.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlseg_bids.bids.age import AgeReader
from tlseg_bids.bids.files import (
    closed_folders,
    is_hidden,
    leads_nowhere,
    why_closed,
    why_unreadable,
)
from tlseg_bids.bids.layout import query
from tlseg_bids.bids.names import EXTENSIONS, LABEL, BrokenName, parse_name, without_extension
from tlseg_bids.bids.scan import Scan, Unusable
from tlseg_bids.bids.sidecar import SidecarReader, contrast_agent, skull_stripped
from tlseg_bids.bids.tables import read_json
from tlseg_bids.config import Config
from tlseg_bids.errors import NoInputError, NotBidsError, NothingSelectedError, UsageError, listed

SUFFIXES = ("T1w", "T2w")
LOOKS_STRUCTURAL = re.compile(r".*[_-](t[12]w?)(\.nii)?(\.gz)?\.nii(\.gz)?", re.IGNORECASE | re.S)
RENAME = "give it a BIDS name, such as sub-01_T1w.nii.gz, or move it away"

Found = tuple[tuple[Scan, ...], tuple[Unusable, ...]]


def discover(config: Config) -> Found:
    """The scans that a run selects, and those that were found but cannot be used.

    Parameters
    ----------
    config : Config
        `participants`, `sessions`, `filters`, `shard`, `database_dir` and `age` select and
        describe. A shard holds every N-th participant, so that all scans of one are in one shard.

    Returns
    -------
    scans, unusable : tuple of Scan, tuple of Unusable
        By participant, session and file name. Both are empty only if this shard has nothing while
        another one has.

    Raises
    ------
    NoInputError
        If the folder does not exist.
    NotBidsError
        If it is not a BIDS dataset.
    NothingSelectedError
        If a named participant is not there, or the filters match no scan.
    UsageError
        If a filter, the age, the shard or the database makes no sense.
    """
    check_dataset(config.bids_dir)
    if not 1 <= config.shard[0] <= config.shard[1]:
        raise UsageError(
            f"the shard {config.shard[0]}/{config.shard[1]} does not exist", "--shard",
            "write I/N with I from 1 to N",
        )  # fmt: skip
    labels, folders = _select(config)
    part, parts = config.shard
    found = _collect(config, labels[part - 1 :: parts], folders if part == 1 else [])
    if not any(found):
        others = parts > 1 and any(_collect(config, labels, folders))
        if not others:
            raise _nothing(config, labels)
    return found


def check_dataset(bids_dir: Path) -> None:
    """Refuse what is not the root of a BIDS dataset.

    Raises
    ------
    NoInputError
        If the folder does not exist.
    NotBidsError
        If it lacks a readable dataset_description.json or any ``sub-`` folder.
    """
    if not bids_dir.exists():
        raise NoInputError("there is no such folder", bids_dir, "check the path (and its mount)")
    if not bids_dir.is_dir():
        raise NoInputError("this is a file, not a folder", bids_dir, "name the BIDS folder itself")
    description = bids_dir / "dataset_description.json"
    _, problem = read_json(description)
    if problem == "is missing":
        raise NotBidsError("dataset_description.json is missing", bids_dir, _where_is_it(bids_dir))
    if problem:
        raise NotBidsError(
            f"dataset_description.json {problem}", bids_dir,
            "mend or fetch it; the smallest valid one is "
            '{"Name": "my data", "BIDSVersion": "1.10.0"}',
        )  # fmt: skip
    if not _participant_folders(bids_dir):
        raise NotBidsError(
            "there is no folder named sub-…", bids_dir,
            "name the folder that holds the participants; if you use a container, check that the "
            "folder is mounted",
        )  # fmt: skip


def _participant_folders(bids_dir: Path) -> list[Path]:
    """The ``sub-`` folders, and links of such a name that lead nowhere; sorted."""
    return sorted(
        entry
        for entry in bids_dir.glob("sub-*")
        if entry.is_dir() or (leads_nowhere(entry) and LABEL.fullmatch(entry.name[4:]))
    )


def _where_is_it(bids_dir: Path) -> str:
    """The hint for a folder without description: the dataset may be above or below."""
    near = [bids_dir.parent, bids_dir.parent.parent, *sorted(bids_dir.glob("*/"))]
    for folder in near:
        if (folder / "dataset_description.json").exists():
            return f"did you mean {folder}?"
    return (
        "name the root folder of the dataset, or add the file: "
        '{"Name": "my data", "BIDSVersion": "1.10.0"}'
    )


def _select(config: Config) -> tuple[list[str], list[Path]]:
    """Labels of the participants to look at, and ``sub-`` folders whose name is not one of BIDS."""
    folders = _participant_folders(config.bids_dir)
    names = {folder.name.removeprefix("sub-"): folder for folder in folders}
    labels = [label for label in names if LABEL.fullmatch(label)]
    broken = [names[label] for label in names if not LABEL.fullmatch(label)]
    if not config.participants:
        return labels, broken
    wanted = sorted({label.removeprefix("sub-") for label in config.participants})
    missing = [label for label in wanted if label not in names]
    if missing:
        similar = difflib.get_close_matches(missing[0], labels, n=3, cutoff=0.5)
        some = ", ".join(similar or labels[:5]) + ("" if similar or len(labels) <= 5 else ", …")
        raise NothingSelectedError(
            f"there is no participant {_quoted(missing)}", config.bids_dir,
            f"check --participant-label; {'similar are' if similar else 'the dataset has'} {some}",
        )  # fmt: skip
    return [label for label in labels if label in wanted], [
        f for f in broken if f.name[4:] in wanted
    ]


def _collect(config: Config, labels: list[str], broken_folders: list[Path]) -> Found:
    """Every selected scan of the participants `labels`, sorted into usable and not."""
    if not labels and not broken_folders:
        return (), ()
    paths = query(config, labels) if labels else []
    if not config.filters:
        paths += _misnamed(config, labels, set(paths))
    for folder in broken_folders:
        paths += [
            path
            for path in sorted(folder.rglob("*"))
            if LOOKS_STRUCTURAL.fullmatch(path.name) and not is_hidden(path)
        ]
    reader = _Reader(config)
    scans, unusable = [], list(_closed(config, labels))
    for path in paths:
        result = reader.read(path)
        (scans if isinstance(result, Scan) else unusable).append(result)
    return tuple(sorted(scans, key=_order)), tuple(sorted(unusable, key=lambda u: _order(u.scan)))


def _closed(config: Config, labels: list[str]) -> Iterator[Unusable]:
    """Selected folders that cannot be looked into, each as if it were a scan."""
    sessions = {label.removeprefix("ses-") for label in config.sessions}
    for folder in closed_folders(config.bids_dir, labels):
        found = _nameless(folder / "anat", config.bids_dir)
        if not sessions or found.session in sessions or folder.name.startswith("sub-"):
            yield Unusable(replace(found, path=folder), *why_closed(folder, config.bids_dir))


def _order(scan: Scan) -> tuple[str, str, str]:
    return scan.subject, scan.session or "", scan.path.name


def _misnamed(config: Config, labels: list[str], known: set[Path]) -> Iterator[Path]:
    """Files in ``anat`` that look like a T1w or T2w but are not named as BIDS wants it."""
    sessions = {label.removeprefix("ses-") for label in config.sessions}
    for label in labels:
        subject = config.bids_dir / f"sub-{label}"
        folders = [] if sessions else [subject / "anat"]
        folders += [
            folder / "anat"
            for folder in sorted(subject.glob("ses-*"))
            if not sessions or folder.name.removeprefix("ses-") in sessions
        ]
        for path in _files(folders):
            if path not in known and LOOKS_STRUCTURAL.fullmatch(path.name):
                try:
                    if parse_name(path.name)[1] in SUFFIXES and not path.is_dir():
                        continue
                except BrokenName:
                    pass
                yield path


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    """The entries of the folders that exist and can be listed, sorted, without hidden ones."""
    for folder in folders:
        try:
            yield from (path for path in sorted(folder.iterdir()) if not is_hidden(path))
        except OSError:
            continue


class _Reader:
    """Turns paths into scans, with the tables and sidecars read once."""

    def __init__(self, config: Config) -> None:
        self._root = config.bids_dir
        self._ages = AgeReader(config.bids_dir, config.age)
        self._sidecars = SidecarReader(config.bids_dir)
        self._seen: dict[object, Path] = {}

    def read(self, path: Path) -> Scan | Unusable:
        """The scan, or why it cannot be used."""
        try:
            entities, suffix = parse_name(path.name)
            self._check_place(path, entities, suffix)
        except BrokenName as reason:
            return Unusable(_nameless(path, self._root), str(reason), RENAME)
        twin = self._seen.setdefault((frozenset(entities.items()), suffix), path)
        scan = Scan(path, self._root, entities, suffix)
        if twin != path:
            return Unusable(scan, f"it has the same entities as {twin.name}", "keep one of the two")
        unreadable = why_unreadable(path, self._root)
        if unreadable:
            return Unusable(scan, *unreadable)
        metadata, problem = self._sidecars.metadata(path, entities, suffix)
        if problem:
            return Unusable(
                scan, problem, "mend the JSON file, or fetch it if it is a DataLad link"
            )
        return Scan(
            path, self._root, entities, suffix, metadata, self._ages.age(path, entities),
            contrast_agent(metadata, entities), skull_stripped(metadata),
        )  # fmt: skip

    def _check_place(self, path: Path, entities: dict[str, str], suffix: str) -> None:
        """The name must say what it is, and the same participant and session as its folders."""
        if suffix not in SUFFIXES:
            raise BrokenName(f"its suffix is '{suffix}', neither T1w nor T2w")
        if not path.name.endswith(EXTENSIONS):
            raise BrokenName("its name ends neither in .nii.gz nor in .nii")
        folders = path.relative_to(self._root).parts[:-1]
        for key in ("sub", "ses"):
            of_folder = [part for part in folders if part.startswith(f"{key}-")]
            of_name = [f"{key}-{entities[key]}"] if key in entities else []
            if of_folder != of_name:
                raise BrokenName(
                    f"its folder says {_quoted(of_folder) or f'no {key}-'}, "
                    f"its name {_quoted(of_name) or f'no {key}-'}"
                )


def _nameless(path: Path, root: Path) -> Scan:
    """A scan for messages only: the labels of its folders reduced to letters and digits."""
    entities = {}
    for part in path.relative_to(root).parts[:-1]:
        key, _, label = part.partition("-")
        if key in ("sub", "ses"):
            entities[key] = re.sub(r"[^0-9a-zA-Z+]", "", label) or "unnamed"
    last = without_extension(path.name).rpartition("_")[2]
    return Scan(path, root, entities, last if last in SUFFIXES else "unknown")


def _nothing(config: Config, labels: list[str]) -> NothingSelectedError:
    """The sentence for an empty selection: what was asked for, and what there is."""
    asked = [f"participants {_quoted(labels)}"] if config.participants else []
    if config.sessions:
        asked.append(f"sessions {_quoted(config.sessions)}")
    if config.filters:
        asked.append(f"filters {_shown(config.filters)}")
    hint = "check that the scans are named …_T1w.nii.gz or …_T2w.nii.gz and lie in anat folders"
    if config.sessions:
        there = {p.name[4:] for label in labels for p in config.bids_dir.glob(f"sub-{label}/ses-*")}
        hint = f"check --session-label; there are {_quoted(sorted(there)) or 'no sessions'}"
    if config.filters:
        hint = "check the --bids-filter-file; its keys are t1w and t2w"
    what = "no T1w or T2w scan was found"
    if asked:
        what += " for " + ", ".join(asked)
    return NothingSelectedError(what, config.bids_dir, hint)


def _shown(filters: dict[str, dict[str, Any]]) -> str:
    return "; ".join(f"{name}: {entities}" for name, entities in filters.items())


def _quoted(labels: Iterable[str]) -> str:
    """``'01', '02'``, cut short where there are many."""
    return listed(f"'{label}'" for label in labels)

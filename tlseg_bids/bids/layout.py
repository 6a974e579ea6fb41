"""The pybids index of the selected participants, asked with niworkflows' filter grammar."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bids.layout import BIDSLayout, BIDSLayoutIndexer, Query
from niworkflows.utils.bids import DEFAULT_BIDS_QUERIES, collect_data

from tlseg_bids.bids.files import closed_folders, is_hidden
from tlseg_bids.bids.lock import hold
from tlseg_bids.config import NO_ENTITY, Config
from tlseg_bids.errors import CannotCreateError, DataError, UsageError

QUERIES = ("t1w", "t2w")
LONG_NAMES = {"sub": "subject", "ses": "session", "acq": "acquisition", "ce": "ceagent",
              "rec": "reconstruction"}  # fmt: skip
WORDS = {"*": Query.ANY, "Query.ANY": Query.ANY, NO_ENTITY: Query.NONE,
         "Query.OPTIONAL": Query.OPTIONAL}  # fmt: skip
NOT_ANAT = re.compile(r"^/sub-[^/]+/(?:ses-[^/]+/)?(?!ses-)(?!anat(?:/|$))[^/]+(?:/|$)")
TOO_DEEP = re.compile(r"^/sub-[^/]+/(?:ses-[^/]+/)?anat/[^/]+/")
LARGEST_NUMBER = 2**63  # of the index, SQLite
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # such a name cannot be stored in the index


def query(config: Config, labels: list[str]) -> list[Path]:
    """Paths of the T1w and T2w files of the participants `labels` that the filters select.

    Folders that cannot be looked into are passed over (`closed_folders`).

    Raises
    ------
    UsageError
        If a filter names an unknown file type or entity, or contradicts another option.
    DataError
        If the database is of another dataset, damaged, or older than the files.
    CannotCreateError
        If the database folder cannot be made.
    """
    filters = _filters(config.filters)
    layout = _layout(config, labels)
    queries = {name: copy.deepcopy(DEFAULT_BIDS_QUERIES[name]) for name in QUERIES}
    sessions = sorted({label.removeprefix("ses-") for label in config.sessions})
    try:
        found, _ = collect_data(
            layout, labels, session_id=sessions or None, bids_filters=filters, queries=queries,
            group_echos=False,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"the filters cannot be applied: {str(error).split(' If you')[0]}",
            "--bids-filter-file",
            "keys are t1w and t2w, entities those of pybids (acquisition, ceagent, run, …)",
        ) from error
    paths = {Path(path) for name in QUERIES for path in found[name]}
    if config.database_dir is None:
        return sorted(paths)
    closed = set(closed_folders(config.bids_dir, labels))
    _check_fresh(config, layout, labels, closed)
    return sorted(path for path in paths if closed.isdisjoint(path.parents))


def _filters(filters: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The filters with long entity names and pybids' wildcards."""
    result = {}
    for name, entities in filters.items():
        if name not in DEFAULT_BIDS_QUERIES:
            raise UsageError(
                f"the filter '{name}' is unknown", "--bids-filter-file",
                f"keys are {' and '.join(QUERIES)}",
            )  # fmt: skip
        if not isinstance(entities, dict):
            raise UsageError(
                f"the filter '{name}' holds {entities!r}", "--bids-filter-file",
                'write an object of entities: {"t1w": {"acquisition": "mprage"}}',
            )  # fmt: skip
        odd = [value for value in entities.values() if not _plain(value)]
        if odd:
            raise UsageError(
                f"the filter '{name}' asks for {str(odd[0])[:100]}", "--bids-filter-file",
                "ask for text, a number, null, or a list of these",
            )  # fmt: skip
        result[name] = {LONG_NAMES.get(key, key): _value(value) for key, value in entities.items()}
    return result


def _plain(value: Any) -> bool:
    """Whether the index can be asked for a value."""
    if isinstance(value, list):
        return all(not isinstance(item, list) and _plain(item) for item in value)
    if isinstance(value, int | float):
        return abs(value) < LARGEST_NUMBER
    return value is None or isinstance(value, str)


def _value(value: Any) -> Any:
    """``null`` means "does not have the entity", ``"*"`` means "has it, whatever it is"."""
    if isinstance(value, list):
        return list(dict.fromkeys(_value(item) for item in value))  # pybids takes out one null
    if value is None:
        return Query.NONE
    return WORDS.get(value, value) if isinstance(value, str) else value


def _layout(config: Config, labels: list[str]) -> BIDSLayout:
    """An index of file names (no metadata): of `labels`, or of everyone if it is to be kept."""
    root = config.bids_dir
    if config.database_dir is None:
        return _build(root, "|".join(map(re.escape, labels)), closed=closed_folders(root, labels))
    try:
        config.database_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreateError(
            f"the database folder cannot be made ({error.strerror})", config.database_dir,
            "choose another --bids-database-dir",
        ) from error  # fmt: skip
    if (config.database_dir / "layout_index.sqlite").exists():
        layout = _build(root, ".*", config.database_dir)
    else:
        everyone = [p.name.removeprefix("sub-") for p in root.glob("sub-*")]
        with hold(config.database_dir / ".lock", "the database is being made", wait_s=600):
            closed = closed_folders(root, everyone)
            layout = _build(root, ".*", config.database_dir, closed)
    if Path(layout.root) != root:
        raise UsageError(
            f"the database is of another dataset, {layout.root}", config.database_dir,
            "choose another --bids-database-dir",
        )  # fmt: skip
    return layout


def _build(
    root: Path, subjects: str, database: Path | None = None, closed: Iterable[Path] = ()
) -> BIDSLayout:
    """Index the ``anat`` folders of the participants that the pattern `subjects` matches.

    The folders `closed` are left out, at which the indexer would stop.
    """
    others = re.compile(rf"^/(?!sub-(?:{subjects})(?:/|$))")
    names = (folder.relative_to(root).as_posix() for folder in closed)
    ignore = [others, NOT_ANAT, TOO_DEEP, NOT_UTF8]
    ignore += [re.compile(rf"^/{re.escape(name)}(?:/|$)") for name in names]
    indexer = BIDSLayoutIndexer(validate=False, index_metadata=False, ignore=ignore)
    try:
        return BIDSLayout(root, validate=False, database_path=database, indexer=indexer)
    except Exception as error:
        if database is None:
            raise
        raise DataError(
            f"the database cannot be used ({type(error).__name__}: {error})", database,
            "delete the folder, or leave out --bids-database-dir",
        ) from error  # fmt: skip


def _check_fresh(config: Config, layout: BIDSLayout, labels: list[str], closed: set[Path]) -> None:
    """A kept index must know the selected participants' T1w and T2w files as they are now.

    Of those in the folders `closed` nothing can be said.
    """
    known = {
        Path(path)
        for path in layout.get(subject=labels, suffix=["T1w", "T2w"], return_type="filename")
        if path.endswith((".nii", ".nii.gz")) and Path(path).parent.name == "anat"
    }
    there = {
        path
        for label in labels
        for pattern in ("anat/*_T[12]w.nii*", "ses-*/anat/*_T[12]w.nii*")
        for path in (config.bids_dir / f"sub-{label}").glob(pattern)
        if path.name.endswith((".nii", ".nii.gz"))
        and not NOT_UTF8.search(str(path))
        and not is_hidden(path)
    }
    changed = sorted(path for path in known ^ there if closed.isdisjoint(path.parents))
    if changed:
        raise DataError(
            f"the database is out of date: {changed[0].relative_to(config.bids_dir)} was "
            f"{'removed' if changed[0] in known else 'added'} since", config.database_dir,
            "delete the folder, or leave out --bids-database-dir",
        )  # fmt: skip

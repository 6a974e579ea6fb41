"""Which label image of a BIDS derivative belongs to which scan; no voxel is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tlseg_bids.bids.names import (
    DERIVATIVE_ENTITIES,
    EXTENSIONS,
    INDEX,
    INDEX_ENTITIES,
    SUFFIX_SPACE,
    entities_of,
    in_standard_space,
    without_extension,
)
from tlseg_bids.bids.scan import Scan, Unusable
from tlseg_bids.errors import NoInputError, ScanError, amount, listed
from tlseg_bids.flow import Skip
from tlseg_bids.grid import difference
from tlseg_bids.volume import load_grid

SUFFIX = "dseg"


@dataclass(frozen=True)
class Refused:
    """A scan or label image that cannot be used: what is wrong, and what to do."""

    name: str
    what: str
    hint: str


@dataclass(frozen=True, eq=False)
class Matched:
    """Scans with the label image that belongs to each, and what could not be matched.

    `unmatched` names the label images that belong to no selected scan.
    """

    labels_dir: Path
    pairs: tuple[tuple[Scan, Path], ...]
    refused: tuple[Refused, ...]
    unlabelled: tuple[str, ...]
    unmatched: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence on the label images that belong to no selected scan, if there are any."""
        if not self.unmatched:
            return ()
        return (
            f"Not used, as they belong to no selected scan: {listed(self.unmatched)}. Check that "
            "subject, session, run, space and other entities are those of the scans.",
        )


def match(labels_dir: Path, scans: Sequence[Scan], unusable: Iterable[Unusable] = ()) -> Matched:
    """Find the label image of every scan; no voxel is read.

    Parameters
    ----------
    labels_dir : Path
        Root of a BIDS derivative with ``sub-*/**/*_seg-P_dseg.nii.gz``.
    scans : sequence of Scan
        The selected scans. A label image belongs to the scan that has its entities and whose
        suffix is its ``space``, of several such scans to each on whose grid it lies. Those in a
        standard space are left out.
    unusable : iterable of Unusable
        Scans that were found and cannot be read: those with labels are refused by their reason.

    Raises
    ------
    NoInputError
        If the folder does not exist or holds no label image of these scans.
    """
    files = _native(_label_files(labels_dir), labels_dir)
    pairs, refused, unmatched = _matched(files, scans)
    unmatched, lost = _without_scan(unmatched, unusable)
    refused += lost
    if not pairs and not refused:
        raise NoInputError(
            f"of {amount(len(files), 'label image')} none belongs to a selected scan", labels_dir,
            "check that subject, session and other entities are those of the scans, and the "
            "selection (--participant-label, --bids-filter-file)",
        )  # fmt: skip
    done = {scan_name(scan) for scan, _ in pairs} | {one.name for one in refused}
    unlabelled = tuple(scan_name(scan) for scan in scans if scan_name(scan) not in done)
    subjects = {scan.subject for scan in scans}
    unmatched.sort(key=lambda file: entities_of(file).get("sub") not in subjects)
    names = tuple(file.name for file in unmatched)
    return Matched(labels_dir, tuple(pairs), tuple(refused), unlabelled, names)


def _label_files(labels_dir: Path) -> list[Path]:
    if not labels_dir.is_dir():
        raise NoInputError("there is no such folder", f"--labels {labels_dir}", "correct the path")
    files = [
        path
        for extension in EXTENSIONS
        for path in sorted(labels_dir.glob(f"sub-*/**/*_{SUFFIX}{extension}"))
    ]
    if not files:
        raise NoInputError(
            f"there are no labels: no sub-*/…_{SUFFIX}.nii.gz was found", f"--labels {labels_dir}",
            "name the root of a BIDS derivative with label images",
        )  # fmt: skip
    return files


def _native(files: list[Path], labels_dir: Path) -> list[Path]:
    """Those of the label images that lie in the space of a scan."""
    native = [file for file in files if not in_standard_space(file)]
    if not native:
        raise NoInputError(
            f"of {amount(len(files), 'label image')} none lies in the space of a scan, such as "
            f"{files[0].name}",
            f"--labels {labels_dir}",
            "give labels on the grids of the scans (space-T1w, space-T2w)",
        )  # fmt: skip
    return native


def _fitting(file: Path, scans: Iterable[Scan]) -> list[Scan]:
    """The scans that a label image may belong to by its name.

    Those that have its very entities, else those with the same ones (``run-1`` is ``run-01``),
    else those that have more.
    """
    named = entities_of(file)
    space = named.get("space", "")
    raw = {k: v for k, v in named.items() if k not in DERIVATIVE_ENTITIES}
    if SUFFIX_SPACE.fullmatch(space):
        scans = [scan for scan in scans if scan.suffix == space]
    numbered = _numbered(raw)
    fitting = [scan for scan in scans if numbered.items() <= _numbered(scan.entities).items()]
    very = [scan for scan in fitting if raw == scan.entities]
    return very or [scan for scan in fitting if len(scan.entities) == len(raw)] or fitting


def _numbered(entities: Mapping[str, str]) -> dict[str, str | int]:
    """The entities with indices as numbers."""
    return {
        key: int(label) if key in INDEX_ENTITIES and INDEX.fullmatch(label) else label
        for key, label in entities.items()
    }


def _matched(
    files: Iterable[Path], scans: Sequence[Scan]
) -> tuple[list[tuple[Scan, Path]], list[Refused], list[Path]]:
    """Pairs of scan and label image, refusals, unmatched images; no scan may have two images."""
    found: dict[str, list[tuple[Scan, Path]]] = {}
    refused, unmatched = [], []
    for file in files:
        fitting = _fitting(file, scans)
        if not fitting:
            unmatched.append(file)
        if len(fitting) > 1:
            same = [scan for scan in fitting if _grids_apart(scan, file) is None]
            if not same:
                refused.append(Refused(
                    file.name, f"the label image fits {len(fitting)} scans by its name, and lies "
                    "on the grid of none", "write space-T1w or space-T2w into its name",
                ))  # fmt: skip
            fitting = same
        for scan in fitting:
            found.setdefault(scan_name(scan), []).append((scan, file))
    for name, pairs in found.items():
        if len(pairs) > 1:
            both = " and ".join(file.name for _, file in pairs[:2])
            hint = "keep one of them in the folder given with --labels"
            refused.append(Refused(name, f"there are two label images of this scan, {both}", hint))
    return [pairs[0] for pairs in found.values() if len(pairs) == 1], refused, unmatched


def _without_scan(
    files: Iterable[Path], unusable: Iterable[Unusable]
) -> tuple[list[Path], list[Refused]]:
    """Label images that belong to no scan at all, and scans that have one and cannot be read."""
    lost = [one for one in unusable if scan_name(one.scan) == without_extension(one.scan.path.name)]
    unmatched, refused = [], {}
    for file in files:
        fitting = _fitting(file, [one.scan for one in lost])
        if not fitting:
            unmatched.append(file)
        for one in lost:
            if one.scan in fitting:
                what = f"the scan has labels and cannot be used: {one.reason}"
                refused[one.scan.path] = Refused(scan_name(one.scan), what, one.hint)
    return unmatched, list(refused.values())


def without(matched: Matched, skips: Iterable[Skip]) -> Matched:
    """The same without the scans that the plan skips: they are refused by its reason."""
    why = {scan_name(skip.scan): skip for skip in skips}
    refused = [
        Refused(name, why[name].reason, why[name].hint)
        for name in (scan_name(scan) for scan, _ in matched.pairs)
        if name in why
    ]
    pairs = tuple(pair for pair in matched.pairs if scan_name(pair[0]) not in why)
    return replace(matched, pairs=pairs, refused=(*matched.refused, *refused))


def scan_name(scan: Scan) -> str:
    """``sub-01_T2w``: stem and suffix."""
    return f"{scan.stem}_{scan.suffix}"


def _grids_apart(scan: Scan, file: Path) -> str | None:
    """How the grids of scan and labels differ; None if they are the same."""
    try:
        one, other = load_grid(scan.path)[0], load_grid(file)[0]
    except ScanError as error:
        return error.what
    return difference(one, other)

"""Labelled scans of a site: the label images that belong to scans, read and checked.

What cannot be used gets a sentence and the others go on; a scan without labels is no failure.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from tlseg_bids.adapt.matching import SUFFIX, Matched, Refused, scan_name
from tlseg_bids.adapt.reading import IGNORE, STRAY_SHARE, Reading, read_as
from tlseg_bids.bids.names import entities_of, without_extension
from tlseg_bids.bids.scan import Scan
from tlseg_bids.bids.tables import read_table
from tlseg_bids.errors import DataError, ScanError, TlsegError, amount
from tlseg_bids.grid import Grid, difference
from tlseg_bids.labels.protocol import LabelProtocol, known_protocols, load_protocol
from tlseg_bids.volume import Volume, load_grid, load_labels

STRAY_AREA = 0.05
THIN_MM = 4.0
FLAT = 0.25
LARGEST_INDEX = int(np.iinfo(np.int16).max)


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """A scan with labels of the site.

    Parameters
    ----------
    scan : Scan
        The image.
    file : Path
        Its label image.
    channels : ndarray of uint8, shape (I, J, K)
        Channel of `Reading.target`, `IGNORE` where nothing is known; on the scan's grid.
    grid : Grid
        That grid.
    group : ndarray of int, shape (channels,)
        As in `Reading`; a scan of which only some structures count has its own.
    notes : tuple of str
        Sentences: slices that are unknown, structures that count.
    sha256 : str
        Of the bytes of scan and labels.
    """

    scan: Scan
    file: Path
    channels: np.ndarray
    grid: Grid
    group: np.ndarray
    notes: tuple[str, ...]
    sha256: str

    @property
    def name(self) -> str:
        """``sub-01_T2w``: stem and suffix of the scan."""
        return f"{self.scan.stem}_{self.scan.suffix}"


@dataclass(frozen=True, eq=False)
class Collected:
    """What a derivative holds for the selected scans.

    `usable` and `refused` are disjoint; `unlabelled` names the scans without a label image.
    """

    usable: tuple[LabelledScan, ...]
    refused: tuple[Refused, ...]
    unlabelled: tuple[str, ...]
    reading: Reading


def collect(matched: Matched, model: LabelProtocol, new_head: bool = False) -> Collected:
    """Read the label images.

    Parameters
    ----------
    matched : Matched
        What `match` found; the look-up table ``seg-P_dseg.tsv`` lies at the derivative's root or
        nearer to the images.
    model : LabelProtocol
        What the model to be adapted distinguishes.
    new_head : bool
        See `read_as`.

    Raises
    ------
    DataError
        If no label image can be used; the sentence of the first is told.
    """
    refused = list(matched.refused)
    tables = {file: look_up_table(file, matched.labels_dir) for _, file in matched.pairs}
    loaded = []
    for scan, file in matched.pairs:
        try:
            loaded.append((scan, file, _load(scan, file, tables[file], model)))
        except TlsegError as error:
            refused.append(Refused(scan_name(scan), error.what, error.hint))
    if not loaded:
        raise _none_usable(matched.labels_dir, refused)
    reading = _reading([(file, volume) for _, file, volume in loaded], tables, model, new_head)
    reading = replace(reading, notes=(*reading.notes, *matched.notes))
    usable = tuple(_labelled(*one, reading) for one in loaded)
    return Collected(usable, tuple(refused), matched.unlabelled, reading)


def look_up_table(file: Path, root: Path) -> dict[int, str] | None:
    """Index to name for a label image: the nearest table that applies, None if there is none.

    Looked for, from the image's folder up to `root`: a TSV of the image's own name, then
    ``seg-P_dseg.tsv``, then ``dseg.tsv``.

    Raises
    ------
    DataError
        If the table lacks a column, an index is no whole number, or one has two names.
    """
    seg = entities_of(file).get("seg")
    names = [without_extension(file.name) + ".tsv"]
    names += [f"seg-{seg}_{SUFFIX}.tsv"] if seg else []
    names += [f"{SUFFIX}.tsv"]
    for folder in file.parents:
        for name in names:
            if (folder / name).is_file():
                return _read_table(folder / name)
        if folder == root:
            return None
    return None


def unknown_slices(labels: np.ndarray, spacing_mm: Sequence[float]) -> tuple[np.ndarray, str]:
    """Slices of which nothing is known, because nobody labelled them.

    A slice without any label between slices that show the same structure is unknown, not
    background. Where there are several such gaps along an axis, or the labelled runs are thin, the
    labels were drawn on single slices, and the empty ones outside are unknown too. A run is thin if
    it is one slice, or two that are together thinner than `THIN_MM` or than `FLAT` of the labels'
    smaller width: two thick slices may well hold a whole structure. Runs that are nowhere larger
    than `STRAY_AREA` of the largest slice are stray voxels and make no gap.

    Parameters
    ----------
    labels : ndarray of int or bool, shape (I, J, K)
        Above 0 where there is a structure.
    spacing_mm : sequence of 3 float
        Voxel size.

    Returns
    -------
    unknown : ndarray of bool, shape (I, J, K)
    note : str
        What was found, empty if every slice is known.
    """
    unknown = np.zeros(labels.shape, bool)
    places = np.nonzero(labels > 0)
    if not len(places[0]):
        return unknown, ""
    found, structures = np.unique(labels[places], return_inverse=True)
    widths = [(np.ptp(place) + 1) * mm for place, mm in zip(places, spacing_mm, strict=True)]
    notes = []
    for axis, (size, place) in enumerate(zip(labels.shape, places, strict=True)):
        counts = np.bincount(place * len(found) + structures, minlength=size * len(found))
        counts = counts.reshape(size, len(found))
        width = min(widths[:axis] + widths[axis + 1 :])
        slices = _unknown_along(counts, spacing_mm[axis], width)
        if not slices.any():
            continue
        np.moveaxis(unknown, axis, 0)[slices] = True
        notes.append(f"{int(slices.sum())} of {size} slices along axis {'IJK'[axis]}")
    note = f"Without any label, and taken as unknown: {', '.join(notes)}." if notes else ""
    return unknown, note


def _unknown_along(counts: np.ndarray, spacing_mm: float, width_mm: float) -> np.ndarray:
    """True for the slices of an axis that are unknown.

    `counts` (slices, structures) are voxels, `width_mm` is how far the labels reach across.
    """
    area = counts.sum(1)
    edges = np.flatnonzero(np.diff(np.pad(area > 0, 1).astype(int)))
    runs = [run for run in edges.reshape(-1, 2)
            if area[run[0] : run[1]].max() > STRAY_AREA * area.max()]  # fmt: skip
    gaps = [
        slice(stop, start)
        for (_, stop), (start, _) in pairwise(runs)
        if (counts[:stop].any(0) & counts[start:].any(0)).any()
    ]
    thickness = np.median([stop - start for start, stop in runs])
    least_mm = max(THIN_MM, FLAT * width_mm)
    thin = thickness < 2 or (thickness == 2 and 2 * spacing_mm < least_mm)
    if thin or len(gaps) > 1:
        return area == 0
    unknown = np.zeros(len(area), bool)
    for gap in gaps:
        unknown[gap] = area[gap] == 0
    return unknown


def _load(scan: Scan, file: Path, names: dict[int, str] | None, model: LabelProtocol) -> Volume:
    """The labels of a scan, on its grid and with known indices."""
    grid = load_grid(scan.path)[0]
    volume = _label_image(file)
    apart = difference(grid, volume.grid)
    if apart:
        raise ScanError(
            f"the labels {file.name} lie on another grid than the scan: {apart}", file,
            "resample the labels to the scan (nearest neighbour), or take the scan they were "
            "drawn on",
        )  # fmt: skip
    _check_range(volume.data, file)
    counts = _counts(volume.data)
    if not any(label > 0 for label in counts):
        raise ScanError(
            f"the label image {file.name} shows no structure", file, "label it, or remove the file"
        )
    known = _known_indices(file, names, model)
    if known is not None:
        strange = {label: n for label, n in counts.items() if label not in known and label != 0}
        total = sum(n for label, n in counts.items() if label != 0)
        if sum(strange.values()) > STRAY_SHARE * total:
            label = max(strange, key=strange.__getitem__)
            raise ScanError(
                f"index {label} is not in the look-up table; {strange[label]} of {total} "
                f"labelled voxels of {file.name} have it",
                file, "add the row (index, name) to the TSV, or correct the voxels",
            )  # fmt: skip
    return volume


def _label_image(file: Path) -> Volume:
    """The label image; what is wrong with it is said of it, as the scan's name stands before."""
    try:
        return load_labels(file)
    except ScanError as error:
        raise ScanError(
            f"the label image {file.name} cannot be used: {error.what}", error.where, error.hint
        ) from error


def _check_range(labels: np.ndarray, file: Path) -> None:
    """Refuse indices that no label map of this program can hold."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise ScanError(
            f"{amount(np.count_nonzero(labels < 0), 'voxel')} of {file.name} with a negative "
            f"label, down to {low}", file,
            "write 0 where nothing is labelled, else an index above 0",
        )  # fmt: skip
    if high > LARGEST_INDEX:
        raise ScanError(
            f"index {high} of {file.name} is above {LARGEST_INDEX}, the largest that label maps "
            "are written with", file, "give its structure a smaller index, here and in the TSV",
        )  # fmt: skip


def _known_indices(
    file: Path, names: dict[int, str] | None, model: LabelProtocol
) -> set[int] | None:
    """What the look-up table names; without one, the indices of the protocol in the file's name."""
    if names is not None:
        return set(names)
    seg = entities_of(file).get("seg", "")
    if seg == model.name:
        return set(map(int, model.indices))
    return set(map(int, load_protocol(seg).indices)) if seg in known_protocols() else None


def _counts(labels: np.ndarray) -> dict[int, int]:
    low = int(labels.min())
    found = np.bincount((labels - low).ravel())
    return {int(i) + low: int(found[i]) for i in np.flatnonzero(found)}


def _reading(
    loaded: Sequence[tuple[Path, Volume]],
    tables: dict[Path, dict[int, str] | None],
    model: LabelProtocol,
    new_head: bool,
) -> Reading:
    """What all label images together are written in; they must share one protocol."""
    segs = Counter(entities_of(file).get("seg", "") for file, _ in loaded)
    if len(segs) > 1:
        raise DataError(
            f"the label images are in {len(segs)} protocols: {', '.join(sorted(segs))}", "--labels",
            "keep those of one seg- in the folder",
        )  # fmt: skip
    voxels: Counter[int] = Counter()
    for _, volume in loaded:
        voxels.update(_counts(volume.data))
    names: dict[int, str] = {}
    for file, _ in loaded:
        names.update(tables[file] or {})
    return read_as(voxels, names or None, next(iter(segs)), model, new_head)


def _labelled(scan: Scan, file: Path, volume: Volume, reading: Reading) -> LabelledScan:
    channels = reading.channels(volume.data)
    unknown, note = unknown_slices(volume.data, volume.grid.spacing_mm)
    channels[unknown] = IGNORE
    digest = hashlib.sha256(scan.path.read_bytes())
    digest.update(file.read_bytes())
    notes = (note,) if note else ()
    return LabelledScan(scan, file, channels, volume.grid, reading.group, notes, digest.hexdigest())


def with_group(labelled: LabelledScan, group: np.ndarray, note: str) -> LabelledScan:
    """The same scan when only some structures count."""
    return replace(labelled, group=group, notes=(*labelled.notes, note))


def _read_table(path: Path) -> dict[int, str]:
    table = read_table(path)
    if table.problem or not table.rows or not {"index", "name"} <= set(table.rows[0]):
        problem = table.problem or "lacks the columns index and name"
        raise DataError(f"the look-up table {problem}", path, "BIDS wants index and name")
    names = {}
    for row in table.rows:
        try:
            index, name = int(row["index"]), row["name"] or f"label {row['index']}"
        except ValueError:
            raise DataError(
                f"the index '{row['index']}' is not a whole number", path, "correct the table"
            ) from None
        if names.setdefault(index, name) != name:
            raise DataError(
                f"index {index} has two names, '{names[index]}' and '{name}'", path,
                "keep the row that is meant, and give the other structure an index of its own",
            )  # fmt: skip
    return names


def _none_usable(where: Path, refused: Sequence[Refused]) -> DataError:
    first = refused[0]
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return DataError(
        f"no labelled scan can be used; {first.name}: {first.what}{more}", where, first.hint
    )
